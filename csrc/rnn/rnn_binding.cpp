// torch's side of the recurrent kernels: check, allocate, launch.
//
// Python has checked shapes and dtypes and chosen this backend; what is checked again here is what
// a kernel would read or write out of bounds for.
#include "core/memory.h"
#include "core/torch_tensor.h"
#include "core/workspace.h"
#include "rnn/rnn.h"
#include "rnn/rnn_plan.h"

namespace encdec::rnn {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Input rows of a call up to this size are staged together: they stay in L2 beside a block of W_ih.
constexpr int64_t kStagedInput = 1 << 20;

const Kernels& chosen() {
  static const Kernels& k = kernels(chosen_isa());
  return k;
}

Cell cell_of(int64_t cell) {
  STD_TORCH_CHECK(cell >= 0 && cell <= 3, "unknown recurrent cell ", cell);
  return static_cast<Cell>(cell);
}

// The weights of one direction: [w_ih, w_hh, b_ih, b_hh, w_hr], biases and projection optional.
Weights weights_of(const Tensor* w, size_t count) {
  const bool bias = count >= 4, projected = count % 2 == 1;
  Weights r;
  r.dtype = format_of(w[0]);
  const auto matrix = [&](const Tensor& t, const char** p, int64_t* stride) {
    STD_TORCH_CHECK(format_of(t) == r.dtype && t.is_cpu() && t.dim() == 2 &&
                        (t.size(1) <= 1 || t.stride(1) == 1),
                    "weights must be matrices with contiguous rows");
    *p = data(t);
    *stride = t.stride(0);
  };
  matrix(w[0], &r.ih, &r.ih_stride);
  matrix(w[1], &r.hh, &r.hh_stride);
  if (bias) {
    STD_TORCH_CHECK(w[2].is_contiguous() && w[3].is_contiguous(), "biases must be contiguous");
    r.b_ih = data(w[2]);
    r.b_hh = data(w[3]);
  }
  if (projected) matrix(w[count - 1], &r.hr, &r.hr_stride);
  return r;
}

Shape shape_of(Cell cell, const Tensor* w, size_t count) {
  STD_TORCH_CHECK(count >= 2 && count <= 5, "a direction has 2 to 5 weights, got ", count);
  const int64_t gates = gate_count(cell);
  Shape s{};
  s.cell = cell;
  s.I = w[0].size(1);
  s.P = w[1].size(1);
  s.projected = count % 2 == 1;
  s.H = w[0].size(0) / gates;
  bool good = w[0].size(0) == gates * s.H && w[1].size(0) == gates * s.H;
  if (count >= 4) good = good && w[2].numel() == gates * s.H && w[3].numel() == gates * s.H;
  if (s.projected) {
    const Tensor& hr = w[count - 1];
    good = good && cell == Cell::kLstm && hr.size(0) == s.P && hr.size(1) == s.H;
  } else {
    good = good && s.P == s.H;
  }
  STD_TORCH_CHECK(good, "the recurrent weights' shapes do not fit each other");
  return s;
}

uint64_t fingerprint_of(const Tensor* w, size_t count) {
  uint64_t hash = count;
  for (size_t i = 0; i < count; ++i) hash = fingerprint(w[i], hash);
  return hash;
}

Tensor rnn_pack(int64_t cell, std::vector<Tensor> weights, int64_t format) {
  const Shape s = shape_of(cell_of(cell), weights.data(), weights.size());
  STD_TORCH_CHECK(format >= 0 && format <= 3, "unknown weight format ", format);
  const Format f = static_cast<Format>(format);
  const int64_t bytes = chosen().packed_bytes(s, f);
  Tensor packed = empty_block(bytes);
  // Taken before: weights that change while they are packed must leave the block stale.
  const uint64_t before = fingerprint_of(weights.data(), weights.size());
  chosen().pack(s, weights_of(weights.data(), weights.size()), f,
                static_cast<int>(torch::stable::get_num_threads()), true, data(packed));
  collapse_to_huge_pages(data(packed), bytes);
  reinterpret_cast<PackedHeader*>(data(packed))->fingerprint = before;
  return packed;
}

// Directions and weights of each, from a list that may hold biases and a projection or not.
struct WeightCounts {
  int64_t directions;
  size_t each;
  explicit WeightCounts(const std::vector<Tensor>& w) {
    const bool two = w.size() > 5 || (w.size() == 4 && w[2].dim() == 2);
    directions = two ? 2 : 1;
    each = w.size() / (two ? 2 : 1);
    STD_TORCH_CHECK(w.size() == each * static_cast<size_t>(directions),
                    "the directions must have as many weights each, got ", w.size());
  }
};

bool is_fresh(const Tensor& packed, const Shape& s, const Tensor* w, size_t count) {
  const PackedHeader& h = *reinterpret_cast<const PackedHeader*>(data(packed));
  STD_TORCH_CHECK(packed.numel() >= static_cast<int64_t>(sizeof(PackedHeader)) &&
                      h.magic == PackedHeader::kMagic && h.isa == compiled_isa(chosen_isa()) &&
                      h.bytes <= packed.numel(),
                  "not a packed recurrent weight of this instruction set");
  return h.cell == s.cell && h.I == s.I && h.H == s.H && h.P == s.P &&
         h.projected == static_cast<int32_t>(s.projected) &&
         h.fingerprint == fingerprint_of(w, count);
}

StepTensor step_tensor(const Tensor& t, bool batch_first, bool packed, int64_t offset) {
  const int64_t bytes = element_bytes(format_of(t));
  StepTensor s;
  s.data = data(t) + offset * bytes;
  if (packed) {
    s.row_stride = t.stride(0) * bytes;
  } else {
    s.step_stride = t.stride(batch_first ? 1 : 0) * bytes;
    s.row_stride = t.stride(batch_first ? 0 : 1) * bytes;
  }
  return s;
}

// Sizes and order of the sequences of a call.
Sequences sequences_of(const Tensor& input, const OptionalTensor& lengths,
                       const OptionalTensor& batch_sizes, bool batch_first, SequenceOrder& keep) {
  const auto integers = [](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(
        t.is_cpu() && t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.is_contiguous(),
        name, " must be a contiguous int64 CPU vector");
    return reinterpret_cast<const int64_t*>(data(t));
  };
  Sequences q;
  if (batch_sizes) {
    STD_TORCH_CHECK(input.dim() == 2, "packed input must have 2 dimensions, got ", input.dim());
    const int64_t T = batch_sizes->numel();
    const int64_t* sizes = integers(*batch_sizes, "batch_sizes");
    int64_t sum = 0;
    for (int64_t t = 0; t < T; ++t) {
      STD_TORCH_CHECK(sizes[t] > 0 && (t == 0 || sizes[t] <= sizes[t - 1]),
                      "batch_sizes must be positive and must not rise");
      sum += sizes[t];
    }
    STD_TORCH_CHECK(sum == input.size(0), "batch_sizes add up to ", sum, ", but there are ",
                    input.size(0), " packed rows");
    return keep.from_batch_sizes(sizes, T);
  }
  STD_TORCH_CHECK(input.dim() == 3, "input must have 3 dimensions, got ", input.dim());
  q.T = input.size(batch_first ? 1 : 0);
  q.B = input.size(batch_first ? 0 : 1);
  if (!lengths) return q;
  STD_TORCH_CHECK(lengths->numel() == q.B, "lengths must have ", q.B, " entries, got ",
                  lengths->numel());
  const int64_t* n = integers(*lengths, "lengths");
  for (int64_t b = 0; b < q.B; ++b) {
    STD_TORCH_CHECK(n[b] >= 1 && n[b] <= q.T, "lengths must be in [1, ", q.T, "], got ", n[b]);
  }
  return keep.from_lengths(n, q.B, q.T);
}

// Padded positions of a step tensor (B or T first) to zero.
void zero_padding(const Tensor& t, const Sequences& q, bool batch_first) {
  const int64_t T = t.size(batch_first ? 1 : 0);
  const int64_t width = t.size(2) * element_bytes(format_of(t));
  const StepTensor s = step_tensor(t, batch_first, false, 0);
  for (int64_t step = 0; step < T; ++step) {
    for (int64_t r = step < q.T ? q.active(step) : 0; r < q.B; ++r) {
      std::memset(s.at(q, step, r), 0, static_cast<size_t>(width));
    }
  }
}

void check_state(const OptionalTensor& t, int64_t D, int64_t B, int64_t size, Format dtype,
                 const char* name) {
  if (!t) return;
  STD_TORCH_CHECK(t->dim() == 3 && t->size(0) == D && t->size(1) == B && t->size(2) == size &&
                      t->is_contiguous() && t->is_cpu() && format_of(*t) == dtype,
                  name, " must be a contiguous (", D, ", ", B, ", ", size,
                  ") CPU tensor of the input's dtype");
}

std::vector<Tensor> rnn_forward(int64_t cell_number, Tensor input, std::vector<Tensor> weights,
                                std::vector<Tensor> packed, OptionalTensor h0, OptionalTensor c0,
                                OptionalTensor lengths, OptionalTensor batch_sizes,
                                bool batch_first, bool save_cells, bool save_for_backward) {
  const Cell cell = cell_of(cell_number);
  const auto [D, count] = WeightCounts(weights);
  Forward f{};
  f.shape = shape_of(cell, weights.data(), count);
  // Training packs its weights into the workspace: they will have changed by the next step.
  const bool pack_here = packed.empty();
  STD_TORCH_CHECK(pack_here || static_cast<int64_t>(packed.size()) == D,
                  "one packed block per direction is needed");
  for (size_t d = 0; d < packed.size(); ++d) {
    if (!is_fresh(packed[d], f.shape, weights.data() + d * count, count)) return {};
  }
  f.format = pack_here ? format_of(weights[0])
                       : reinterpret_cast<const PackedHeader*>(data(packed[0]))->format;
  f.dtype = format_of(input);
  STD_TORCH_CHECK(input.is_cpu() && input.stride(input.dim() - 1) == 1 &&
                      input.size(input.dim() - 1) == f.shape.I,
                  "input must be a CPU tensor with ", f.shape.I, " contiguous features");
  SequenceOrder order;
  f.sequences = sequences_of(input, lengths, batch_sizes, batch_first, order);
  const int64_t T = f.shape.T = f.sequences.T, B = f.shape.B = f.sequences.B;
  const int64_t H = f.shape.H, P = f.shape.P;
  const bool lstm = cell == Cell::kLstm;
  check_state(h0, D, B, P, f.dtype, "h0");
  if (lstm) check_state(c0, D, B, H, f.dtype, "c0");
  const int64_t rows = f.sequences.rows();
  STD_TORCH_CHECK(T > 0 && B > 0, "there must be at least one step and one sequence");

  const int32_t dtype = dtype_of(f.dtype);
  const bool is_packed = f.sequences.packed;
  const auto like_input = [&](int64_t width) {
    if (is_packed) return empty<2>({input.size(0), width}, dtype);
    return empty<3>({input.size(0), input.size(1), width}, dtype);
  };
  std::vector<Tensor> result;
  result.reserve(5);
  result.push_back(like_input(D * P));
  result.push_back(empty<3>({D, B, P}, dtype));
  if (lstm) result.push_back(empty<3>({D, B, H}, dtype));
  const bool cells = lstm && (save_cells || save_for_backward);
  if (cells) result.push_back(like_input(D * H));
  if (save_for_backward) {
    // [D][rows][saved_gates][H], and zeros up to the size that all steps would take.
    const int64_t per_row = D * saved_gates(cell) * H;
    const int64_t all = is_packed ? rows : input.size(0) * input.size(1);
    result.push_back(empty<1>({all * per_row}, dtype));
    const int64_t bytes = element_bytes(f.dtype);
    std::memset(data(result.back()) + rows * per_row * bytes, 0,
                static_cast<size_t>((all - rows) * per_row * bytes));
  }
  if (lengths) {
    zero_padding(result[0], f.sequences, batch_first);
    if (cells) zero_padding(result[3], f.sequences, batch_first);
  }

  const int64_t bytes = element_bytes(f.dtype);
  f.input = step_tensor(input, batch_first, is_packed, 0);
  f.directions = static_cast<int>(D);
  for (int64_t d = 0; d < D; ++d) {
    Direction& dir = f.direction[d];
    if (!pack_here) dir.packed = data(packed[static_cast<size_t>(d)]);
    dir.reverse = d == 1;
    if (h0) dir.h0 = data(*h0) + d * B * P * bytes;
    if (lstm && c0) dir.c0 = data(*c0) + d * B * H * bytes;
    dir.output = step_tensor(result[0], batch_first, is_packed, d * P);
    dir.h_n = data(result[1]) + d * B * P * bytes;
    if (lstm) dir.c_n = data(result[2]) + d * B * H * bytes;
    if (cells) dir.cells = step_tensor(result[3], batch_first, is_packed, d * H);
    if (save_for_backward && saved_gates(cell) > 0) {
      dir.gates = data(result.back()) + d * rows * saved_gates(cell) * H * bytes;
    }
  }
  const Plan plan = make_plan(f.shape, rows, f.directions, f.format,
                              static_cast<int>(torch::stable::get_num_threads()));
  f.threads = plan.threads;
  f.apart = plan.apart;
  f.chunk_rows = plan.chunk_rows;
  f.beside_rows = plan.beside_rows;
  // Where all rows' input products are made at once, weights are packed by who needs them.
  const bool whole = rows <= plan.chunk_rows && rows * f.shape.I * bytes <= kStagedInput;
  const bool alike = format_of(weights[0]) == f.dtype;  // its members read weights as they do rows
  const bool pack_there = pack_here && whole && alike && !plan.apart && plan.beside_rows == 0;
  Weights own[2];
  for (int64_t d = 0; pack_here && d < D; ++d) {
    own[d] = weights_of(weights.data() + static_cast<size_t>(d) * count, count);
    if (pack_there) f.direction[d].unpacked = &own[d];
  }
  const int64_t block = pack_here ? round_up(chosen().packed_bytes(f.shape, f.format), 64) : 0;
  const Workspace workspace(D * block + chosen().forward_workspace(f));
  f.workspace = workspace.data() + D * block;
  for (int64_t d = 0; pack_here && d < D; ++d) {
    char* const to = workspace.data() + d * block;
    chosen().pack(f.shape, own[d], f.format, f.threads, !pack_there, to);
    f.direction[d].packed = to;
  }
  chosen().forward(f);
  return result;
}

std::vector<Tensor> rnn_backward(int64_t cell_number, Tensor input, std::vector<Tensor> weights,
                                 OptionalTensor h0, OptionalTensor c0, OptionalTensor lengths,
                                 OptionalTensor batch_sizes, bool batch_first, Tensor output,
                                 OptionalTensor cells, Tensor gates, OptionalTensor grad_output,
                                 OptionalTensor grad_h_n, OptionalTensor grad_c_n,
                                 OptionalTensor grad_cells) {
  const Cell cell = cell_of(cell_number);
  const auto [D, count] = WeightCounts(weights);
  STD_TORCH_CHECK(gates.dim() > 0 && gates.size(0) == D, "gates must be what rnn_forward saved");
  Backward f{};
  f.shape = shape_of(cell, weights.data(), count);
  STD_TORCH_CHECK(!f.shape.projected, "there is no backward through a projection");
  f.dtype = format_of(input);
  STD_TORCH_CHECK(f.dtype != Format::kFloat16, "there is no backward in float16");
  SequenceOrder order;
  f.sequences = sequences_of(input, lengths, batch_sizes, batch_first, order);
  const int64_t T = f.shape.T = f.sequences.T, B = f.shape.B = f.sequences.B;
  const int64_t H = f.shape.H, rows = f.sequences.rows();
  const bool lstm = cell == Cell::kLstm, is_packed = f.sequences.packed;
  STD_TORCH_CHECK(T > 0 && B > 0, "there must be at least one step and one sequence");
  check_state(h0, D, B, H, f.dtype, "h0");
  check_state(grad_h_n, D, B, H, f.dtype, "grad_h_n");
  if (lstm) {
    check_state(c0, D, B, H, f.dtype, "c0");
    check_state(grad_c_n, D, B, H, f.dtype, "grad_c_n");
  }
  const auto check_steps = [&](const Tensor& t, int64_t width, const char* name) {
    bool good = t.is_cpu() && t.dim() == input.dim() && format_of(t) == f.dtype &&
                t.size(t.dim() - 1) == width && t.stride(t.dim() - 1) == 1;
    for (int64_t i = 0; good && i + 1 < t.dim(); ++i) good = t.size(i) == input.size(i);
    STD_TORCH_CHECK(good, name, " must fit the input and have ", width, " contiguous features");
  };
  check_steps(input, f.shape.I, "input");
  check_steps(output, D * H, "output");
  if (grad_output) check_steps(*grad_output, D * H, "grad_output");
  STD_TORCH_CHECK(!lstm || cells, "backward of an LSTM needs its cells");
  if (lstm) check_steps(*cells, D * H, "cells");
  if (lstm && grad_cells) check_steps(*grad_cells, D * H, "grad_cells");
  STD_TORCH_CHECK(gates.is_contiguous() && format_of(gates) == f.dtype &&
                      gates.numel() == D * rows * saved_gates(cell) * H,
                  "gates must be what rnn_forward saved");

  const int32_t dtype = dtype_of(f.dtype);
  std::vector<Tensor> result;
  if (is_packed) {
    result.push_back(empty<2>({input.size(0), f.shape.I}, dtype));
  } else {
    result.push_back(empty<3>({input.size(0), input.size(1), f.shape.I}, dtype));
  }
  result.push_back(empty<3>({D, B, H}, dtype));
  if (lstm) result.push_back(empty<3>({D, B, H}, dtype));
  const size_t first_weight = result.size();
  for (const Tensor& w : weights) {
    STD_TORCH_CHECK(w.is_cpu() && format_of(w) == f.dtype, "weights must have the input's dtype");
    result.push_back(w.dim() == 2 ? empty<2>({w.size(0), w.size(1)}, dtype)
                                  : empty<1>({w.size(0)}, dtype));
  }
  if (lengths) zero_padding(result[0], f.sequences, batch_first);
  // Nobody's gradient then: a product is spared, and what is returned is at least a number.
  if (!h0) std::memset(data(result[1]), 0, static_cast<size_t>(D * B * H * element_bytes(f.dtype)));

  const int64_t bytes = element_bytes(f.dtype), state = B * H * bytes;
  f.input = step_tensor(input, batch_first, is_packed, 0);
  f.grad_input = step_tensor(result[0], batch_first, is_packed, 0);
  f.directions = static_cast<int>(D);
  for (int64_t d = 0; d < D; ++d) {
    BackwardDirection& dir = f.direction[d];
    dir.weights = weights_of(weights.data() + d * count, count);
    dir.reverse = d == 1;
    const auto of = [&](const OptionalTensor& t) { return t ? data(*t) + d * state : nullptr; };
    const auto steps = [&](const Tensor& t) {
      return step_tensor(t, batch_first, is_packed, d * H);
    };
    dir.h0 = of(h0);
    dir.grad_h_n = of(grad_h_n);
    dir.output = steps(output);
    if (grad_output) dir.grad_output = steps(*grad_output);
    if (h0) dir.grad_h0 = data(result[1]) + d * state;
    if (lstm) {
      dir.c0 = of(c0);
      dir.grad_c_n = of(grad_c_n);
      dir.cells = steps(*cells);
      if (grad_cells) dir.grad_cells = steps(*grad_cells);
      dir.grad_c0 = data(result[2]) + d * state;
    }
    if (saved_gates(cell) > 0) dir.gates = data(gates) + d * rows * saved_gates(cell) * H * bytes;
    const Tensor* grads = result.data() + first_weight + static_cast<size_t>(d) * count;
    dir.grad_ih = data(grads[0]);
    dir.grad_hh = data(grads[1]);
    if (count >= 4) dir.grad_b_ih = data(grads[2]), dir.grad_b_hh = data(grads[3]);
  }
  const Plan plan = make_backward_plan(f.shape, rows, f.dtype,
                                       static_cast<int>(torch::stable::get_num_threads()));
  f.threads = plan.threads;
  f.apart = plan.apart;
  f.chunk_rows = plan.chunk_rows;
  const Workspace workspace(chosen().backward_workspace(f));
  f.workspace = workspace.data();
  chosen().backward(f);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY(encdec_fast_cpu, m) {
  m.def("rnn_pack(int cell, Tensor[] weights, int weight_format) -> Tensor");
  m.def(
      "rnn_forward(int cell, Tensor input, Tensor[] weights, Tensor[] packed, Tensor? h0, Tensor? "
      "c0, "
      "Tensor? lengths, Tensor? batch_sizes, bool batch_first, bool save_cells, "
      "bool save_for_backward) -> Tensor[]");
  m.def(
      "rnn_backward(int cell, Tensor input, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? "
      "lengths, "
      "Tensor? batch_sizes, bool batch_first, Tensor output, Tensor? cells, Tensor gates, "
      "Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(encdec_fast_cpu, CPU, m) {
  m.impl("rnn_pack", TORCH_BOX(&rnn_pack));
  m.impl("rnn_forward", TORCH_BOX(&rnn_forward));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
}

}  // namespace encdec::rnn
