#include "rnn/rnn_plan.h"

#include <algorithm>
#include <numeric>

#include "core/amx.h"

namespace encdec::rnn {
namespace {

// Input products held at a time, over all directions: small enough to stay in a shared cache
// between the product and the steps, large enough that the product runs at full speed.
constexpr int64_t kGateBytes = 4 << 20;
// Backward holds the gates' gradients of a chunk. About a thousand rows are best for the weights'
// gradients: a packed panel of them stays in L2, and the sums are seldom loaded and stored.
constexpr int64_t kBackwardRows = 1024;
constexpr int64_t kBackwardGateBytes = 16 << 20;
constexpr int64_t kLeastChunkRows = 64;

// Rough speeds of one core and costs of a team; only their orders of magnitude matter here.
constexpr double kFlopsPerMicrosecond = 200e3;
constexpr double kWeightBytesPerMicrosecond = 200e3;
constexpr double kTeamMicroseconds = 3.0;
constexpr double kBarrierMicroseconds = 0.25;

// Numbers that a step reads, W_hh and the projection, and the bytes of so many.
double recurrent_weights(const Shape& s) {
  return static_cast<double>(gate_count(s.cell) * s.H * s.P + (s.projected ? s.H * s.P : 0));
}
double weight_bytes(double weights, Format format) {
  return weight_group_bytes(format) / double(group_size(format)) * weights;
}

// Sequences over threads instead of hidden units: no barrier and no line of the state that two
// cores write, but each core reads all of W_hh for its part of the rows. That pays where it lies in
// L2, where a part is large enough for the multiply-adds to take longer than the reading, and where
// parts are equal.
bool sequences_apart(const Shape& s, Format format, int threads) {
  constexpr int64_t kLeastSteps = 4;
  const double bytes = weight_bytes(recurrent_weights(s), format);
  const double l2 = static_cast<double>(cache_sizes().l2);
  const int64_t least = bytes <= l2 / 2 ? 4 : 8, most = rows_apart(s.B, 0, threads);
  return threads > 1 && !amx_multiplies(format) && bytes <= l2 && s.T >= kLeastSteps &&
         s.B / threads >= least && most * threads * 16 <= s.B * 17;
}

}  // namespace

Plan make_plan(const Shape& s, int64_t rows, int directions, Format format, int available) {
  const double gates = gate_count(s.cell);
  const double weights = recurrent_weights(s), bytes = weight_bytes(weights, format);
  const double ops = 2.0 * group_size(format);
  const double steps = static_cast<double>(s.T) * directions;
  const double per_step = std::max(bytes / kWeightBytesPerMicrosecond,
                                   2.0 * weights * rows / s.T / (kFlopsPerMicrosecond * ops / 2.0));
  const double input =
      2.0 * gates * s.H * s.I * rows * directions / (kFlopsPerMicrosecond * ops / 2.0);
  const auto microseconds = [&](int n) {
    // Two directions run side by side without meeting.
    const bool meet = n > (directions == 2 ? 2 : 1);
    return (steps * per_step + input) / n + (n > 1 ? kTeamMicroseconds : 0.0) +
           (meet ? s.T * kBarrierMicroseconds : 0.0);
  };
  Plan p;
  const int64_t most = std::max<int64_t>(1, (s.H + 15) / 16) * directions;
  const int team = static_cast<int>(std::min<int64_t>(available, most));
  p.threads = team > 1 && microseconds(team) < microseconds(1) ? team : 1;
  p.apart = directions == 1 && sequences_apart(s, format, p.threads);

  const int64_t row_bytes = static_cast<int64_t>(gates) * round_up(s.H, 32) * 4;
  const int64_t side_by_side = directions == 2 && p.threads > 1 ? 2 : 1;
  p.chunk_rows = std::max(kGateBytes / (row_bytes * side_by_side), kLeastChunkRows);
  p.chunk_rows = std::min(std::max(p.chunk_rows, s.B), std::max<int64_t>(rows, 1));
  const int members = directions == 2 && p.threads > 1 ? p.threads / 2 : p.threads;
  p.beside_rows = kernels(chosen_isa()).rows_beside(s, format, members);
  if (p.beside_rows > 0) p.chunk_rows = 2 * p.beside_rows;  // those of these steps and of the next
  return p;
}

Plan make_backward_plan(const Shape& s, int64_t rows, Format format, int available) {
  const double ops = 6.0 * gate_count(s.cell) * s.H * (s.I + s.P) * rows;
  Plan p;
  const int team = static_cast<int>(std::min<int64_t>(available, (s.H + 15) / 16));
  p.threads = team > 1 && ops / kFlopsPerMicrosecond > 4 * kTeamMicroseconds ? team : 1;
  p.apart = sequences_apart(s, format, p.threads);
  const int64_t row_bytes = std::max(saved_gates(s.cell), 1) * round_up(s.H, 32) * 4 + 64;
  p.chunk_rows = std::max(std::min(kBackwardGateBytes / row_bytes, kBackwardRows), kLeastChunkRows);
  p.chunk_rows = std::min(std::max(p.chunk_rows, s.B), std::max<int64_t>(rows, 1));
  return p;
}

std::string describe(const Plan& p, const Shape& s, int directions) {
  const double mb = static_cast<double>(p.chunk_rows) * gate_count(s.cell) * s.H * 4 / 1e6;
  std::string text = std::to_string(p.threads) + (p.threads == 1 ? " thread" : " threads");
  if (p.threads > 1 && directions == 2) text += ", directions side by side";
  if (p.apart) {
    text += ", sequences over threads";
  } else if (p.threads > directions) {
    text += ", hidden units over threads";
  }
  if (p.beside_rows > 0) {
    return text + ", input products of " + std::to_string(p.beside_rows) + " rows beside the steps";
  }
  text += ", time chunks of " + std::to_string(p.chunk_rows) + " rows (" +
          std::to_string(mb).substr(0, 4) + " MB)";
  return text;
}

Sequences SequenceOrder::from_lengths(const int64_t* lengths, int64_t B, int64_t T) {
  order.resize(B);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  const int64_t longest = B > 0 ? std::min(lengths[order[0]], T) : 0;
  sizes.assign(longest, 0);
  int64_t active = B;
  for (int64_t t = 0; t < longest; ++t) {
    while (active > 0 && lengths[order[active - 1]] <= t) --active;
    sizes[t] = active;
  }
  Sequences q = from_batch_sizes(nullptr, longest);
  q.B = B;
  q.order = order.data();
  q.packed = false;
  return q;
}

Sequences SequenceOrder::from_batch_sizes(const int64_t* batch_sizes, int64_t T) {
  if (batch_sizes) sizes.assign(batch_sizes, batch_sizes + T);
  starts.assign(T + 1, 0);
  for (int64_t t = 0; t < T; ++t) starts[t + 1] = starts[t] + sizes[t];
  Sequences q;
  q.T = T;
  q.B = T > 0 ? sizes[0] : 0;
  q.sizes = sizes.data();
  q.starts = starts.data();
  q.packed = true;
  return q;
}

}  // namespace encdec::rnn
