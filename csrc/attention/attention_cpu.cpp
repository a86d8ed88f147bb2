// The attention kernels of one instruction set: this file is compiled once for each.
#include "attention/attention_backward.h"
#include "attention/attention_forward.h"

namespace encdec::attention {
namespace ENCDEC_ISA_NAMESPACE {

const AttentionKernels kAttentionKernels = {
    [](const Attention& f) { return heads_of_unit(f); },
    [](const Attention& f) {
      int64_t bytes = 0;
      with_dtype(f.dtype, [&](auto c) { bytes = attention_places<decltype(c)::value>(f).bytes; });
      return bytes;
    },
    [](const Attention& f) {
      with_dtype(f.dtype, [&](auto c) { run_attention<decltype(c)::value>(f); });
    },
    [](const AttentionBackward& f) {
      int64_t bytes = 0;
      with_dtype(f.forward.dtype,
                 [&](auto c) { bytes = backward_places<decltype(c)::value>(f).bytes; });
      return bytes;
    },
    [](const AttentionBackward& f) {
      with_dtype(f.forward.dtype, [&](auto c) { run_attention_backward<decltype(c)::value>(f); });
    },
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::attention
