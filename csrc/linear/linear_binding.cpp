// torch's side of the linear kernel: check, allocate, launch.
#include "core/torch_tensor.h"
#include "core/workspace.h"
#include "linear/linear.h"

namespace encdec::linear {
namespace {

using OptionalTensor = std::optional<Tensor>;

const Kernels& chosen() {
  static const Kernels& k = kernels(chosen_isa());
  return k;
}

Tensor linear_pack(Tensor weight, int64_t format) {
  STD_TORCH_CHECK(format >= 0 && format <= 3, "unknown weight format ", format);
  STD_TORCH_CHECK(
      weight.is_cpu() && weight.dim() == 2 && (weight.size(1) <= 1 || weight.stride(1) == 1),
      "the weight must be a CPU matrix with contiguous rows");
  const Weight w{format_of(weight), data(weight), weight.stride(0), weight.size(0), weight.size(1)};
  STD_TORCH_CHECK(w.N > 0 && w.K > 0, "the weight must not be empty");
  const Format f = static_cast<Format>(format);
  const int64_t bytes = chosen().packed_bytes(w.N, w.K, f);
  Tensor packed = empty_block(bytes);
  // Taken before: a weight that changes while it is packed must leave the block stale.
  const uint64_t before = fingerprint(weight, 1);
  chosen().pack(w, f, static_cast<int>(torch::stable::get_num_threads()), data(packed));
  collapse_to_huge_pages(data(packed), bytes);
  reinterpret_cast<PackedHeader*>(data(packed))->fingerprint = before;
  return packed;
}

// The result, or nothing where the block was not made from the weight's present values.
std::vector<Tensor> linear_forward(Tensor input, Tensor weight, Tensor packed, OptionalTensor bias,
                                   int64_t activation, OptionalTensor residual, int64_t norm,
                                   OptionalTensor norm_weight, OptionalTensor norm_bias,
                                   double norm_eps) {
  const PackedHeader& h = *reinterpret_cast<const PackedHeader*>(data(packed));
  STD_TORCH_CHECK(packed.numel() >= static_cast<int64_t>(sizeof(PackedHeader)) &&
                      h.magic == PackedHeader::kMagic && h.isa == chosen_isa() &&
                      h.bytes <= packed.numel(),
                  "not a packed linear weight of this instruction set");
  if (h.N != weight.size(0) || h.K != weight.size(1) || h.fingerprint != fingerprint(weight, 1)) {
    return {};
  }
  Linear f{};
  f.dtype = format_of(input);
  f.N = h.N;
  f.K = h.K;
  const int64_t bytes = element_bytes(f.dtype), dims = input.dim();
  STD_TORCH_CHECK(
      input.is_cpu() && input.is_contiguous() && dims > 0 && input.size(dims - 1) == f.K,
      "input must be a contiguous CPU tensor with ", f.K, " features");
  f.M = input.numel() / f.K;
  std::vector<int64_t> shape(static_cast<size_t>(dims));
  for (int64_t i = 0; i < dims; ++i) shape[static_cast<size_t>(i)] = input.size(i);
  shape.back() = f.N;
  const auto checked = [&](const OptionalTensor& t, int64_t numel, const char* name) {
    if (!t) return static_cast<const char*>(nullptr);
    STD_TORCH_CHECK(
        t->is_cpu() && t->is_contiguous() && t->numel() == numel && format_of(*t) == f.dtype, name,
        " must be a contiguous CPU tensor of ", numel, " elements of the input's dtype");
    return static_cast<const char*>(data(*t));
  };
  f.bias = checked(bias, f.N, "bias");
  f.residual = checked(residual, f.M * f.N, "residual");
  f.norm_weight = checked(norm_weight, f.N, "norm_weight");
  f.norm_bias = checked(norm_bias, f.N, "norm_bias");
  STD_TORCH_CHECK(activation >= 0 && activation <= 4 && norm >= 0 && norm <= 2,
                  "unknown activation ", activation, " or norm ", norm);
  f.activation = static_cast<Activation>(activation);
  f.norm = static_cast<Norm>(norm);
  f.norm_eps = static_cast<float>(norm_eps);
  f.packed = data(packed);
  f.input = data(input);
  f.input_stride = f.K * bytes;
  f.residual_stride = f.output_stride = f.N * bytes;
  std::vector<Tensor> result{empty(shape.data(), shape.size(), dtype_of(f.dtype))};
  f.output = data(result[0]);
  if (f.M == 0) return result;
  plan(f, h.format, static_cast<int>(torch::stable::get_num_threads()));
  const Workspace workspace(chosen().workspace(f));
  f.workspace = workspace.data();
  chosen().run(f);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(encdec_fast_cpu, m) {
  m.def("linear_pack(Tensor weight, int weight_format) -> Tensor");
  m.def(
      "linear_forward(Tensor input, Tensor weight, Tensor packed, Tensor? bias, int activation, "
      "Tensor? residual, int norm, Tensor? norm_weight, Tensor? norm_bias, float norm_eps) "
      "-> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(encdec_fast_cpu, CPU, m) {
  m.impl("linear_pack", TORCH_BOX(&linear_pack));
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
}

}  // namespace encdec::linear
