// torch's side of scaled dot-product attention: check, allocate, launch.
#include "attention/attention_binding.h"

#include <algorithm>

#include "attention/attention.h"
#include "core/torch_tensor.h"
#include "core/workspace.h"

namespace encdec::attention {
namespace {

using OptionalTensor = std::optional<Tensor>;

// A tensor (B, heads, rows, size) with contiguous rows.
Heads heads_of(const Tensor& t, int64_t B, int64_t heads, int64_t rows, int64_t size, Format dtype,
               const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4 && format_of(t) == dtype && t.size(0) == B &&
                      t.size(1) == heads && t.size(2) == rows && t.size(3) == size &&
                      (size <= 1 || t.stride(3) == 1),
                  name, " must be a (", B, ", ", heads, ", ", rows, ", ", size,
                  ") CPU tensor of the query's dtype with contiguous rows");
  const int64_t bytes = element_bytes(dtype);
  return {data(t), t.stride(0) * bytes, t.stride(1) * bytes, t.stride(2) * bytes};
}

// A new tensor (B, heads, rows, size) in which heads lie side by side in the features, as the
// projection that follows reads them.
Tensor new_heads(int64_t B, int64_t heads, int64_t rows, int64_t size, Format dtype) {
  const int64_t row = std::max<int64_t>(1, heads) * std::max<int64_t>(1, size);
  return empty_strided<4>({B, heads, rows, size},
                          {std::max<int64_t>(1, rows) * row, std::max<int64_t>(1, size), row, 1},
                          dtype_of(dtype));
}

// A tensor (B or 1, H or 1, Tq or 1, S or 1), spread over what it lacks.
ScoreTensor spread(const OptionalTensor& t, const Attention& f, ScalarType type, int64_t bytes,
                   const char* name) {
  if (!t) return {};
  const int64_t sizes[] = {f.B, f.H, f.Tq, f.S};
  int64_t strides[4] = {};
  bool good = t->is_cpu() && t->dim() == 4 && t->scalar_type() == type;
  for (int64_t i = 0; good && i < 4; ++i) {
    good = t->size(i) == sizes[i] || t->size(i) == 1;
    strides[i] = t->size(i) == 1 ? 0 : t->stride(i) * bytes;
  }
  STD_TORCH_CHECK(good, name, " must broadcast to (", f.B, ", ", f.H, ", ", f.Tq, ", ", f.S,
                  ") and have the right dtype");
  return {data(*t), strides[0], strides[1], strides[2], strides[3]};
}

const AttentionKernels& chosen() {
  static const AttentionKernels& k = attention_kernels(chosen_isa());
  return k;
}

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// A call's inputs, checked; the plan and the results are still to come.
Attention inputs_of(const Tensor& query, const Tensor& key, const Tensor& value,
                    const OptionalTensor& bias, const OptionalTensor& lengths,
                    const OptionalTensor& mask, const OptionalTensor& seed, bool causal,
                    double scale, double dropout, bool average) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                  "query, key and value must have 4 dimensions");
  Attention f{};
  f.dtype = format_of(query);
  f.B = query.size(0);
  f.H = query.size(1);
  f.Tq = query.size(2);
  f.D = query.size(3);
  f.G = key.size(1);
  f.S = key.size(2);
  f.V = value.size(3);
  STD_TORCH_CHECK(f.G > 0 && f.H % f.G == 0, "the ", f.H, " query heads must be a multiple of the ",
                  f.G, " key heads");
  f.query = heads_of(query, f.B, f.H, f.Tq, f.D, f.dtype, "query");
  f.key = heads_of(key, f.B, f.G, f.S, f.D, f.dtype, "key");
  f.value = heads_of(value, f.B, f.G, f.S, f.V, f.dtype, "value");
  if (lengths) {
    STD_TORCH_CHECK(lengths->is_cpu() && lengths->is_contiguous() && lengths->numel() == f.B &&
                        lengths->scalar_type() == ScalarType::Long,
                    "memory_lengths must be ", f.B, " int64 on the CPU");
    f.lengths = reinterpret_cast<const int64_t*>(data(*lengths));
    for (int64_t b = 0; b < f.B; ++b) {
      STD_TORCH_CHECK(f.lengths[b] >= 0 && f.lengths[b] <= f.S, "memory_lengths must be in [0, ",
                      f.S, "], got ", f.lengths[b]);
    }
  }
  f.mask = spread(mask, f, ScalarType::Bool, 1, "mask");
  f.bias = spread(bias, f, query.scalar_type(), element_bytes(f.dtype), "bias");
  f.causal = causal;
  f.scale = static_cast<float>(scale);
  f.average = average;
  f.dropout = dropout;
  STD_TORCH_CHECK(dropout >= 0.0 && dropout <= 1.0, "dropout_p must be in [0, 1], got ", dropout);
  if (dropout > 0.0) {
    STD_TORCH_CHECK(
        seed && seed->is_cpu() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
        "dropout needs a seed: one int64 on the CPU");
    f.seed = *reinterpret_cast<const uint64_t*>(data(*seed));
  }
  return f;
}

