// torch's side of the recurrences for GPUs: check, launch. encdec_fast/ops/_recurrent_gpu.py has
// made the products with the input and every tensor; what is checked here is what a kernel would
// read or write out of bounds for.
#include <algorithm>
#include <iterator>

#include "core/cuda_tensor.h"
#include "rnn/rnn_gpu.h"

namespace encdec::rnn::gpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Where the rows lie: numbers of the call, as encdec_fast/ops/_recurrent_gpu.py gives them.
struct Layout {
  int64_t T, B, rows, step, sequence;
};

Layout layout_of(const std::vector<int64_t>& numbers) {
  STD_TORCH_CHECK(numbers.size() == 5, "layout must be T, B, rows, step, sequence");
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
}

Plan plan_of(const std::vector<int64_t>& numbers) {
  STD_TORCH_CHECK(numbers.size() == 8, "a plan has 8 numbers, got ", numbers.size());
  const auto at = [&](size_t i) { return static_cast<int32_t>(numbers[i]); };
  Plan p{};
  p.cluster = numbers[0] != 0;
  p.tile = at(1), p.blocks = at(2), p.row_groups = at(3), p.k_groups = at(4);
  p.chunk = at(5), p.slice = at(6), p.launch = at(7);
  return p;
}

const void* given(const OptionalTensor& t, const Tensor& like, ScalarType type, int64_t numel,
                  const char* name) {
  if (!t) return nullptr;
  check_device_tensor(*t, like, type, numel, name);
  return t->data_ptr();
}

// D: groups, which are directions or, if there are more than one, layers.
struct Sizes {
  Cell cell;
  int64_t D, H, G, layers;
  ScalarType type;
  Format dtype;
};

Sizes sizes_of(int64_t cell, const Tensor& weight, bool stacked = false) {
  STD_TORCH_CHECK(cell == 0 || cell == 1, "there are GPU kernels of LSTM and GRU only");
  STD_TORCH_CHECK(weight.dim() == 3, "weight must have three dimensions");
  const int64_t G = gate_count(static_cast<Cell>(cell)), H = weight.size(1) / G;
  STD_TORCH_CHECK(
      H > 0 && weight.size(1) == G * H && weight.size(0) >= 1 && (stacked || weight.size(0) <= 2) &&
          weight.size(2) == round_up(H, kRowMultiple),
      "weight must have the shape (directions, gates * H, H filled up to a multiple of ",
      kRowMultiple, ")");
  check_device_tensor(weight, weight, weight.scalar_type(), weight.numel(), "weight");
  check_aligned(weight, "weight");
  const int64_t D = weight.size(0);
  return {static_cast<Cell>(cell), D, H, G, stacked ? D : 1, weight.scalar_type(),
          format_of(weight)};
}

Steps steps_of(const Layout& layout, const Sizes& s, const Tensor& like,
               const OptionalTensor& lengths, const OptionalTensor& starts,
               const OptionalTensor& order, const OptionalTensor& resets) {
  constexpr int64_t kMost = int64_t{1} << 31;
  STD_TORCH_CHECK(layout.T > 0 && layout.B > 0 && layout.T < kMost && layout.B < kMost,
                  "there must be at least one step and one sequence");
  // Without starts a row lies at its place, and all have T steps.
  STD_TORCH_CHECK(layout.rows == layout.T * layout.B ||
                      (starts && layout.rows >= 0 && layout.rows < layout.T * layout.B),
                  "there must be a row for each step of each sequence");
  Steps steps{};
  steps.T = static_cast<int32_t>(layout.T), steps.B = static_cast<int32_t>(layout.B);
  steps.H = static_cast<int32_t>(s.H),
  steps.directions = static_cast<int32_t>(s.layers > 1 ? 1 : s.D);
  steps.rows = layout.rows, steps.step = layout.step, steps.sequence = layout.sequence;
  STD_TORCH_CHECK(!starts || lengths, "starts of steps need lengths");
  STD_TORCH_CHECK(!order || starts, "an order of sequences needs starts of steps");
  const auto at = [&](const OptionalTensor& t, ScalarType type, int64_t n, const char* name) {
    return given(t, like, type, n, name);
  };
  steps.lengths = static_cast<const int32_t*>(at(lengths, ScalarType::Int, layout.B, "lengths"));
  steps.starts = static_cast<const int64_t*>(at(starts, ScalarType::Long, layout.T, "starts"));
  steps.order = static_cast<const int64_t*>(at(order, ScalarType::Long, layout.B, "order"));
  steps.resets = static_cast<const uint8_t*>(at(resets, ScalarType::Bool, layout.rows, "resets"));
  return steps;
}

