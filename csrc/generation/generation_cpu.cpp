// The kernels of generation of one instruction set: this file is compiled once for each.
#include "generation/recurrent_step.h"
#include "generation/scan.h"
#include "generation/transformer_memory.h"
#include "generation/transformer_step.h"

namespace encdec::generation {
namespace ENCDEC_ISA_NAMESPACE {

const Kernels kKernels = {
    scan_row,
    transformer_memory_sizes,
    [](const TransformerMemory& m) {
      with_format(m.format, [&](auto f) { run_transformer_memory<decltype(f)::value>(m); });
    },
    [](const TransformerStep& s) { return transformer_places(s).bytes; },
    [](const TransformerStep& s) {
      with_format(s.format, [&](auto f) { run_transformer_step<decltype(f)::value>(s); });
    },
    recurrent_memory,
    prepare_memory,
    [](const RecurrentStep& s) { return recurrent_places(s).bytes; },
    [](const RecurrentStep& s) {
      with_format(s.format, [&](auto f) { run_recurrent_step<decltype(f)::value>(s); });
    },
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::generation
