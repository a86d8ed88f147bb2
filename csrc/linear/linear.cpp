#include "linear/linear.h"

namespace encdec::linear {

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

}  // namespace encdec::linear
