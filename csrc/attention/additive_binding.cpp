// torch's side of additive attention: check, allocate, launch.
//
// Python has checked shapes and dtypes; what is checked again here is what a kernel would read or
// write out of bounds for.
#include "attention/additive.h"
#include "core/torch_tensor.h"
#include "core/workspace.h"

namespace encdec::attention {
namespace {

using OptionalTensor = std::optional<Tensor>;

// A tensor (B, rows, size) with contiguous rows.
Rows rows_of(const Tensor& t, int64_t B, int64_t rows, int64_t size, Format dtype,
             const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && format_of(t) == dtype && t.dim() == 3 && t.size(0) == B &&
                      t.size(1) == rows && t.size(2) == size && (size <= 1 || t.stride(2) == 1),
                  name, " must be a (", B, ", ", rows, ", ", size,
                  ") CPU tensor of the query's dtype with contiguous rows");
  const int64_t bytes = element_bytes(dtype);
  return {data(t), t.stride(0) * bytes, t.stride(1) * bytes};
}

void check_whole(const Tensor& t, int64_t numel, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.numel() == numel && t.scalar_type() == type,
                  name, " must be a contiguous CPU tensor of ", numel,
                  " elements of the right dtype");
}

Additive additive_of(const Tensor& query, const Tensor& keys, const Tensor& values,
                     const Tensor& score_weight, const OptionalTensor& coverage,
                     const OptionalTensor& coverage_weight, const OptionalTensor& lengths) {
  Additive f{};
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 3 && values.dim() == 3,
                  "query, keys and values must have 3 dimensions");
  f.dtype = format_of(query);
  AdditiveShape& s = f.shape;
  s = {query.size(0), query.size(1), keys.size(1), query.size(2), values.size(2)};
  STD_TORCH_CHECK(s.A > 0, "the attention size must not be 0");
  f.query = rows_of(query, s.B, s.Tq, s.A, f.dtype, "query");
  f.keys = rows_of(keys, s.B, s.S, s.A, f.dtype, "keys");
  f.values = rows_of(values, s.B, s.S, s.D, f.dtype, "values");
  const ScalarType type = query.scalar_type();
  check_whole(score_weight, s.A, type, "score_weight");
  f.score_weight = data(score_weight);
  STD_TORCH_CHECK(coverage.has_value() == coverage_weight.has_value(),
                  "coverage and its weight are given together");
  if (coverage) {
    check_whole(*coverage, s.B * s.S, type, "coverage");
    check_whole(*coverage_weight, s.A, type, "coverage_weight");
    f.coverage = data(*coverage);
    f.coverage_weight = data(*coverage_weight);
  }
  if (lengths) {
    check_whole(*lengths, s.B, ScalarType::Long, "memory_lengths");
    f.lengths = reinterpret_cast<const int64_t*>(data(*lengths));
    for (int64_t b = 0; b < s.B; ++b) {
      STD_TORCH_CHECK(f.lengths[b] >= 0 && f.lengths[b] <= s.S, "memory_lengths must be in [0, ",
                      s.S, "], got ", f.lengths[b]);
    }
  }
  plan(f, static_cast<int>(torch::stable::get_num_threads()));
  return f;
}

const AdditiveKernels& chosen() {
  static const AdditiveKernels& k = additive_kernels(chosen_isa());
  return k;
}

std::vector<Tensor> additive_forward(Tensor query, Tensor keys, Tensor values, Tensor score_weight,
                                     OptionalTensor coverage, OptionalTensor coverage_weight,
                                     OptionalTensor lengths, bool need_weights) {
  Additive f = additive_of(query, keys, values, score_weight, coverage, coverage_weight, lengths);
  const AdditiveShape& s = f.shape;
  std::vector<Tensor> result{empty<3>({s.B, s.Tq, s.D}, dtype_of(f.dtype))};
  f.context = rows_of(result[0], s.B, s.Tq, s.D, f.dtype, "context");
  if (need_weights) {
    result.push_back(empty<3>({s.B, s.Tq, s.S}, aoti_torch_dtype_float32()));
    f.weights = reinterpret_cast<float*>(data(result[1]));
  }
  const Workspace workspace(chosen().forward_workspace(f));
  f.workspace = workspace.data();
  chosen().forward(f);
  return result;
}

std::vector<Tensor> additive_backward(Tensor query, Tensor keys, Tensor values, Tensor score_weight,
                                      OptionalTensor coverage, OptionalTensor coverage_weight,
                                      OptionalTensor lengths, Tensor weights,
                                      OptionalTensor grad_context, OptionalTensor grad_weights) {
  AdditiveBackward b{};
  Additive& f = b.forward;
  f = additive_of(query, keys, values, score_weight, coverage, coverage_weight, lengths);
  const AdditiveShape& s = f.shape;
  check_whole(weights, s.B * s.Tq * s.S, ScalarType::Float, "weights");
  f.weights = reinterpret_cast<float*>(data(weights));
  if (grad_context) {
    b.grad_context = rows_of(*grad_context, s.B, s.Tq, s.D, f.dtype, "grad_context");
  }
  if (grad_weights) {
    check_whole(*grad_weights, s.B * s.Tq * s.S, ScalarType::Float, "grad_weights");
    b.grad_weights = reinterpret_cast<const float*>(data(*grad_weights));
  }
  const int32_t dtype = dtype_of(f.dtype);
  std::vector<Tensor> result{empty<3>({s.B, s.Tq, s.A}, dtype), empty<3>({s.B, s.S, s.A}, dtype),
                             empty<3>({s.B, s.S, s.D}, dtype),
                             empty<1>({s.A}, aoti_torch_dtype_float32())};
  b.grad_query = rows_of(result[0], s.B, s.Tq, s.A, f.dtype, "grad_query");
  b.grad_keys = rows_of(result[1], s.B, s.S, s.A, f.dtype, "grad_keys");
  b.grad_values = rows_of(result[2], s.B, s.S, s.D, f.dtype, "grad_values");
  b.grad_score_weight = reinterpret_cast<float*>(data(result[3]));
  const Workspace workspace(chosen().backward_workspace(b));
  b.workspace = workspace.data();
  chosen().backward(b);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(encdec_fast_cpu, m) {
  m.def(
      "additive_forward(Tensor query, Tensor keys, Tensor values, Tensor score_weight, "
      "Tensor? coverage, Tensor? coverage_weight, Tensor? lengths, bool need_weights) -> Tensor[]");
  m.def(
      "additive_backward(Tensor query, Tensor keys, Tensor values, Tensor score_weight, "
      "Tensor? coverage, Tensor? coverage_weight, Tensor? lengths, Tensor weights, "
      "Tensor? grad_context, Tensor? grad_weights) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(encdec_fast_cpu, CPU, m) {
  m.impl("additive_forward", TORCH_BOX(&additive_forward));
  m.impl("additive_backward", TORCH_BOX(&additive_backward));
}

}  // namespace encdec::attention
