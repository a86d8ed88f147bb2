// torch's side of the linear kernel: check, allocate, launch.
#include "linear/linear_binding.h"

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

}  // namespace

std::vector<Tensor> linear_forward(Tensor input, Tensor weight, Tensor packed, OptionalTensor bias,
                                   int64_t activation, OptionalTensor residual, int64_t norm,
                                   OptionalTensor norm_weight, OptionalTensor norm_bias,
                                   double norm_eps) {
  const PackedHeader& h = *reinterpret_cast<const PackedHeader*>(data(packed));
  STD_TORCH_CHECK(packed.numel() >= static_cast<int64_t>(sizeof(PackedHeader)) &&
                      h.magic == PackedHeader::kMagic && h.isa == compiled_isa(chosen_isa()) &&
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

namespace {

// A matrix with contiguous rows, of any leading sizes.
void check_rows(const Tensor& t, int64_t size, Format dtype, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.dim() > 0 && t.size(t.dim() - 1) == size &&
                      format_of(t) == dtype,
                  name, " must be a contiguous CPU tensor with ", size,
                  " features and the weight's dtype");
}

Weight weight_of(const Tensor& weight) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.size(0) > 0 &&
                      weight.size(1) > 0 && (weight.size(1) <= 1 || weight.stride(1) == 1),
                  "the weight must be a CPU matrix with contiguous rows, not empty");
  return {format_of(weight), data(weight), weight.stride(0), weight.size(0), weight.size(1)};
}

// Forward in training: the weight will have changed by the next call, and is packed for this one.
Tensor linear_product(Tensor input, Tensor weight, OptionalTensor bias) {
  const Weight w = weight_of(weight);
  check_rows(input, w.K, w.dtype, "input");
  if (bias) check_rows(*bias, w.N, w.dtype, "bias");
  Linear f{};
  f.dtype = w.dtype;
  f.M = input.numel() / w.K;
  f.N = w.N;
  f.K = w.K;
  std::vector<int64_t> shape(static_cast<size_t>(input.dim()));
  for (int64_t i = 0; i < input.dim(); ++i) shape[static_cast<size_t>(i)] = input.size(i);
  shape.back() = f.N;
  Tensor result = empty(shape.data(), shape.size(), dtype_of(f.dtype));
  if (f.M == 0) return result;
  const int64_t bytes = element_bytes(f.dtype);
  const int available = static_cast<int>(torch::stable::get_num_threads());
  f.input = data(input);
  f.input_stride = f.K * bytes;
  f.bias = data(bias);
  f.output = data(result);
  f.output_stride = f.N * bytes;
  plan(f, f.dtype, available);
  const int64_t packed = round_up(chosen().packed_bytes(f.N, f.K, f.dtype), 64);
  // The workspace's size is read off the packed weight's header, which is not there yet.
  const Workspace block(packed);
  chosen().pack(w, f.dtype, available, block.data());
  f.packed = block.data();
  const Tensor scratch = empty_block(chosen().workspace(f) + 64);
  f.workspace = data(scratch) + (-reinterpret_cast<intptr_t>(data(scratch)) & 63);
  chosen().run(f);
  return result;
}

// The gradients of input, weight and bias, each empty where it is not wanted.
std::vector<Tensor> linear_backward(Tensor grad, Tensor input, Tensor weight, bool of_input,
                                    bool of_weight, bool of_bias) {
  LinearBackward f{};
  f.weight = weight_of(weight);
  f.N = f.weight.N;
  f.K = f.weight.K;
  STD_TORCH_CHECK(f.weight.dtype == Format::kFloat32, "there is a backward in float32 only");
  check_rows(grad, f.N, Format::kFloat32, "grad");
  check_rows(input, f.K, Format::kFloat32, "input");
  f.M = input.numel() / f.K;
  STD_TORCH_CHECK(f.M > 0 && grad.numel() == f.M * f.N, "grad must have the input's ", f.M,
                  " rows, and there must be one");
  const int64_t bytes = element_bytes(Format::kFloat32);
  const int32_t dtype = aoti_torch_dtype_float32();
  std::vector<int64_t> shape(static_cast<size_t>(input.dim()));
  for (int64_t i = 0; i < input.dim(); ++i) shape[static_cast<size_t>(i)] = input.size(i);
  std::vector<Tensor> result;
  result.push_back(of_input ? empty(shape.data(), shape.size(), dtype) : empty<1>({0}, dtype));
  result.push_back(of_weight ? empty<2>({f.N, f.K}, dtype) : empty<1>({0}, dtype));
  result.push_back(empty<1>({of_bias ? f.N : 0}, dtype));
  f.grad = data(grad);
  f.grad_stride = f.N * bytes;
  f.input = data(input);
  f.input_stride = f.K * bytes;
  if (of_input) f.grad_input = data(result[0]);
  if (of_weight) f.grad_weight = data(result[1]);
  if (of_bias) f.grad_bias = data(result[2]);
  plan(f, static_cast<int>(torch::stable::get_num_threads()));
  const Workspace workspace(chosen().backward_workspace(f));
  f.workspace = workspace.data();
  chosen().backward(f);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(encdec_fast_cpu, m) {
  m.def("linear_pack(Tensor weight, int weight_format) -> Tensor");
  m.def("linear_product(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "linear_backward(Tensor grad, Tensor input, Tensor weight, bool of_input, bool of_weight, "
      "bool of_bias) -> Tensor[]");
  m.def(
      "linear_forward(Tensor input, Tensor weight, Tensor packed, Tensor? bias, int activation, "
      "Tensor? residual, int norm, Tensor? norm_weight, Tensor? norm_bias, float norm_eps) "
      "-> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(encdec_fast_cpu, CPU, m) {
  m.impl("linear_pack", TORCH_BOX(&linear_pack));
  m.impl("linear_product", TORCH_BOX(&linear_product));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
}

}  // namespace encdec::linear
