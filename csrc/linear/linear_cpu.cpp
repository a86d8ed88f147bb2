// The kernels of linear of one instruction set: this file is compiled once for each.
#include "linear/linear_backward.h"
#include "linear/linear_kernel.h"

namespace encdec::linear {
namespace ENCDEC_ISA_NAMESPACE {
namespace {

Format format_of(const Linear& f) {
  return reinterpret_cast<const PackedHeader*>(f.packed)->format;
}

}  // namespace

const Kernels kKernels = {
    [](int64_t N, int64_t K, Format format) { return layout(N, K, format).bytes; },
    [](const Weight& w, Format format, int threads, char* packed) {
      with_format(format, [&](auto f) { pack<decltype(f)::value>(w, threads, packed); });
    },
    [](const Linear& f) {
      return with_format(format_of(f), [&](auto c) { return places<decltype(c)::value>(f).bytes; });
    },
    [](const Linear& f) {
      with_format(format_of(f), [&](auto c) { run_linear<decltype(c)::value>(f); });
    },
    [](const LinearBackward& f) { return backward_places(f).bytes; },
    [](const LinearBackward& f) { run_linear_backward(f); },
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::linear
