// The product of the linear kernel for bindings that go on with its result.
#pragma once

#include <optional>
#include <vector>

#include "core/torch_tensor.h"

namespace encdec::linear {

// norm(residual + activation(input weight' + bias)); activation and norm are numbered as the enums
// of linear.h. Nothing where `packed` was not made from the weight's present values.
std::vector<Tensor> linear_forward(Tensor input, Tensor weight, Tensor packed,
                                   std::optional<Tensor> bias, int64_t activation,
                                   std::optional<Tensor> residual, int64_t norm,
                                   std::optional<Tensor> norm_weight,
                                   std::optional<Tensor> norm_bias, double norm_eps);

}  // namespace encdec::linear
