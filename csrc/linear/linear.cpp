#include "linear/linear.h"

#include <algorithm>

namespace encdec::linear {
namespace {

constexpr int64_t kStagedBytes = int64_t{384} << 10;  // a member's rows: they stay in L2
constexpr int64_t kLeastRows = 56;                    // that a panel is read for
constexpr int64_t kOwnRows = 42;                      // of a thread, to split rows

// Rough speeds of one core and the cost of a team; only their orders of magnitude matter here.
constexpr double kWordsPerMicrosecond = 100e3;  // products of 32-bit words
constexpr double kBytesPerMicrosecond = 100e3;  // of weights
constexpr double kTeamMicroseconds = 3.0;

}  // namespace

const Kernels& kernels(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return avx2::kKernels;
    case Isa::kAvx512:
      return avx512::kKernels;
    default:
      return avx512_bf16::kKernels;
  }
}

void plan(Linear& call, Format format, int available) {
  const double weights = double(call.N) * double(call.K) / group_size(format);
  const double alone = std::max(weights * weight_group_bytes(format) / kBytesPerMicrosecond,
                                weights * double(call.M) / kWordsPerMicrosecond);
  const bool worth = alone > 2 * kTeamMicroseconds;
  // With many rows each thread stages its own only; with few, each reads its part of the weights.
  call.split_rows = worth && call.M >= kOwnRows * available;
  const int64_t most = call.split_rows ? call.M : (call.N + 31) / 32;
  call.threads = worth ? static_cast<int>(std::min<int64_t>(available, most)) : 1;
  const int64_t fitting = kStagedBytes / staged_row_bytes(format, call.K);
  const int64_t own = call.split_rows ? (call.M + call.threads - 1) / call.threads : call.M;
  call.chunk_rows = std::max<int64_t>(1, std::min(own, std::max(fitting, kLeastRows)));
}

}  // namespace encdec::linear
