// torch's side of the gated bridge: check, allocate, launch.
#include "bridge/gated_bridge.h"
#include "core/torch_tensor.h"
#include "core/workspace.h"

namespace encdec::bridge {
namespace {

using OptionalTensor = std::optional<Tensor>;

const Kernels& chosen() {
  static const Kernels& k = kernels(chosen_isa());
  return k;
}

uint64_t fingerprint_of(const Tensor& gate_weight, const Tensor& context_weight) {
  return fingerprint(context_weight, fingerprint(gate_weight, 1));
}

Weight as_weight(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1), name,
                  " must be a CPU matrix with contiguous rows");
  return {format_of(t), data(t), t.stride(0), t.size(0), t.size(1)};
}

Tensor bridge_pack(Tensor gate_weight, Tensor context_weight, int64_t format) {
  STD_TORCH_CHECK(format >= 0 && format <= 3, "unknown weight format ", format);
  const Weight gate = as_weight(gate_weight, "gate_weight");
  const Weight candidate = as_weight(context_weight, "context_weight");
  const int64_t H = candidate.N, C = candidate.K;
  STD_TORCH_CHECK(H > 0 && C > 0 && gate.N == H && gate.K == H + C && gate.dtype == candidate.dtype,
                  "gate_weight must be (H, H + C) and context_weight (H, C), of one dtype");
  const Format f = static_cast<Format>(format);
  const int64_t bytes = chosen().packed_bytes(H, C, f);
  Tensor packed = empty_block(bytes);
  // Taken before: weights that change while they are packed must leave the block stale.
  const uint64_t before = fingerprint_of(gate_weight, context_weight);
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  chosen().pack(gate, candidate, f, threads, data(packed));
  collapse_to_huge_pages(data(packed), bytes);
  reinterpret_cast<PackedHeader*>(data(packed))->fingerprint = before;
  return packed;
}

// The new state, with `save` also g and u; nothing where the block was not made from the weights'
// present values.
std::vector<Tensor> bridge_forward(Tensor state, Tensor context, Tensor gate_weight,
                                   Tensor context_weight, Tensor packed, OptionalTensor bias,
                                   bool save) {
  const PackedHeader& h = *reinterpret_cast<const PackedHeader*>(data(packed));
  STD_TORCH_CHECK(packed.numel() >= static_cast<int64_t>(sizeof(PackedHeader)) &&
                      h.magic == PackedHeader::kMagic && h.isa == compiled_isa(chosen_isa()) &&
                      h.bytes <= packed.numel(),
                  "not the packed weights of a gated bridge of this instruction set");
  GatedBridge f{};
  f.H = h.H;
  f.C = h.C;
  if (context_weight.size(0) != f.H || context_weight.size(1) != f.C ||
      gate_weight.size(0) != f.H || gate_weight.size(1) != f.H + f.C ||
      h.fingerprint != fingerprint_of(gate_weight, context_weight)) {
    return {};
  }
  f.dtype = format_of(state);
  const int64_t bytes = element_bytes(f.dtype), dims = state.dim();
  STD_TORCH_CHECK(
      state.is_cpu() && state.is_contiguous() && dims > 0 && state.size(dims - 1) == f.H,
      "state must be a contiguous CPU tensor with ", f.H, " features");
  f.M = state.numel() / f.H;
  const auto checked = [&](const Tensor& t, int64_t numel, const char* name) {
    STD_TORCH_CHECK(
        t.is_cpu() && t.is_contiguous() && t.numel() == numel && format_of(t) == f.dtype, name,
        " must be a contiguous CPU tensor of ", numel, " elements of the state's dtype");
    return data(t);
  };
  f.context = checked(context, f.M * f.C, "context");
  if (bias) f.bias = checked(*bias, f.H, "gate_bias");
  f.packed = data(packed);
  f.state = data(state);
  f.state_stride = f.output_stride = f.H * bytes;
  f.context_stride = f.C * bytes;
  std::vector<int64_t> shape(static_cast<size_t>(dims));
  for (int64_t i = 0; i < dims; ++i) shape[static_cast<size_t>(i)] = state.size(i);
  std::vector<Tensor> results;
  for (int i = 0; i < (save ? 3 : 1); ++i) {
    results.push_back(empty(shape.data(), shape.size(), dtype_of(f.dtype)));
  }
  if (f.M == 0) return results;
  f.output = data(results[0]);
  if (save) {
    f.gate = data(results[1]);
    f.candidate = data(results[2]);
  }
  plan(f, h.format, static_cast<int>(torch::stable::get_num_threads()));
  const Workspace workspace(chosen().workspace(f));
  f.workspace = workspace.data();
  chosen().run(f);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(encdec_fast_cpu, m) {
  m.def("bridge_pack(Tensor gate_weight, Tensor context_weight, int weight_format) -> Tensor");
  m.def(
      "bridge_forward(Tensor state, Tensor context, Tensor gate_weight, Tensor context_weight, "
      "Tensor packed, Tensor? bias, bool save) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(encdec_fast_cpu, CPU, m) {
  m.impl("bridge_pack", TORCH_BOX(&bridge_pack));
  m.impl("bridge_forward", TORCH_BOX(&bridge_forward));
}

}  // namespace encdec::bridge
