#include "generation/recurrent_decoder.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "generation/projections.h"

namespace encdec::generation {
namespace {

float* floats(const AlignedBuffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

}  // namespace

RecurrentDecoder::RecurrentDecoder(std::shared_ptr<const RecurrentModel> model)
    : model_(std::move(model)), step_(model_->step) {
  step_.layers = model_->layers.data();
  step_.layer_count = static_cast<int64_t>(model_->layers.size());
}

void RecurrentDecoder::restrict(std::shared_ptr<const Shortlist> shortlist) {
  shortlist_ = std::move(shortlist);
  step_.output = shortlist_ ? shortlist_->layer : model_->step.output;
}

void RecurrentDecoder::begin(const Encoded& encoded, int64_t rows, int threads) {
  const Kernels& own = kernels(chosen_isa());
  const int64_t B = encoded.B, H = step_.H, M = step_.M, layers = step_.layer_count;
  step_.B = B;
  step_.S = encoded.S;
  if (encoded.lengths) lengths_.assign(encoded.lengths, encoded.lengths + B);
  step_.memory_lengths = lengths_.data();
  step_.values = encoded.memory;
  step_.state_rows = std::max(rows, B);
  step_.rows = rows;
  int64_t products = step_.output.projection.N * step_.output.projection.K;
  for (const RecurrentLayer& layer : model_->layers) {
    products += layer.input.N * layer.input.K + layer.hidden.N * layer.hidden.K;
  }
  step_.threads = products * rows > kTeamProducts ? threads : 1;
  for (States& s : states_) {
    grow(s.h, layers * step_.state_rows * H * 4);
    grow(s.c, layers * step_.state_rows * H * 4);
    grow(s.context, std::max<int64_t>(1, step_.state_rows * M) * 4);
  }
  before_ = 0;
  for (int64_t l = 0; l < layers; ++l) {
    const size_t bytes = static_cast<size_t>(B * H * 4);
    std::memcpy(floats(states_[0].h) + l * step_.state_rows * H, encoded.h + l * B * H, bytes);
    if (!encoded.c) continue;
    std::memcpy(floats(states_[0].c) + l * step_.state_rows * H, encoded.c + l * B * H, bytes);
  }
  const size_t bytes = static_cast<size_t>(B * M * 4);
  if (encoded.context) {
    std::memcpy(floats(states_[0].context), encoded.context, bytes);
  } else {
    std::memset(floats(states_[0].context), 0, bytes);
  }
  project_keys(encoded, threads);
  grow(memory_rows_, std::max<int64_t>(64, own.recurrent_memory(step_)));
  step_.memory_rows = memory_rows_.data();
  own.prepare_memory(step_);
  grow(work_, own.recurrent_workspace(step_));
  step_.workspace = work_.data();
}

void RecurrentDecoder::project_keys(const Encoded& encoded, int threads) {
  const Projection& p = model_->memory_keys;
  step_.keys = encoded.memory;
  if (p.N == 0) return;
  grow(keys_, encoded.B * encoded.S * p.N * 4);
  project(p, step_.format, encoded.memory, encoded.B * encoded.S, threads, project_work_,
          floats(keys_));
  step_.keys = floats(keys_);
}

void RecurrentDecoder::step(const StepRows& rows, const StepScores& scores) {
  const States& before = states_[before_];
  before_ = 1 - before_;
  const States& after = states_[before_];
  step_.rows = rows.count;
  step_.tokens = rows.tokens;
  // The first states are the sentences'.
  step_.parents = rows.position == 0 ? rows.sentences : rows.parents;
  step_.sentences = rows.sentences;
  step_.h_before = floats(before.h);
  step_.c_before = floats(before.c);
  step_.context_before = floats(before.context);
  step_.h = floats(after.h);
  step_.c = floats(after.c);
  step_.context = floats(after.context);
  step_.scores = scores;
  kernels(chosen_isa()).recurrent_step(step_);
}

}  // namespace encdec::generation
