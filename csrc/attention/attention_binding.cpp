// torch's side of scaled dot-product attention: check, allocate, launch.
#include "attention/attention.h"
#include "core/torch_tensor.h"
#include "core/workspace.h"

namespace encdec::attention {
namespace {

using OptionalTensor = std::optional<Tensor>;

// A tensor (B, heads, rows, size) with contiguous rows.
Heads heads_of(const Tensor& t, int64_t B, int64_t heads, int64_t rows, int64_t size, Format dtype,
               const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && format_of(t) == dtype && t.dim() == 4 && t.size(0) == B &&
                      t.size(1) == heads && t.size(2) == rows && t.size(3) == size &&
                      (size <= 1 || t.stride(3) == 1),
                  name, " must be a (", B, ", ", heads, ", ", rows, ", ", size,
                  ") CPU tensor of the query's dtype with contiguous rows");
  const int64_t bytes = element_bytes(dtype);
  return {data(t), t.stride(0) * bytes, t.stride(1) * bytes, t.stride(2) * bytes};
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

std::vector<Tensor> attention_forward(Tensor query, Tensor key, Tensor value,
                                      OptionalTensor lengths, OptionalTensor mask,
                                      OptionalTensor bias, bool causal, double scale,
                                      bool need_weights) {
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
  // Heads lie side by side in the features, as the projection that follows reads them.
  const Tensor rows = empty<4>({f.B, f.Tq, f.H, f.V}, dtype_of(f.dtype));
  std::vector<Tensor> result{torch::stable::transpose(rows, 1, 2)};
  f.output = heads_of(result[0], f.B, f.H, f.Tq, f.V, f.dtype, "output");
  if (need_weights) {
    result.push_back(empty<4>({f.B, f.H, f.Tq, f.S}, aoti_torch_dtype_float32()));
    f.weights = reinterpret_cast<float*>(data(result[1]));
  }
  if (f.B == 0 || f.H == 0 || f.Tq == 0 || f.V == 0) return result;
  plan(f, static_cast<int>(torch::stable::get_num_threads()));
  const Workspace workspace(chosen().workspace(f));
  f.workspace = workspace.data();
  chosen().run(f);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(encdec_fast_cpu, m) {
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? lengths, Tensor? mask, "
      "Tensor? bias, bool causal, float scale, bool need_weights) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(encdec_fast_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
}

}  // namespace encdec::attention
