// Attention in inference for bindings that go on with its result.
#pragma once

#include <optional>
#include <vector>

#include "core/torch_tensor.h"

namespace encdec::attention {

// The output (B, H, Tq, V), whose heads lie side by side in the features, and with need_weights the
// weights.
std::vector<Tensor> attention_forward(Tensor query, Tensor key, Tensor value,
                                      std::optional<Tensor> bias, std::optional<Tensor> lengths,
                                      std::optional<Tensor> mask, std::optional<Tensor> seed,
                                      bool causal, double scale, double dropout, bool average,
                                      bool need_weights);

// Sentences of unequal lengths one behind the other: (rows, heads, size).
Tensor varlen_attention(Tensor query, Tensor key, Tensor value, Tensor query_offsets,
                        Tensor memory_offsets, bool causal, double scale);

}  // namespace encdec::attention