// Rows of the caller's tensors: padded ones have all T steps.
int64_t places_of(const Layout& layout, const OptionalTensor& starts, const OptionalTensor& order) {
  const bool packed = starts && !order;
  const int64_t places = layout.T * layout.B;
  STD_TORCH_CHECK(packed || (layout.step == 1 && layout.sequence == layout.T) ||
                      (layout.step == layout.B && layout.sequence == 1),
                  "steps and sequences must lie one behind the other");
  return packed ? layout.rows : places;
}

Shape shape_of(const Sizes& s, const Steps& steps, bool backward) {
  const int32_t layers = static_cast<int32_t>(s.layers);
  return {s.cell, s.dtype, backward, steps.B, steps.H, steps.directions, layers};
}

void check_plan(const Shape& own, const Plan& plan, const Tensor& exchange) {
  // The device's limits were the planner's to know; a launch that exceeds them fails by itself.
  Limits none{90, INT32_MAX, INT32_MAX, {}};
  std::fill(std::begin(none.clusters), std::end(none.clusters), INT32_MAX);
  const std::string reason = refuse(own, none, plan);
  STD_TORCH_CHECK(reason.empty(), "the plan does not fit the call: ", reason);
  STD_TORCH_CHECK(exchange.is_contiguous() && exchange.scalar_type() == ScalarType::Byte &&
                      exchange.numel() >= exchange_bytes(own, plan),
                  "exchange must have ", exchange_bytes(own, plan), " bytes");
}

}  // namespace

void rnn_forward(int64_t cell, Tensor products, Tensor weight, OptionalTensor bias,
                 OptionalTensor h0, OptionalTensor c, Tensor output, OptionalTensor cells,
                 OptionalTensor gates, Tensor h_n, std::vector<int64_t> layout_numbers,
                 OptionalTensor lengths, OptionalTensor starts, OptionalTensor order,
                 OptionalTensor resets, std::vector<int64_t> plan_numbers, Tensor exchange,
                 OptionalTensor input_weight, OptionalTensor input_bias, OptionalTensor handed_up) {
  const Sizes s = sizes_of(cell, weight, input_weight.has_value());
  const Layout layout = layout_of(layout_numbers);
  const Plan plan = plan_of(plan_numbers);
  const bool lstm = s.cell == Cell::kLstm;
  Forward f{};
  f.steps = steps_of(layout, s, weight, lengths, starts, order, resets);
  const Shape shape = shape_of(s, f.steps, false);
  check_plan(shape, plan, exchange);
  const int64_t directions = f.steps.directions;
  const int64_t places = places_of(layout, starts, order), state = s.D * layout.B * s.H;
  check_device_tensor(products, weight, ScalarType::Float, layout.rows * directions * s.G * s.H,
                      "products");
  check_device_tensor(output, weight, s.type, places * directions * s.H, "output");
  check_device_tensor(h_n, weight, s.type, state, "h_n");
  STD_TORCH_CHECK(lstm == c.has_value(), "an LSTM has c, a GRU has not");
  f.products = static_cast<const float*>(products.data_ptr());
  f.weight = weight.data_ptr();
  f.bias = static_cast<const float*>(given(bias, weight, ScalarType::Float, s.D * s.H, "bias"));
  f.h0 = given(h0, weight, s.type, state, "h0");
  f.c = static_cast<float*>(const_cast<void*>(given(c, weight, ScalarType::Float, state, "c")));
  f.output = output.data_ptr();
  f.cells = const_cast<void*>(given(cells, weight, s.type, places * directions * s.H, "cells"));
  if (gates) {
    STD_TORCH_CHECK(gates->numel() >= layout.rows * s.D * 4 * s.H, "gates is too small");
    f.gates = const_cast<void*>(given(gates, weight, s.type, gates->numel(), "gates"));
  }
  f.h_n = h_n.data_ptr();
  f.layers = static_cast<int32_t>(s.layers);
  if (s.layers > 1) {
    const int64_t above = s.layers - 1;
    STD_TORCH_CHECK(!gates, "layers that share a launch leave nothing for a gradient");
    STD_TORCH_CHECK(handed_up, "layers that share a launch need handed_up");
    f.input_weight =
        given(input_weight, weight, s.type, above * s.G * s.H * weight.size(2), "input_weight");
    check_aligned(*input_weight, "input_weight");
    check_aligned(*handed_up, "handed_up");
    f.input_bias = static_cast<const float*>(
        given(input_bias, weight, ScalarType::Float, above * s.G * s.H, "input_bias"));
    f.handed_up = const_cast<void*>(
        given(handed_up, weight, s.type, above * layout.rows * weight.size(2), "handed_up"));
    char* const end = static_cast<char*>(exchange.data_ptr()) + exchange_bytes(shape, plan);
    f.finished = reinterpret_cast<uint32_t*>(end - finished_bytes(shape, plan));
  }
  (lstm ? lstm_forward : gru_forward)(f, shape, plan, exchange.data_ptr(), current_stream(weight));
}

