#include "generation/transformer_decoder.h"

#include <algorithm>

#include "generation/projections.h"

namespace encdec::generation {
TransformerDecoder::TransformerDecoder(std::shared_ptr<const TransformerModel> model)
    : model_(std::move(model)), step_(model_->step), layers_(model_->layers) {
  step_.layers = layers_.data();
  step_.layer_count = static_cast<int64_t>(layers_.size());
}

void TransformerDecoder::begin(const float* memory, int64_t B, int64_t S, const int64_t* lengths,
                               int64_t rows, int64_t limit, int threads) {
  lengths_.assign(lengths, lengths + B);
  step_.S = S;
  step_.memory_lengths = lengths_.data();
  const int64_t width = step_.heads * step_.head_size;
  if (rows > step_.cache_rows) {  // positions are laid out for so many
    cache_.clear();
    step_.cache_rows = rows;
  }
  step_.ancestor_stride = limit;
  ancestors_.resize(static_cast<size_t>(rows * limit));
  ancestors_before_.resize(static_cast<size_t>(rows * limit));
  const int64_t products = step_.layer_count * step_.D * (6 * width + 2 * step_.F) / 2;
  step_.threads = (products + step_.D * step_.V) * rows > kTeamProducts ? threads : 1;
  step_.rows = rows;
  step_.position = limit;
  grow(work_, kernels(chosen_isa()).transformer_workspace(step_));
  step_.workspace = work_.data();
  project_memory(memory, B * S, threads);
}

// Keys and values of the memory, once for all steps.
void TransformerDecoder::project_memory(const float* memory, int64_t rows, int threads) {
  const int64_t part = round_up(rows * step_.heads * step_.head_size * 4, 64);
  grow(memory_, part * 2 * step_.layer_count + 64);
  char* at = memory_.data();
  const auto next = [&](const Projection& p) {
    float* const to = reinterpret_cast<float*>(at);
    project(p, step_.format, memory, rows, threads, project_work_, to);
    at += part;
    return to;
  };
  for (size_t l = 0; l < layers_.size(); ++l) {
    layers_[l].memory_keys = next(model_->memory[l].keys);
    layers_[l].memory_values = next(model_->memory[l].values);
  }
}

void TransformerDecoder::step(const StepRows& rows, float* logits, int64_t stride,
                              float* attention) {
  const int64_t position = rows.position;
  const int64_t width = step_.heads * step_.head_size;
  if (position >= static_cast<int64_t>(cache_.size())) {
    cache_.emplace_back();
    grow(cache_.back(), step_.layer_count * 2 * step_.cache_rows * width * 4);
  }
  positions_.clear();
  for (const AlignedBuffer& block : cache_) {
    positions_.push_back(reinterpret_cast<float*>(block.data()));
  }
  if (position > 0) {
    std::swap(ancestors_, ancestors_before_);
    for (int64_t r = 0; r < rows.count; ++r) {
      int32_t* const to = ancestors_.data() + r * step_.ancestor_stride;
      const int32_t* const from =
          ancestors_before_.data() + rows.parents[r] * step_.ancestor_stride;
      std::copy_n(from, position - 1, to);
      to[position - 1] = rows.parents[r];
    }
  }
  step_.rows = rows.count;
  step_.position = position;
  step_.tokens = rows.tokens;
  step_.sentences = rows.sentences;
  step_.cache = positions_.data();
  step_.ancestors = ancestors_.data();
  step_.logits = logits;
  step_.logits_stride = stride;
  step_.attention = attention;
  kernels(chosen_isa()).transformer_step(step_);
}

}  // namespace encdec::generation