void launch(Attention& f) {
  if (f.B == 0 || f.H == 0 || f.Tq == 0 || (f.V == 0 && !f.weights)) return;
  plan(f, threads());
  const Workspace workspace(chosen().workspace(f));
  f.workspace = workspace.data();
  chosen().run(f);
}

}  // namespace

std::vector<Tensor> attention_forward(Tensor query, Tensor key, Tensor value, OptionalTensor bias,
                                      OptionalTensor lengths, OptionalTensor mask,
                                      OptionalTensor seed, bool causal, double scale,
                                      double dropout, bool average, bool need_weights) {
  Attention f = inputs_of(query, key, value, bias, lengths, mask, seed, causal, scale, dropout,
                          average && need_weights);
  std::vector<Tensor> result{new_heads(f.B, f.H, f.Tq, f.V, f.dtype)};
  f.output = heads_of(result[0], f.B, f.H, f.Tq, f.V, f.dtype, "output");
  if (need_weights) {
    result.push_back(f.average ? empty<3>({f.B, f.Tq, f.S}, aoti_torch_dtype_float32())
                               : empty<4>({f.B, f.H, f.Tq, f.S}, aoti_torch_dtype_float32()));
    f.weights = reinterpret_cast<float*>(data(result[1]));
  }
  launch(f);
  return result;
}

namespace {

std::vector<Tensor> attention_backward(OptionalTensor grad_output, OptionalTensor grad_weights,
                                       Tensor query, Tensor key, Tensor value, OptionalTensor bias,
                                       OptionalTensor lengths, OptionalTensor mask,
                                       OptionalTensor seed, bool causal, double scale,
                                       double dropout, bool average, bool need_bias) {
  AttentionBackward call;
  call.forward = inputs_of(query, key, value, bias, lengths, mask, seed, causal, scale, dropout,
                           average && grad_weights);
  Attention& f = call.forward;
  if (grad_output) {
    call.grad_output = heads_of(*grad_output, f.B, f.H, f.Tq, f.V, f.dtype, "grad_output");
  }
  if (grad_weights) {
    const int64_t rows = f.B * (f.average ? 1 : f.H) * f.Tq;
    STD_TORCH_CHECK(grad_weights->is_cpu() && grad_weights->scalar_type() == ScalarType::Float &&
                        grad_weights->is_contiguous() && grad_weights->numel() == rows * f.S,
                    "grad_weights must be contiguous float32 of the weights' size");
    call.grad_weights = reinterpret_cast<const float*>(data(*grad_weights));
  }
  std::vector<Tensor> result{new_heads(f.B, f.H, f.Tq, f.D, f.dtype),
                             new_heads(f.B, f.G, f.S, f.D, f.dtype),
                             new_heads(f.B, f.G, f.S, f.V, f.dtype)};
  call.grad_query = heads_of(result[0], f.B, f.H, f.Tq, f.D, f.dtype, "grad_query");
  call.grad_key = heads_of(result[1], f.B, f.G, f.S, f.D, f.dtype, "grad_key");
  call.grad_value = heads_of(result[2], f.B, f.G, f.S, f.V, f.dtype, "grad_value");
  if (need_bias) {
    STD_TORCH_CHECK(bias.has_value(), "there is no bias to have a gradient");
    const std::array<int64_t, 4> sizes{bias->size(0), bias->size(1), bias->size(2), bias->size(3)};
    result.push_back(empty<4>(sizes, aoti_torch_dtype_float32()));
    call.grad_bias = reinterpret_cast<float*>(data(result[3]));
    call.grad_bias_size = result[3].numel();
    const auto stride = [&](int64_t i) { return sizes[size_t(i)] == 1 ? 0 : result[3].stride(i); };
    call.bias_batch = stride(0);
    call.bias_head = stride(1);
    call.bias_row = stride(2);
    call.bias_key = stride(3);
  }
  plan_backward(f, threads());
  const Workspace workspace(chosen().backward_workspace(call));
  call.workspace = workspace.data();
  chosen().backward(call);
  return result;
}

// Where each of B sentences starts among `rows` rows; the longest has *longest.
const int64_t* starts_of(const Tensor& offsets, int64_t rows, int64_t* longest, const char* name) {
  STD_TORCH_CHECK(offsets.is_cpu() && offsets.dim() == 1 && offsets.is_contiguous() &&
                      offsets.numel() > 0 && offsets.scalar_type() == ScalarType::Long,
                  name, " must be B + 1 int64 on the CPU");
  const int64_t* const at = reinterpret_cast<const int64_t*>(data(offsets));
  const int64_t B = offsets.numel() - 1;
  bool good = at[0] == 0 && at[B] == rows;
  *longest = 0;
  for (int64_t b = 0; good && b < B; ++b) {
    const int64_t own = at[b + 1] - at[b];
    good = own >= 0;
    *longest = own > *longest ? own : *longest;
  }
  STD_TORCH_CHECK(good, name, " must go from 0 to ", rows, " without decreasing");
  return at;
}

// Rows (N, heads, size) of sentences one behind the other.
Heads varlen_of(const Tensor& t, int64_t heads, int64_t size, Format dtype, const int64_t* starts,
                const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 3 && format_of(t) == dtype && t.size(1) == heads &&
                      t.size(2) == size && (size <= 1 || t.stride(2) == 1),
                  name, " must be a (rows, ", heads, ", ", size,
                  ") CPU tensor of the query's dtype with contiguous rows");
  const int64_t bytes = element_bytes(dtype);
  return {data(t), 0, t.stride(1) * bytes, t.stride(0) * bytes, starts};
}

}  // namespace