void rnn_backward(int64_t cell, OptionalTensor grad_output, OptionalTensor grad_h_n,
                  OptionalTensor grad_cells, Tensor weight, Tensor gates, Tensor output,
                  OptionalTensor cells, OptionalTensor h0, OptionalTensor c0, Tensor grads,
                  Tensor previous, Tensor carry, OptionalTensor grad_h0,
                  std::vector<int64_t> layout_numbers, OptionalTensor lengths,
                  OptionalTensor starts, OptionalTensor order, OptionalTensor resets,
                  std::vector<int64_t> plan_numbers, Tensor exchange) {
  const Sizes s = sizes_of(cell, weight);
  const Layout layout = layout_of(layout_numbers);
  const Plan plan = plan_of(plan_numbers);
  const bool lstm = s.cell == Cell::kLstm;
  Backward b{};
  b.steps = steps_of(layout, s, weight, lengths, starts, order, resets);
  const Shape shape = shape_of(s, b.steps, true);
  check_plan(shape, plan, exchange);
  const int64_t places = places_of(layout, starts, order), state = s.D * layout.B * s.H;
  const auto at_places = [&](const OptionalTensor& t, const char* name) {
    return given(t, weight, s.type, places * s.D * s.H, name);
  };
  const auto at_states = [&](const OptionalTensor& t, const char* name) {
    return given(t, weight, s.type, state, name);
  };
  STD_TORCH_CHECK(lstm == cells.has_value(), "an LSTM has cells, a GRU has not");
  STD_TORCH_CHECK(gates.numel() >= layout.rows * s.D * 4 * s.H, "gates is too small");
  check_device_tensor(gates, weight, s.type, gates.numel(), "gates");
  check_device_tensor(grads, weight, s.type, layout.rows * s.D * 4 * s.H, "grads");
  check_device_tensor(previous, weight, s.type, layout.rows * s.D * s.H, "previous");
  check_device_tensor(carry, weight, ScalarType::Float, state, "carry");
  b.grad_output = at_places(grad_output, "grad_output");
  b.grad_h_n = at_states(grad_h_n, "grad_h_n");
  b.grad_cells = at_places(grad_cells, "grad_cells");
  b.weight = weight.data_ptr();
  b.gates = gates.data_ptr();
  b.output = at_places(output, "output");
  b.cells = at_places(cells, "cells");
  b.h0 = at_states(h0, "h0");
  b.c0 = at_states(c0, "c0");
  b.grads = grads.data_ptr();
  b.previous = previous.data_ptr();
  b.carry = static_cast<float*>(carry.data_ptr());
  b.grad_h0 = const_cast<void*>(at_states(grad_h0, "grad_h0"));
  (lstm ? lstm_backward : gru_backward)(b, shape, plan, exchange.data_ptr(),
                                        current_stream(weight));
}

// For 1, 2, ... blocks how many clusters of the device of `like` run at the same time.
std::vector<int64_t> rnn_max_clusters(Tensor) {
  std::vector<int64_t> found;
  for (int blocks = 1; blocks <= kMaxCluster; ++blocks) found.push_back(max_clusters(blocks));
  return found;
}

STABLE_TORCH_LIBRARY_FRAGMENT(encdec_fast_cuda, m) {
  m.def("rnn_max_clusters(Tensor like) -> int[]");
  m.def(
      "rnn_forward(int cell, Tensor products, Tensor weight, Tensor? bias, Tensor? h0, "
      "Tensor(a!)? c, Tensor(b!) output, Tensor(c!)? cells, Tensor(d!)? gates, Tensor(e!) h_n, "
      "int[] layout, Tensor? lengths, Tensor? starts, Tensor? order, Tensor? resets, "
      "int[] plan, Tensor(f!) exchange, Tensor? input_weight=None, Tensor? input_bias=None, "
      "Tensor(g!)? handed_up=None) -> ()");
  m.def(
      "rnn_backward(int cell, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_cells, "
      "Tensor weight, Tensor gates, Tensor output, Tensor? cells, Tensor? h0, Tensor? c0, "
      "Tensor(a!) grads, Tensor(b!) previous, Tensor(c!) carry, Tensor(d!)? grad_h0, "
      "int[] layout, Tensor? lengths, Tensor? starts, Tensor? order, Tensor? resets, "
      "int[] plan, Tensor(e!) exchange) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(encdec_fast_cuda, ENCDEC_GPU_KEY, m) {
  m.impl("rnn_max_clusters", TORCH_BOX(&rnn_max_clusters));
  m.impl("rnn_forward", TORCH_BOX(&rnn_forward));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
}

}  // namespace encdec::rnn::gpu
