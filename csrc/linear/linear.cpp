#include "linear/linear.h"

#include <algorithm>

namespace encdec::linear {
namespace {

// About a thousand rows are best for the weight's gradient: a packed panel of them stays in L2, and
// the sums are seldom loaded and stored.
constexpr int64_t kBackwardRows = 1024;
constexpr double kTeamProducts = 200e3;  // from which a team pays

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
  const int64_t row_bytes = staged_row_bytes(format, call.K);
  call.plan = plan_product(format, call.M, call.N, call.K, row_bytes, available);
}

void plan(LinearBackward& call, int available) {
  const double products = double(call.M) * double(call.N) * double(call.K);
  call.threads = products > kTeamProducts ? std::max(1, available) : 1;
  call.chunk_rows = std::max<int64_t>(1, std::min(call.M, kBackwardRows));
}

}  // namespace encdec::linear
