// The kernels of additive attention of one instruction set: this file is compiled once for each.
#include "attention/additive_backward.h"
#include "attention/additive_forward.h"

namespace encdec::attention {
namespace ENCDEC_ISA_NAMESPACE {

const AdditiveKernels kAdditiveKernels = {
    [](const Additive& f) { return additive_places(f).bytes * f.threads; },
    run_additive,
    [](const AdditiveBackward& b) { return additive_backward_places(b).bytes; },
    run_additive_backward,
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::attention
