// torch's side of the decode step for GPUs: check, launch. What calls it is
// encdec_fast/generation/device/decode_step.py.
#include "core/cuda_tensor.h"
#include "generation/decode_step_gpu.h"

namespace encdec::generation::gpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

// One of the tensors of the step's dtype; an empty one where there is none.
const void* of(const Tensor& t, const Tensor& like, int64_t numel, const char* name) {
  if (t.numel() == 0) return nullptr;
  check_device_tensor(t, like, like.scalar_type(), numel, name);
  if (t.dim() == 2) check_aligned(t, name);  // a matrix, whose rows are read by sixteen bytes
  return t.data_ptr();
}

const void* of(const OptionalTensor& t, const Tensor& like, int64_t numel, const char* name) {
  return t ? of(*t, like, numel, name) : nullptr;
}

void* to(const Tensor& t, const Tensor& like, ScalarType type, int64_t numel, const char* name) {
  check_device_tensor(t, like, type, numel, name);
  return t.data_ptr();
}

}  // namespace

void checked_decode_step(int64_t cell, int64_t attention, bool context_in_output, int64_t K,
                         Tensor tokens, Tensor parents, Tensor embedding,
                         std::vector<Tensor> layers, OptionalTensor query,
                         OptionalTensor query_bias, OptionalTensor score, OptionalTensor keys,
                         OptionalTensor values, OptionalTensor lengths, Tensor output,
                         OptionalTensor output_bias, Tensor h, OptionalTensor c, Tensor context,
                         Tensor logits, OptionalTensor weights, Tensor arrived,
                         Tensor between_blocks, int64_t blocks, int64_t shared) {
  STD_TORCH_CHECK(cell == 0 || cell == 1, "the decode step has LSTM and GRU only");
  STD_TORCH_CHECK(attention >= 0 && attention <= 2, "unknown attention ", attention);
  STD_TORCH_CHECK(h.dim() == 3 && context.dim() == 2 && embedding.dim() == 2 && output.dim() == 2,
                  "h must be (layers, R, H), context (R, M), embedding (V, E), output (V, inputs)");
  STD_TORCH_CHECK(layers.size() == static_cast<size_t>(4 * h.size(0)) && h.size(0) <= kMaxLayers &&
                      h.size(0) >= 1,
                  "a layer has four tensors, and there are at most ", kMaxLayers);
  DecodeStep s{};
  s.cell = static_cast<rnn::Cell>(cell);
  s.attention = static_cast<Attention>(attention);
  s.context_in_output = context_in_output;
  const auto size = [](int64_t n) {
    STD_TORCH_CHECK(n < (int64_t{1} << 31), "a size is beyond 32 bits");
    return static_cast<int32_t>(n);
  };
  s.layers = size(h.size(0)), s.R = size(h.size(1)), s.H = size(h.size(2));
  s.K = size(K), s.E = size(embedding.size(1)), s.M = size(context.size(1));
  s.V = size(output.size(0));
  STD_TORCH_CHECK(K >= 1 && s.R % K == 0, "rows must be K for each sentence");
  const bool attends = s.attention != Attention::kNone;
  STD_TORCH_CHECK(attends == (keys && values && lengths),
                  "attention needs keys, values and lengths");
  const int64_t B = s.R / s.K, gates = rnn::gate_count(s.cell);
  if (attends) {
    STD_TORCH_CHECK(keys->dim() == 3 && values->dim() == 3, "keys and values must be (B, S, size)");
    s.S = size(keys->size(1)), s.A = size(keys->size(2));
    STD_TORCH_CHECK(query || s.A == s.H, "without a query's matrix keys must have H numbers");
    STD_TORCH_CHECK(s.attention != Attention::kAdditive || score, "additive scores need v");
  }
  const std::string reason = refuse(s, shared);
  STD_TORCH_CHECK(reason.empty(), "the decode step cannot run: ", reason);
  STD_TORCH_CHECK(embedding.size(0) >= s.V, "the embedding must have a row for each token");
  for (const Tensor* t : {&h, &context, &embedding, &output, &logits}) {
    STD_TORCH_CHECK(t->scalar_type() == h.scalar_type(), "all tensors must have one dtype");
  }
  s.tokens = static_cast<const int64_t*>(to(tokens, h, ScalarType::Long, s.R, "tokens"));
  s.parents = static_cast<const int64_t*>(to(parents, h, ScalarType::Long, s.R, "parents"));
  s.embedding = of(embedding, h, embedding.numel(), "embedding");
  for (int i = 0; i < s.layers; ++i) {
    const Tensor* const own = layers.data() + 4 * i;
    Layer& layer = s.layer[i];
    layer.input = of(own[0], h, gates * s.H * inputs_of(s, i), "a layer's input weights");
    layer.hidden = of(own[1], h, gates * s.H * s.H, "a layer's hidden weights");
    layer.input_bias = of(own[2], h, gates * s.H, "a layer's input bias");
    layer.hidden_bias = of(own[3], h, gates * s.H, "a layer's hidden bias");
    STD_TORCH_CHECK(layer.input && layer.hidden, "a layer needs its weights");
  }
  s.query = of(query, h, static_cast<int64_t>(s.A) * s.H, "query");
  s.query_bias = of(query_bias, h, s.A, "the query's bias");
  s.score = of(score, h, s.A, "score");
  s.keys = of(keys, h, B * s.S * s.A, "keys");
  s.values = of(values, h, B * s.S * s.M, "values");
  if (lengths) {
    s.lengths = static_cast<const int64_t*>(to(*lengths, h, ScalarType::Long, B, "lengths"));
  }
  s.output = of(output, h, static_cast<int64_t>(s.V) * output_inputs(s), "output");
  s.output_bias = of(output_bias, h, s.V, "the output's bias");
  const int64_t states = static_cast<int64_t>(s.layers) * s.R * s.H;
  s.h = to(h, h, h.scalar_type(), states, "h");
  STD_TORCH_CHECK((s.cell == rnn::Cell::kLstm) == c.has_value(), "an LSTM has c, a GRU has not");
  if (c) s.c = to(*c, h, h.scalar_type(), states, "c");
  s.context = to(context, h, h.scalar_type(), static_cast<int64_t>(s.R) * s.M, "context");
  s.logits = to(logits, h, h.scalar_type(), static_cast<int64_t>(s.R) * s.V, "logits");
  if (weights) {
    s.weights = to(*weights, h, h.scalar_type(), static_cast<int64_t>(s.R) * s.S, "weights");
  }
  s.arrived = static_cast<uint32_t*>(to(arrived, h, ScalarType::Int, 1, "arrived"));
  s.between = static_cast<float*>(
      to(between_blocks, h, ScalarType::Float, between(s).count, "between_blocks"));
  STD_TORCH_CHECK(blocks >= 1, "there must be at least one block");
  decode_step(s, format_of(h), static_cast<int>(blocks), current_stream(h));
}

STABLE_TORCH_LIBRARY_FRAGMENT(encdec_fast_cuda, m) {
  m.def(
      "decode_step(int cell, int attention, bool context_in_output, int K, Tensor tokens, "
      "Tensor parents, Tensor embedding, Tensor[] layers, Tensor? query, Tensor? query_bias, "
      "Tensor? score, Tensor? keys, Tensor? values, Tensor? lengths, Tensor output, "
      "Tensor? output_bias, Tensor(a!) h, Tensor(b!)? c, Tensor(c!) context, Tensor(d!) logits, "
      "Tensor(e!)? weights, Tensor(f!) arrived, Tensor(g!) between_blocks, int blocks, "
      "int shared_bytes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(encdec_fast_cuda, ENCDEC_GPU_KEY, m) {
  m.impl("decode_step", TORCH_BOX(&checked_decode_step));
}

}  // namespace encdec::generation::gpu
