#include "generation/kernels.h"

namespace encdec::generation {

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

}  // namespace encdec::generation
