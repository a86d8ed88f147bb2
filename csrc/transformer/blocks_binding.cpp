// The blocks of a Transformer layer in inference, each in one call: the products and the attention
// of their own bindings one after the other, without the way through Python between them.
//
// A block that anything can be said against comes back empty: its parts, called one by one, know
// what to say.
#include <cmath>

#include "attention/attention_binding.h"
#include "linear/linear.h"
#include "linear/linear_binding.h"

namespace encdec::transformer {
namespace {

using OptionalTensor = std::optional<Tensor>;
using attention::attention_forward;
using attention::varlen_attention;
using linear::linear_forward;

constexpr auto kNoActivation = static_cast<int64_t>(linear::Activation::kNone);
constexpr auto kNoNorm = static_cast<int64_t>(linear::Norm::kNone);
constexpr auto kLayerNorm = static_cast<int64_t>(linear::Norm::kLayer);

bool usable(const Tensor& t, const Tensor& like) {
  return t.is_cpu() && t.is_contiguous() && t.scalar_type() == like.scalar_type();
}

bool is_vector(const OptionalTensor& t, int64_t size, const Tensor& like) {
  return !t || (usable(*t, like) && t->dim() == 1 && t->size(0) == size);
}

bool is_weight(const Tensor& weight, const OptionalTensor& bias, int64_t N, int64_t K,
               const Tensor& like) {
  return weight.is_cpu() && weight.scalar_type() == like.scalar_type() && weight.dim() == 2 &&
         weight.size(0) == N && weight.size(1) == K && is_vector(bias, N, like);
}

// Rows of `size` features, and a residual and a norm that fit them.
bool is_input(const Tensor& input, int64_t size, const Tensor& residual,
              const OptionalTensor& norm_weight, const OptionalTensor& norm_bias) {
  return input.numel() > 0 && usable(input, input) && input.size(input.dim() - 1) == size &&
         usable(residual, input) && residual.numel() == input.numel() &&
         is_vector(norm_weight, size, input) && is_vector(norm_bias, size, input);
}

// Goes with the scores (B, heads, T, T): each size is theirs, or 1.
bool is_spread(const OptionalTensor& t, const std::array<int64_t, 4>& sizes, ScalarType type) {
  if (!t) return true;
  bool good = t->is_cpu() && t->scalar_type() == type && t->dim() == 4;
  for (int64_t i = 0; good && i < 4; ++i) {
    good = t->size(i) == 1 || t->size(i) == sizes[static_cast<size_t>(i)];
  }
  return good;
}

template <size_t n>
Tensor view(const Tensor& t, const std::array<int64_t, n>& sizes,
            const std::array<int64_t, n>& strides, int64_t offset = 0) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      t.get(), static_cast<int64_t>(n), sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

// Self-attention of `heads` heads over queries, keys and values that lie side by side (.., 3 E).
Tensor attend(const Tensor& rows, int64_t heads, const OptionalTensor& offsets,
              const OptionalTensor& mask, const OptionalTensor& bias, bool causal) {
  const int64_t row = rows.size(rows.dim() - 1), E = row / 3, D = E / heads;
  const double scale = 1.0 / std::sqrt(static_cast<double>(D));
  if (offsets) {
    const int64_t N = rows.size(0);
    const auto part = [&](int64_t i) { return view<3>(rows, {N, heads, D}, {row, D, 1}, i * E); };
    const Tensor found =
        varlen_attention(part(0), part(1), part(2), *offsets, *offsets, causal, scale);
    return view<2>(found, {N, E}, {E, 1});
  }
  const int64_t B = rows.size(0), T = rows.size(1);
  const auto part = [&](int64_t i) {
    return view<4>(rows, {B, heads, T, D}, {T * row, D, row, 1}, i * E);
  };
  const Tensor found = attention_forward(part(0), part(1), part(2), bias, std::nullopt, mask,
                                         std::nullopt, causal, scale, 0.0, false, false)[0];
  return view<3>(found, {B, T, E}, {T * E, E, 1});
}

// norm(residual + attention(input)): input (B, T, E), or (N, E) with the offsets of its sentences;
// in_weight (3 E, E) projects it to queries, keys and values.
std::vector<Tensor> self_attention_block(Tensor input, Tensor residual, Tensor in_weight,
                                         OptionalTensor in_bias, Tensor in_packed,
                                         Tensor out_weight, OptionalTensor out_bias,
                                         Tensor out_packed, OptionalTensor norm_weight,
                                         OptionalTensor norm_bias, double norm_eps, bool norm,
                                         int64_t heads, OptionalTensor offsets, OptionalTensor mask,
                                         OptionalTensor bias, bool causal) {
  const int64_t E = out_weight.dim() == 2 ? out_weight.size(0) : 0;
  if (input.dim() != (offsets ? 2 : 3) || heads < 1 || E % heads != 0 ||
      !is_input(input, E, residual, norm_weight, norm_bias) ||
      !is_weight(in_weight, in_bias, 3 * E, E, input) ||
      !is_weight(out_weight, out_bias, E, E, input)) {
    return {};
  }
  if (!offsets) {
    const std::array<int64_t, 4> scores{input.size(0), heads, input.size(1), input.size(1)};
    if (!is_spread(mask, scores, ScalarType::Bool) ||
        !is_spread(bias, scores, input.scalar_type())) {
      return {};
    }
  }
  const std::vector<Tensor> projected =
      linear_forward(input, in_weight, in_packed, in_bias, kNoActivation, std::nullopt, kNoNorm,
                     std::nullopt, std::nullopt, 0.0);
  if (projected.empty()) return {};
  const Tensor context = attend(projected[0], heads, offsets, mask, bias, causal);
  return linear_forward(context, out_weight, out_packed, out_bias, kNoActivation, residual,
                        norm ? kLayerNorm : kNoNorm, norm_weight, norm_bias, norm_eps);
}

// norm(residual + linear2(activation(linear1(input)))).
std::vector<Tensor> feed_forward_block(Tensor input, Tensor residual, Tensor weight1,
                                       OptionalTensor bias1, Tensor packed1, Tensor weight2,
                                       OptionalTensor bias2, Tensor packed2, int64_t activation,
                                       OptionalTensor norm_weight, OptionalTensor norm_bias,
                                       double norm_eps, bool norm) {
  const bool matrices = weight1.dim() == 2 && weight2.dim() == 2 && input.dim() > 0;
  const int64_t E = matrices ? weight2.size(0) : 0, F = matrices ? weight1.size(0) : 0;
  if (!matrices || !is_input(input, E, residual, norm_weight, norm_bias) ||
      !is_weight(weight1, bias1, F, E, input) || !is_weight(weight2, bias2, E, F, input)) {
    return {};
  }
  const std::vector<Tensor> hidden =
      linear_forward(input, weight1, packed1, bias1, activation, std::nullopt, kNoNorm,
                     std::nullopt, std::nullopt, 0.0);
  if (hidden.empty()) return {};
  return linear_forward(hidden[0], weight2, packed2, bias2, kNoActivation, residual,
                        norm ? kLayerNorm : kNoNorm, norm_weight, norm_bias, norm_eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(encdec_fast_cpu, m) {
  m.def(
      "self_attention_block(Tensor input, Tensor residual, Tensor in_weight, Tensor? in_bias, "
      "Tensor in_packed, Tensor out_weight, Tensor? out_bias, Tensor out_packed, "
      "Tensor? norm_weight, Tensor? norm_bias, float norm_eps, bool norm, int heads, "
      "Tensor? offsets, Tensor? mask, Tensor? bias, bool causal) -> Tensor[]");
  m.def(
      "feed_forward_block(Tensor input, Tensor residual, Tensor weight1, Tensor? bias1, "
      "Tensor packed1, Tensor weight2, Tensor? bias2, Tensor packed2, int activation, "
      "Tensor? norm_weight, Tensor? norm_bias, float norm_eps, bool norm) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(encdec_fast_cpu, CPU, m) {
  m.impl("self_attention_block", TORCH_BOX(&self_attention_block));
  m.impl("feed_forward_block", TORCH_BOX(&feed_forward_block));
}

}  // namespace encdec::transformer
