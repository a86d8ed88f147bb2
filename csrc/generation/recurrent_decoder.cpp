#include "generation/recurrent_decoder.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "generation/projections.h"

namespace encdec::generation {
namespace {

float* floats(const AlignedBuffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

constexpr double kRowsPerRead = 10.0;  // rows that a weight is multiplied with while one is read
constexpr double kFromMemory = 3.0;    // how much longer a float from memory takes than from cache
constexpr int64_t kInCache = int64_t{8} << 20, kMostBytes = int64_t{64} << 20;

// Whether so many steps of so many rows are faster by way of the memory (ContextRows), of which
// there are `positions` rows in all. In units of the time in which a weight is read, per output:
//   by the context:  steps * K * max(1, rows / kRowsPerRead)
//   by the memory:   K * max(1, positions / kRowsPerRead), once, and steps * positions floats
bool worth_rows(const Projection& p, Format format, int64_t positions, int64_t rows,
                int64_t steps) {
  const int64_t bytes = positions * p.N * 4;
  if (bytes > kMostBytes) return false;
  const auto products = [](int64_t n) { return std::max(1.0, double(n) / kRowsPerRead); };
  const double read = 4.0 / element_bytes(format) * (bytes > kInCache ? kFromMemory : 1.0);
  const double by_context = double(steps * p.K) * products(rows);
  const double by_memory = double(p.K) * products(positions) + double(steps * positions) * read;
  return by_memory < 0.8 * by_context;
}

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

void RecurrentDecoder::begin(const Encoded& encoded, int64_t rows, int64_t limit, int threads) {
  const Kernels& own = kernels(chosen_isa());
  step_.B = encoded.B;
  step_.S = encoded.S;
  if (encoded.lengths) lengths_.assign(encoded.lengths, encoded.lengths + encoded.B);
  step_.memory_lengths = lengths_.data();
  step_.values = encoded.memory;
  step_.state_rows = std::max(rows, encoded.B);
  step_.rows = rows;
  // What `attend` writes goes up to a whole vector.
  const int64_t scores = round_up(std::max(step_.S, step_.location.N), 16);
  step_.weights_stride = staged_row_bytes(Format::kFloat32, 1 + scores) / 4;
  project_contexts(encoded, limit, threads);
  int64_t products = step_.output.projection.N * step_.output.projection.K;
  for (const RecurrentLayer& layer : model_->layers) {
    products += layer.input.N * layer.input.K + layer.hidden.N * layer.hidden.K;
  }
  for (int reader = 0; reader < kContextReaders; ++reader) {
    const Projection& p = context_of(reader);
    if (!step_.context_rows[reader].data) products += p.N * p.K;
  }
  step_.threads = products * rows > kTeamProducts ? threads : 1;
  start_states(encoded);
  project_keys(encoded, threads);
  grow(memory_rows_, std::max<int64_t>(64, own.recurrent_memory(step_)));
  step_.memory_rows = memory_rows_.data();
  own.prepare_memory(step_);
  grow(work_, own.recurrent_workspace(step_));
  step_.workspace = work_.data();
}

void RecurrentDecoder::start_states(const Encoded& encoded) {
  const int64_t B = encoded.B, H = step_.H, F = step_.F, layers = step_.layer_count;
  const int64_t rows = step_.state_rows, stride = step_.weights_stride;
  for (States& s : states_) {
    grow(s.h, layers * rows * H * 4);
    grow(s.c, layers * rows * H * 4);
    grow(s.context, std::max<int64_t>(1, rows * F) * 4);
    grow(s.weights, rows * stride * 4);
    if (step_.coverage_weight) grow(s.coverage, rows * stride * 4);
  }
  before_ = 0;
  const States& first = states_[0];
  for (int64_t l = 0; l < layers; ++l) {
    const size_t bytes = static_cast<size_t>(B * H * 4);
    std::memcpy(floats(first.h) + l * rows * H, encoded.h + l * B * H, bytes);
    if (encoded.c) std::memcpy(floats(first.c) + l * rows * H, encoded.c + l * B * H, bytes);
  }
  if (encoded.context) {
    std::copy_n(encoded.context, B * F, floats(first.context));
  } else {
    std::fill_n(floats(first.context), B * F, 0.0f);
  }
  if (step_.coverage_weight) std::fill_n(floats(first.coverage), B * stride, 0.0f);
  std::fill_n(floats(first.weights), B * stride, 0.0f);
  for (int64_t b = 0; b < B; ++b) floats(first.weights)[b * stride] = 1.0f;
}

void RecurrentDecoder::project_keys(const Encoded& encoded, int threads) {
  const Projection& p = model_->memory_keys;
  step_.keys = encoded.memory;
  if (p.N == 0) return;
  grow(keys_, encoded.B * encoded.S * p.N * 4);
  project(p, step_.format, encoded.memory, encoded.B * encoded.S, threads, project_work_,
          floats(keys_), p.N);
  step_.keys = floats(keys_);
}

const Projection& RecurrentDecoder::context_of(int reader) const {
  static const Projection none;
  if (reader == kOutput) return step_.output.context;
  if (reader == kAttentional) return step_.attentional;
  return reader < step_.layer_count ? model_->layers[static_cast<size_t>(reader)].context : none;
}

int64_t RecurrentDecoder::products_by_memory() const {
  return std::count_if(step_.context_rows, step_.context_rows + kContextReaders,
                       [](const ContextRows& rows) { return rows.data != nullptr; });
}

void RecurrentDecoder::pack_memory(const Encoded& encoded) {
  const int64_t M = step_.M;
  grow(packed_memory_, std::max<int64_t>(1, first_rows_.back() * M) * 4);
  float* to = floats(packed_memory_);
  for (int64_t b = 0; b < encoded.B; ++b) {
    to = encoded.context && step_.attentional.N == 0 ? std::copy_n(encoded.context + b * M, M, to)
                                                     : std::fill_n(to, M, 0.0f);
    const int64_t* const first = &first_rows_[static_cast<size_t>(b)];
    const int64_t positions = first[1] - first[0] - 1;
    if (positions > 0) to = std::copy_n(encoded.memory + b * encoded.S * M, positions * M, to);
  }
}

void RecurrentDecoder::project_contexts(const Encoded& encoded, int64_t limit, int threads) {
  const int64_t B = encoded.B;
  const bool attends = step_.attention_kind != Attention::kNone;
  first_rows_.assign(1, 0);
  for (int64_t b = 0; b < B; ++b) {
    first_rows_.push_back(first_rows_.back() + 1 + (attends ? source_length(b) : 0));
  }
  step_.first_rows = first_rows_.data();
  const int64_t positions = first_rows_.back();
  // A target is taken to be as long as its source, and has an end.
  const int64_t steps = attends ? std::min(limit, encoded.S + 1) : limit;
  step_.multiplies_context = false;
  bool packed = false;
  for (int reader = 0; reader < kContextReaders; ++reader) {
    const Projection& p = context_of(reader);
    ContextRows& to = step_.context_rows[reader];
    to = {};
    if (p.N == 0) continue;
    to.stride = staged_row_bytes(Format::kFloat32, p.N) / 4;
    // What reads an attentional vector does not read the sum over the memory itself.
    if (step_.attentional.N > 0 && reader != kAttentional) continue;
    // Narrow formats round the memory's rows there, else their sum: which of the two must not
    // depend on what else is in a batch. A context that stays is rounded the same either way.
    const bool same = step_.format == Format::kFloat32 || !attends;
    if (!same || !worth_rows(p, step_.format, positions, step_.rows, steps)) {
      step_.multiplies_context = true;
      continue;
    }
    if (!packed) pack_memory(encoded);
    packed = true;
    grow(context_rows_[reader], positions * to.stride * 4);
    project(p, step_.format, floats(packed_memory_), positions, threads, project_work_,
            floats(context_rows_[reader]), to.stride);
    to.data = floats(context_rows_[reader]);
  }
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
  step_.weights_before = floats(before.weights);
  step_.coverage_before = floats(before.coverage);
  step_.h = floats(after.h);
  step_.c = floats(after.c);
  step_.context = floats(after.context);
  step_.weights = floats(after.weights);
  step_.coverage = floats(after.coverage);
  step_.scores = scores;
  kernels(chosen_isa()).recurrent_step(step_);
}

}  // namespace encdec::generation
