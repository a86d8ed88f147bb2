#include "bridge/gated_bridge.h"

namespace encdec::bridge {

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

void plan(GatedBridge& call, Format format, int available) {
  const int64_t row_bytes = staged_row_bytes(format, call.H) + staged_row_bytes(format, call.C);
  const int64_t K = call.H + 2 * call.C;  // weights of a feature, over the three matrices
  call.plan = plan_product(format, call.M, call.H, K, row_bytes, available);
}

}  // namespace encdec::bridge
