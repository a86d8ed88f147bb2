#include "generation/transformer_decoder.h"

#include <algorithm>

#include "generation/projections.h"

namespace encdec::generation {
TransformerDecoder::TransformerDecoder(std::shared_ptr<const TransformerModel> model)
    : model_(std::move(model)), step_(model_->step), layers_(model_->layers) {
  step_.layers = layers_.data();
  step_.layer_count = static_cast<int64_t>(layers_.size());
}

void TransformerDecoder::restrict(std::shared_ptr<const Shortlist> shortlist) {
  shortlist_ = std::move(shortlist);
  step_.output = shortlist_ ? shortlist_->layer : model_->step.output;
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
  step_.threads =
      (products + step_.D * step_.output.projection.N) * rows > kTeamProducts ? threads : 1;
  step_.rows = rows;
  step_.position = limit;
  grow(work_, kernels(chosen_isa()).transformer_workspace(step_));
  step_.workspace = work_.data();
  project_memory(memory, B, S, threads);
}

// Keys and values of the memory, once for all steps.
void TransformerDecoder::project_memory(const float* memory, int64_t B, int64_t S, int threads) {
  if (model_->memory.empty()) return;
  TransformerMemory m;
  m.projections = model_->memory.data();
  m.layers = step_.layer_count;
  m.heads = step_.heads;
  m.head_size = step_.head_size;
  m.memory = memory;
  m.B = B;
  m.S = S;
  m.size = model_->memory[0].K;
  m.format = step_.format;
  m.threads = 2 * m.layers * B * S * m.heads * m.head_size * m.size > kTeamProducts ? threads : 1;
  const Kernels& own = kernels(chosen_isa());
  const TransformerMemorySizes sizes = own.transformer_memory_sizes(m);
  const int64_t part = sizes.keys + sizes.values;
  grow(memory_, std::max<int64_t>(64, part * m.layers));
  m.to = memory_.data();
  grow(memory_work_, sizes.workspace);
  m.workspace = memory_work_.data();
  own.transformer_memory(m);
  for (size_t l = 0; l < layers_.size(); ++l) {
    layers_[l].memory_keys = memory_.data() + static_cast<int64_t>(l) * part;
    layers_[l].memory_values = layers_[l].memory_keys + sizes.keys;
  }
}

void TransformerDecoder::step(const StepRows& rows, const StepScores& scores) {
  const int64_t position = rows.position;
  const int64_t width = step_.heads * step_.head_size;
  if (position >= static_cast<int64_t>(cache_.size())) {
    cache_.emplace_back();
    grow(cache_.back(), step_.layer_count * 2 * step_.cache_rows * width * kept_bytes());
  }
  positions_.clear();
  for (const AlignedBuffer& block : cache_) {
    positions_.push_back(block.data());
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
  step_.scores = scores;
  kernels(chosen_isa()).transformer_step(step_);
}

}  // namespace encdec::generation
