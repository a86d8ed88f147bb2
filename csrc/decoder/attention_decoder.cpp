#include "decoder/attention_decoder.h"

namespace encdec::decoder {

const DecoderKernels& decoder_kernels(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return avx2::kDecoderKernels;
    case Isa::kAvx512:
      return avx512::kDecoderKernels;
    default:
      return avx512_bf16::kDecoderKernels;
  }
}

}  // namespace encdec::decoder
