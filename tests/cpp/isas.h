// Kernels of one instruction set after the other. Static, as in check.h.
#pragma once

#include "core/amx.h"
#include "core/cpu_features.h"

namespace {

// Whether this processor has `isa`; kernels(isa) then multiply as they do where it was chosen.
inline bool use_isa(encdec::Isa isa) {
  const bool supported = encdec::isa_supported(isa);
  encdec::amx_chosen = supported && isa == encdec::Isa::kAvx512Amx;
  return supported;
}

}  // namespace
