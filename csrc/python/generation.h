// The generation engine as Python sees it.
#pragma once

#include <pybind11/pybind11.h>

namespace encdec::generation {

void bind(pybind11::module_& m);

}  // namespace encdec::generation