Tensor varlen_attention(Tensor query, Tensor key, Tensor value, Tensor query_offsets,
                        Tensor memory_offsets, bool causal, double scale) {
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3,
                  "query, key and value must have 3 dimensions");
  Attention f{};
  f.dtype = format_of(query);
  f.H = query.size(1);
  f.D = query.size(2);
  f.G = key.size(1);
  f.V = value.size(2);
  STD_TORCH_CHECK(f.G > 0 && f.H % f.G == 0, "the ", f.H, " query heads must be a multiple of the ",
                  f.G, " key heads");
  STD_TORCH_CHECK(query_offsets.numel() == memory_offsets.numel() && key.size(0) == value.size(0),
                  "query and memory must have the same number of sentences, key and value of rows");
  const int64_t* queries = starts_of(query_offsets, query.size(0), &f.Tq, "query_offsets");
  const int64_t* memory = starts_of(memory_offsets, key.size(0), &f.S, "memory_offsets");
  f.B = query_offsets.numel() - 1;
  f.query = varlen_of(query, f.H, f.D, f.dtype, queries, "query");
  f.key = varlen_of(key, f.G, f.D, f.dtype, memory, "key");
  f.value = varlen_of(value, f.G, f.V, f.dtype, memory, "value");
  f.causal = causal;
  f.scale = static_cast<float>(scale);
  Tensor result = empty<3>({query.size(0), f.H, f.V}, dtype_of(f.dtype));
  f.output = varlen_of(result, f.H, f.V, f.dtype, queries, "output");
  launch(f);
  return result;
}

STABLE_TORCH_LIBRARY_FRAGMENT(encdec_fast_cpu, m) {
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? lengths, "
      "Tensor? mask, Tensor? seed, bool causal, float scale, float dropout, bool average, "
      "bool need_weights) -> Tensor[]");
  m.def(
      "attention_backward(Tensor? grad_output, Tensor? grad_weights, Tensor query, Tensor key, "
      "Tensor value, Tensor? bias, Tensor? lengths, Tensor? mask, Tensor? seed, bool causal, "
      "float scale, float dropout, bool average, bool need_bias) -> Tensor[]");
  m.def(
      "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor query_offsets, "
      "Tensor memory_offsets, bool causal, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(encdec_fast_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention));
}

}  // namespace encdec::attention
