// torch's side of the attention decoder: check, allocate, launch.
#include "core/torch_tensor.h"
#include "core/workspace.h"
#include "decoder/attention_decoder.h"
#include "rnn/rnn_plan.h"

namespace encdec::decoder {
namespace {

using OptionalTensor = std::optional<Tensor>;

const rnn::Kernels& recurrent() {
  static const rnn::Kernels& k = rnn::kernels(chosen_isa());
  return k;
}
const DecoderKernels& chosen() {
  static const DecoderKernels& k = decoder_kernels(chosen_isa());
  return k;
}

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// A CPU tensor of these sizes and this dtype; its last dimension, or all of it, is contiguous.
void check(const Tensor& t, std::initializer_list<int64_t> sizes, Format dtype, bool rows_only,
           const char* name) {
  bool good = t.is_cpu() && t.dim() == static_cast<int64_t>(sizes.size()) && format_of(t) == dtype;
  int64_t i = 0;
  for (const int64_t size : sizes) good = good && t.size(i++) == size;
  good = good && (rows_only ? t.dim() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1
                            : t.is_contiguous());
  STD_TORCH_CHECK(good, name, " has a wrong size, dtype, device or layout");
}

// What forward and backward have in common, checked.
struct Inputs {
  rnn::Shape shape{};
  rnn::Sequences sequences;
  rnn::Weights weights;
  Memory memory;
  Format dtype;

  Inputs(int64_t cell, const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
         const Tensor& context0, const OptionalTensor& keys, const Tensor& values,
         const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
         const OptionalTensor& bias_hh, const OptionalTensor& query_weight,
         const OptionalTensor& score_weight, const OptionalTensor& positions,
         const OptionalTensor& output_weight, const OptionalTensor& coverage,
         const OptionalTensor& coverage_weight, const OptionalTensor& lengths, double scale) {
    STD_TORCH_CHECK(cell == 0 || cell == 1, "the cell must be an LSTM or a GRU");
    STD_TORCH_CHECK(keys.has_value() != positions.has_value(), "either keys or positions");
    const Tensor& scored = keys ? *keys : *positions;
    STD_TORCH_CHECK(input.dim() == 3 && scored.dim() == 3 && values.dim() == 3 && h0.dim() == 2 &&
                        context0.dim() == 2 && weight_ih.dim() == 2 && weight_hh.dim() == 2,
                    "input, keys and values must have 3 dimensions, states and weights 2");
    dtype = format_of(input);
    shape.cell = static_cast<rnn::Cell>(cell);
    const int64_t gates = rnn::gate_count(shape.cell);
    const int64_t B = shape.B = input.size(0), T = shape.T = input.size(1);
    shape.I = input.size(2);
    const int64_t H = shape.H = shape.P = h0.size(1), M = memory.M = values.size(2);
    const int64_t S = memory.S = values.size(1), A = memory.A = scored.size(2);
    const int64_t F = memory.F = output_weight ? context0.size(1) : M;
    STD_TORCH_CHECK(B > 0 && T > 0 && H > 0 && A > 0 && M > 0 && F > 0,
                    "there must be a step and a sentence, and no size of 0");
    check(input, {B, T, shape.I}, dtype, true, "input");
    check(h0, {B, H}, dtype, false, "h0");
    check(context0, {B, F}, dtype, false, "context0");
    if (cell == 0) {
      STD_TORCH_CHECK(c0.has_value(), "an LSTM needs c0");
      check(*c0, {B, H}, dtype, false, "c0");
    }
    check(weight_ih, {gates * H, shape.I + F}, dtype, true, "weight_ih");
    check(weight_hh, {gates * H, H}, dtype, true, "weight_hh");
    STD_TORCH_CHECK(bias_ih.has_value() == bias_hh.has_value(), "both biases or none");
    weights.dtype = dtype;
    weights.ih = data(weight_ih);
    weights.hh = data(weight_hh);
    weights.ih_stride = weight_ih.stride(0);
    weights.hh_stride = weight_hh.stride(0);
    memory.feed_weight = weights.ih + shape.I * element_bytes(dtype);
    memory.feed_stride = weights.ih_stride;
    memory.context0 = data(context0);
    if (bias_ih) {
      check(*bias_ih, {gates * H}, dtype, false, "bias_ih");
      check(*bias_hh, {gates * H}, dtype, false, "bias_hh");
      weights.b_ih = data(*bias_ih);
      weights.b_hh = data(*bias_hh);
    }
    check(values, {B, S, M}, dtype, true, "values");
    const auto rows = [&](const Tensor& t) {
      const int64_t bytes = element_bytes(dtype);
      return attention::Rows{data(t), t.stride(0) * bytes, t.stride(1) * bytes};
    };
    memory.values = rows(values);
    if (positions) {
      check(*positions, {B, T, A}, dtype, true, "positions");
      STD_TORCH_CHECK(query_weight && !score_weight && !output_weight && S <= A,
                      "positions go with query_weight alone, and there are as many as keys");
      memory.score = Score::kLocation;
      memory.positions = rows(*positions);
    } else {
      check(*keys, {B, S, A}, dtype, true, "keys");
      memory.score = score_weight ? Score::kAdditive : Score::kDot;
      memory.keys = rows(*keys);
    }
    if (output_weight) {
      check(*output_weight, {F, M + H}, dtype, true, "output_weight");
      memory.output_weight = data(*output_weight);
      memory.output_stride = output_weight->stride(0);
    }
    STD_TORCH_CHECK(
        coverage.has_value() == coverage_weight.has_value() && (!coverage || score_weight),
        "coverage goes with its weight and score_weight");
    if (coverage) {
      check(*coverage, {B, S}, dtype, false, "coverage");
      check(*coverage_weight, {A}, dtype, false, "coverage_weight");
      memory.coverage = data(*coverage);
      memory.coverage_weight = data(*coverage_weight);
    }
    memory.scale = static_cast<float>(scale);
    if (query_weight) {
      check(*query_weight, {A, H}, dtype, true, "query_weight");
      memory.query_weight = data(*query_weight);
      memory.query_stride = query_weight->stride(0);
    }
    STD_TORCH_CHECK(query_weight || A == H, "without query_weight keys must have H numbers");
    if (score_weight) {
      check(*score_weight, {A}, dtype, false, "score_weight");
      memory.score_weight = data(*score_weight);
    }
    if (lengths) {
      STD_TORCH_CHECK(lengths->is_cpu() && lengths->is_contiguous() && lengths->numel() == B &&
                          lengths->scalar_type() == ScalarType::Long,
                      "memory_lengths must be ", B, " int64 on the CPU");
      memory.lengths = reinterpret_cast<const int64_t*>(data(*lengths));
      for (int64_t b = 0; b < B; ++b) {
        STD_TORCH_CHECK(memory.lengths[b] >= 0 && memory.lengths[b] <= S,
                        "memory_lengths must be in [0, ", S, "], got ", memory.lengths[b]);
      }
    }
    sequences.T = T;
    sequences.B = B;
  }

