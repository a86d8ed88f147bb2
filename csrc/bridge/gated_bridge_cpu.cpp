// The kernels of the gated bridge of one instruction set: this file is compiled once for each.
#include "bridge/gated_bridge_kernel.h"

namespace encdec::bridge {
namespace ENCDEC_ISA_NAMESPACE {
namespace {

Format format_of(const GatedBridge& f) {
  return reinterpret_cast<const PackedHeader*>(f.packed)->format;
}

}  // namespace

const Kernels kKernels = {
    [](int64_t H, int64_t C, Format format) { return layout(H, C, format).bytes; },
    [](const Weight& gate, const Weight& candidate, Format format, int threads, char* packed) {
      with_format(format,
                  [&](auto f) { pack<decltype(f)::value>(gate, candidate, threads, packed); });
    },
    [](const GatedBridge& f) {
      return with_format(format_of(f), [&](auto c) {
        return places<decltype(c)::value>(f).member_bytes * f.plan.threads;
      });
    },
    [](const GatedBridge& f) {
      with_format(format_of(f), [&](auto c) { run_bridge<decltype(c)::value>(f); });
    },
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::bridge