  // (B, T, size) with contiguous rows.
  rnn::StepTensor steps(const Tensor& t) const {
    const int64_t bytes = element_bytes(dtype);
    return {data(t), t.stride(1) * bytes, t.stride(0) * bytes};
  }
};

std::vector<Tensor> attention_decoder_forward(
    int64_t cell, Tensor input, Tensor h0, OptionalTensor c0, Tensor context0, OptionalTensor keys,
    Tensor values, Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih,
    OptionalTensor bias_hh, OptionalTensor query_weight, OptionalTensor score_weight,
    OptionalTensor positions, OptionalTensor output_weight, OptionalTensor coverage,
    OptionalTensor coverage_weight, OptionalTensor lengths, double scale, bool save_for_backward) {
  const Inputs in(cell, input, h0, c0, context0, keys, values, weight_ih, weight_hh, bias_ih,
                  bias_hh, query_weight, score_weight, positions, output_weight, coverage,
                  coverage_weight, lengths, scale);
  const int64_t B = in.shape.B, T = in.shape.T, H = in.shape.H, F = in.memory.F;
  const bool lstm = in.shape.cell == rnn::Cell::kLstm;
  const int32_t dtype = dtype_of(in.dtype);
  Forward f{};
  f.rnn.shape = in.shape;
  f.rnn.sequences = in.sequences;
  f.rnn.dtype = f.rnn.format = in.dtype;
  f.rnn.input = in.steps(input);
  f.memory = in.memory;
  // output, h_n, c_n, weights, and what backward reads: cells, gates, queries, contexts,
  // coverages.
  std::vector<Tensor> result;
  result.push_back(empty<3>({B, T, H + F}, dtype));
  result.push_back(empty<2>({B, H}, dtype));
  result.push_back(empty<2>({B, lstm ? H : 0}, dtype));
  result.push_back(empty<3>({B, T, in.memory.weights_size()}, aoti_torch_dtype_float32()));
  rnn::Direction& dir = f.rnn.direction[0];
  dir.h0 = data(h0);
  dir.c0 = lstm ? data(*c0) : nullptr;
  dir.output = in.steps(result[0]);
  dir.h_n = data(result[1]);
  dir.c_n = lstm ? data(result[2]) : nullptr;
  f.weights = reinterpret_cast<float*>(data(result[3]));
  if (save_for_backward) {
    result.push_back(empty<3>({B, T, lstm ? H : 0}, dtype));
    result.push_back(empty<3>({T, B, rnn::saved_gates(in.shape.cell) * H}, dtype));
    result.push_back(empty<3>({B, T, in.memory.A}, dtype));
    result.push_back(empty<3>({B, output_weight ? T : 0, in.memory.M}, dtype));
    result.push_back(empty<3>({B, coverage ? T : 0, in.memory.S}, aoti_torch_dtype_float32()));
    if (lstm) dir.cells = in.steps(result[4]);
    dir.gates = data(result[5]);
    f.queries = data(result[6]);
    if (output_weight) f.contexts = data(result[7]);
    if (coverage) f.coverages = reinterpret_cast<float*>(data(result[8]));
  }
  const rnn::Plan plan = rnn::make_plan(in.shape, T * B, 1, in.dtype, threads());
  f.rnn.threads = plan.threads;
  f.rnn.chunk_rows = plan.chunk_rows;
  const int64_t block = round_up(recurrent().packed_bytes(in.shape, in.dtype), 64);
  const int64_t own = round_up(recurrent().forward_workspace(f.rnn), 64);
  const Workspace workspace(block + own + chosen().forward_workspace(f));
  recurrent().pack(in.shape, in.weights, in.dtype, f.rnn.threads, true, workspace.data());
  dir.packed = workspace.data();
  f.rnn.workspace = workspace.data() + block;
  f.workspace = f.rnn.workspace + own;
  chosen().forward(f);
  return result;
}

std::vector<Tensor> attention_decoder_backward(
    OptionalTensor grad_output, OptionalTensor grad_c_n, OptionalTensor grad_weights, int64_t cell,
    Tensor input, Tensor h0, OptionalTensor c0, Tensor context0, OptionalTensor keys, Tensor values,
    Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih, OptionalTensor bias_hh,
    OptionalTensor query_weight, OptionalTensor score_weight, OptionalTensor positions,
    OptionalTensor output_weight, OptionalTensor coverage, OptionalTensor coverage_weight,
    OptionalTensor lengths, double scale, Tensor output, Tensor weights, Tensor cells, Tensor gates,
    Tensor queries, Tensor contexts, Tensor coverages) {
  const Inputs in(cell, input, h0, c0, context0, keys, values, weight_ih, weight_hh, bias_ih,
                  bias_hh, query_weight, score_weight, positions, output_weight, coverage,
                  coverage_weight, lengths, scale);
  const int64_t B = in.shape.B, T = in.shape.T, H = in.shape.H, M = in.memory.M;
  const int64_t A = in.memory.A, S = in.memory.weights_size(), F = in.memory.F;
  const bool lstm = in.shape.cell == rnn::Cell::kLstm;
  STD_TORCH_CHECK(in.dtype != Format::kFloat16, "there is no backward in float16");
  const int64_t saved = rnn::saved_gates(in.shape.cell) * H;
  check(output, {B, T, H + F}, in.dtype, false, "output");
  check(weights, {B, T, S}, Format::kFloat32, false, "weights");
  if (lstm) check(cells, {B, T, H}, in.dtype, false, "cells");
  check(gates, {T, B, saved}, in.dtype, false, "gates");
  check(queries, {B, T, A}, in.dtype, false, "queries");
  if (output_weight) check(contexts, {B, T, M}, in.dtype, false, "contexts");
  if (coverage) check(coverages, {B, T, S}, Format::kFloat32, false, "coverages");
  if (grad_output) check(*grad_output, {B, T, H + F}, in.dtype, true, "grad_output");
  if (lstm && grad_c_n) check(*grad_c_n, {B, H}, in.dtype, false, "grad_c_n");
  if (grad_weights) check(*grad_weights, {B, T, S}, Format::kFloat32, false, "grad_weights");
  Backward f{};
  f.rnn.shape = in.shape;
  f.rnn.sequences = in.sequences;
  f.rnn.dtype = in.dtype;
  f.memory = in.memory;
  const int32_t dtype = dtype_of(in.dtype);
  // Gradients of input, h0, c0, context0, weight_ih's two parts, weight_hh, bias_ih, bias_hh,
  // query_weight, of each step's context, positions, and output_weight's two parts; with coverage
  // those of keys, score_weight, coverage and coverage_weight.
  std::vector<Tensor> result;
  result.push_back(empty<3>({B, T, in.shape.I}, dtype));
  result.push_back(empty<2>({B, H}, dtype));
  result.push_back(empty<2>({B, lstm ? H : 0}, dtype));
  result.push_back(empty<2>({B, F}, dtype));
  const int64_t rows = weight_hh.size(0);
  for (const int64_t width : {in.shape.I, F, H}) result.push_back(empty<2>({rows, width}, dtype));
  for (int i = 0; i < 2; ++i) result.push_back(empty<1>({rows}, dtype));
  result.push_back(empty<2>({A, H}, dtype));
  result.push_back(empty<3>({B, T, M}, dtype));
  result.push_back(empty<3>({B, positions ? T : 0, A}, dtype));
  for (const int64_t width : {M, H}) {
    result.push_back(empty<2>({output_weight ? F : 0, width}, dtype));
  }
  if (positions) {  // a sentence's gradients end with its weights
    std::memset(data(result[11]), 0, static_cast<size_t>(B * T * A * element_bytes(in.dtype)));
  }
  f.rnn.input = in.steps(input);
  f.rnn.grad_input = in.steps(result[0]);
  rnn::BackwardDirection& dir = f.rnn.direction[0];
  dir.weights = in.weights;
  dir.h0 = data(h0);
  dir.c0 = lstm ? data(*c0) : nullptr;
  dir.output = in.steps(output);
  if (lstm) dir.cells = in.steps(cells);
  dir.gates = data(gates);
  if (grad_output) dir.grad_output = in.steps(*grad_output);
  dir.grad_c_n = lstm ? data(grad_c_n) : nullptr;
  dir.grad_h0 = data(result[1]);
  dir.grad_c0 = lstm ? data(result[2]) : nullptr;
  dir.grad_ih = data(result[4]);
  dir.grad_hh = data(result[6]);
  dir.grad_b_ih = data(result[7]);
  dir.grad_b_hh = data(result[8]);
  f.rnn.fed = F;
  f.grad_context0 = data(result[3]);
  f.grad_feed_weight = data(result[5]);
  f.weights = reinterpret_cast<const float*>(data(weights));
  f.queries = data(queries);
  f.grad_weights = reinterpret_cast<const float*>(data(grad_weights));
  f.grad_query_weight = data(result[9]);
  f.grad_context = data(result[10]);
  f.contexts = data(contexts);
  f.grad_positions = data(result[11]);
  f.grad_output_context = data(result[12]);
  f.grad_output_state = data(result[13]);
  if (coverage) {
    f.coverages = reinterpret_cast<const float*>(data(coverages));
    result.push_back(empty<3>({B, S, A}, dtype));
    result.push_back(empty<1>({A}, dtype));
    result.push_back(empty<2>({B, S}, dtype));
    result.push_back(empty<1>({A}, dtype));
    f.grad_keys = data(result[14]);
    f.grad_score_weight = data(result[15]);
    f.grad_coverage = data(result[16]);
    f.grad_coverage_weight = data(result[17]);
  }
  const rnn::Plan plan = rnn::make_backward_plan(in.shape, T * B, in.dtype, threads());
  f.rnn.threads = plan.threads;
  f.rnn.chunk_rows = plan.chunk_rows;
  const int64_t own = round_up(recurrent().backward_workspace(f.rnn), 64);
  const Workspace workspace(own + chosen().backward_workspace(f));
  f.rnn.workspace = workspace.data();
  f.workspace = workspace.data() + own;
  chosen().backward(f);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(encdec_fast_cpu, m) {
  m.def(
      "attention_decoder_forward(int cell, Tensor input, Tensor h0, Tensor? c0, Tensor context0, "
      "Tensor? keys, Tensor values, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
      "Tensor? bias_hh, Tensor? query_weight, Tensor? score_weight, Tensor? positions, "
      "Tensor? output_weight, Tensor? coverage, Tensor? coverage_weight, Tensor? lengths, "
      "float scale, bool save_for_backward) -> Tensor[]");
  m.def(
      "attention_decoder_backward(Tensor? grad_output, Tensor? grad_c_n, Tensor? grad_weights, "
      " int cell, Tensor input, Tensor h0, Tensor? c0, Tensor context0, "
      "Tensor? keys, Tensor values, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
      "Tensor? bias_hh, Tensor? query_weight, Tensor? score_weight, Tensor? positions, "
      "Tensor? output_weight, Tensor? coverage, Tensor? coverage_weight, Tensor? lengths, "
      "float scale, Tensor output, Tensor weights, Tensor cells, Tensor gates, Tensor queries, "
      "Tensor contexts, Tensor coverages) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(encdec_fast_cpu, CPU, m) {
  m.impl("attention_decoder_forward", TORCH_BOX(&attention_decoder_forward));
  m.impl("attention_decoder_backward", TORCH_BOX(&attention_decoder_backward));
}

}  // namespace encdec::decoder
