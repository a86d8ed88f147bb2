// The recurrent kernels of every instruction set that this processor has, on buffers of exactly the
// needed size (AddressSanitizer watches their ends): forward against loops in double, backward
// against differences of forward.
#include "rnn/rnn.h"

#include <cmath>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "buffers.h"
#include "check.h"
#include "isas.h"
#include "rnn/rnn_plan.h"

using namespace encdec;
using namespace encdec::rnn;

namespace {

struct Case {
  Shape shape;
  bool reverse, unequal, biased;
  int threads;
  int64_t chunk_rows = shape.B + 1;  // more than one chunk
  bool initial = true;               // backward: there is an initial state
};

// One direction of one layer, float32, padded (T, B) input.
struct Layer {
  Case c;
  std::vector<float> x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr;
  std::vector<float> y, cells, h_n, c_n, gates;
  std::vector<int64_t> lengths;
  SequenceOrder order;
  Sequences q;

  explicit Layer(const Case& c) : c(c) {
    const Shape& s = c.shape;
    const int64_t G = gate_count(s.cell);
    x = random_floats(s.T * s.B * s.I, 1.0f);
    h0 = random_floats(s.B * s.P, 0.9f);
    c0 = random_floats(s.B * s.H, 1.5f);
    w_ih = random_floats(G * s.H * s.I, 0.4f);
    w_hh = random_floats(G * s.H * s.P, 0.4f);
    b_ih = random_floats(G * s.H, 0.4f);
    b_hh = random_floats(G * s.H, 0.4f);
    if (s.projected) w_hr = random_floats(s.P * s.H, 0.4f);
    q.T = s.T;
    q.B = s.B;
    if (c.unequal) {
      for (int64_t b = 0; b < s.B; ++b) lengths.push_back(1 + (b * 5 + 2) % s.T);
      q = order.from_lengths(lengths.data(), s.B, s.T);
    }
  }

  Weights weights() {
    const Shape& s = c.shape;
    Weights w;
    w.dtype = Format::kFloat32;
    w.ih = chars(w_ih);
    w.hh = chars(w_hh);
    if (c.biased) w.b_ih = chars(b_ih), w.b_hh = chars(b_hh);
    if (s.projected) w.hr = chars(w_hr);
    w.ih_stride = s.I;
    w.hh_stride = s.P;
    w.hr_stride = s.H;
    return w;
  }

  StepTensor steps(std::vector<float>& v, int64_t width) {
    return {chars(v), c.shape.B * width * 4, width * 4};
  }

  // beside_rows: rows whose input products are made beside the steps; 0: a chunk's before them.
  // apart: a member takes sequences, not hidden units. packs: forward() packs the matrices.
  void forward(const Kernels& k, Format format, int beside_rows = 0, bool apart = false,
               bool packs = false) {
    const Shape& s = c.shape;
    Lines packed(k.packed_bytes(s, format));
    const Weights own = weights();
    k.pack(s, own, format, c.threads, !packs, packed.data);
    y.assign(static_cast<size_t>(s.T * s.B * s.P), 0.0f);
    cells.assign(static_cast<size_t>(s.T * s.B * s.H), 0.0f);
    h_n.assign(static_cast<size_t>(s.B * s.P), NAN);
    c_n.assign(static_cast<size_t>(s.B * s.H), NAN);
    gates.assign(static_cast<size_t>(q.rows() * saved_gates(s.cell) * s.H), NAN);
    Forward f{};
    f.shape = s;
    f.shape.T = q.T;
    f.sequences = q;
    f.dtype = Format::kFloat32;
    f.format = format;
    f.input = steps(x, s.I);
    Direction& d = f.direction[0];
    d.packed = packed.data;
    d.reverse = c.reverse;
    d.h0 = chars(h0);
    d.c0 = chars(c0);
    d.output = steps(y, s.P);
    d.cells = steps(cells, s.H);
    d.h_n = chars(h_n);
    d.c_n = chars(c_n);
    // At a line's beginning an LSTM's may take the place of the input products.
    Lines lines(static_cast<int64_t>(gates.size()) * 4);
    if (saved_gates(s.cell) > 0) d.gates = packs ? lines.data : chars(gates);
    if (packs) d.unpacked = &own;
    f.threads = c.threads;
    f.apart = apart;
    f.beside_rows = beside_rows;
    f.chunk_rows = beside_rows > 0 ? 2 * beside_rows : packs ? q.rows() : c.chunk_rows;
    Lines workspace(k.forward_workspace(f));
    f.workspace = workspace.data;
    k.forward(f);
    if (packs && !gates.empty()) std::memcpy(gates.data(), lines.data, gates.size() * 4);
  }

  static double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }

  // Loops in double; the state after the last step in h and c.
  void reference(std::vector<double>& out, std::vector<double>& h,
                 std::vector<double>& cell) const {
    const Shape& s = c.shape;
    out.assign(y.size(), 0.0);
    h.assign(h0.begin(), h0.end());
    cell.assign(c0.begin(), c0.end());
    const int64_t G = gate_count(s.cell);
    for (int64_t b = 0; b < s.B; ++b) {
      const int64_t n = c.unequal ? lengths[b] : s.T;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t t = c.reverse ? n - 1 - i : i;
        std::vector<double> from_x(G * s.H), from_h(G * s.H), m(s.H);
        for (int64_t g = 0; g < G * s.H; ++g) {
          from_x[g] = c.biased ? b_ih[g] : 0.0;
          from_h[g] = c.biased ? b_hh[g] : 0.0;
          for (int64_t j = 0; j < s.I; ++j) {
            from_x[g] += double(w_ih[g * s.I + j]) * x[(t * s.B + b) * s.I + j];
          }
          for (int64_t j = 0; j < s.P; ++j) from_h[g] += w_hh[g * s.P + j] * h[b * s.P + j];
        }
        for (int64_t u = 0; u < s.H; ++u) {
          const auto pre = [&](int g) { return from_x[g * s.H + u] + from_h[g * s.H + u]; };
          if (s.cell == Cell::kLstm) {
            double& cu = cell[b * s.H + u];
            cu = sigmoid(pre(1)) * cu + sigmoid(pre(0)) * std::tanh(pre(2));
            m[u] = sigmoid(pre(3)) * std::tanh(cu);
          } else if (s.cell == Cell::kGru) {
            const double z = sigmoid(pre(1));
            const double fresh =
                std::tanh(from_x[2 * s.H + u] + sigmoid(pre(0)) * from_h[2 * s.H + u]);
            m[u] = (1 - z) * fresh + z * h[b * s.H + u];
          } else {
            m[u] = s.cell == Cell::kTanh ? std::tanh(pre(0)) : std::fmax(0.0, pre(0));
          }
        }
        for (int64_t p = 0; p < s.P; ++p) {
          double sum = s.projected ? 0.0 : m[p];
          for (int64_t u = 0; s.projected && u < s.H; ++u) sum += w_hr[p * s.H + u] * m[u];
          h[b * s.P + p] = out[(t * s.B + b) * s.P + p] = sum;
        }
      }
    }
  }
};

void check_forward(Layer& layer, double tolerance) {
  std::vector<double> out, h, cell;
  layer.reference(out, h, cell);
  for (size_t i = 0; i < out.size(); ++i) CHECK_NEAR(layer.y[i], out[i], tolerance);
  for (size_t i = 0; i < h.size(); ++i) CHECK_NEAR(layer.h_n[i], h[i], tolerance);
  if (layer.c.shape.cell == Cell::kLstm) {
    for (size_t i = 0; i < cell.size(); ++i) CHECK_NEAR(layer.c_n[i], cell[i], 2 * tolerance);
  }
}

void test_forward(const Kernels& k, const Case& c, Format format, double tolerance) {
  Layer layer(c);
  layer.forward(k, format);
  check_forward(layer, tolerance);
}

void check_same(const Layer& a, const Layer& b) {
  const Cell cell = a.c.shape.cell;
  CHECK(a.y == b.y);
  CHECK(a.h_n == b.h_n);
  CHECK(cell != Cell::kLstm || (a.c_n == b.c_n && a.cells == b.cells));
  CHECK(saved_gates(cell) == 0 || a.gates == b.gates);
}

// Sequences over threads: bit for bit what hidden units over threads give, but that sums of floats
// are split where few rows run.
void test_apart(const Kernels& k, Cell cell, Format format, double tolerance) {
  for (int variant = 0; variant < 8; ++variant) {
    const bool projected = cell == Cell::kLstm && variant % 3 == 2;
    const bool unequal = variant / 4 == 1;
    const int threads = 2 + variant % 2;
    const Case c{{cell, 7, 8 * threads + variant, 20, 50, projected ? 30 : 50, projected},
                 variant / 2 % 2 == 1,
                 unequal,
                 true,
                 threads};
    Layer layer(c);
    layer.forward(k, format);
    const Layer plain = layer;
    layer.forward(k, format, 0, true);
    if (unequal && format != Format::kInt8) {
      check_forward(layer, tolerance);
    } else {
      check_same(layer, plain);
    }
  }
}

// Weights that forward packs itself, and gates in the place of input products: what comes of
// weights that were packed before, bit for bit where tiles have as many rows.
void test_packs(const Kernels& k, const Case& c, double tolerance) {
  Layer layer(c);
  layer.c.chunk_rows = layer.q.rows();
  layer.forward(k, Format::kFloat32);
  const Layer plain = layer;
  layer.forward(k, Format::kFloat32, 0, false, true);
  check_forward(layer, tolerance);
  check_same(layer, plain);
}

// One sequence whose input products are made beside its steps, for all lengths that leave over
// another number of rows: bit for bit what comes of a whole chunk before them.
void test_beside(const Kernels& k, Isa isa, Cell cell, Format format) {
  constexpr int64_t kHidden = 140;  // two members: the last group of panels is not whole
  const int64_t least = cell == Cell::kGru ? 12 : 16;
  for (int64_t T = least; T < 33; ++T) {
    const int threads = cell == Cell::kTanh || cell == Cell::kRelu ? 1 : 1 + T % 2;
    const bool projected = cell == Cell::kLstm && T % 5 == 0;
    const int64_t P = projected ? 50 : kHidden;
    const Case c{{cell, T, 1, T % 3 == 0 ? 300 : 40, kHidden, P, projected},
                 T % 4 < 2,
                 false,
                 true,
                 threads,
                 40};
    const int rows = k.rows_beside(c.shape, format, threads);
    const bool narrow = format == Format::kFloat32 || format == Format::kFloat16;
    CHECK_EQ(rows > 0, isa == Isa::kAvx512Bf16 || (isa != Isa::kAvx2 && narrow));
    if (rows == 0) continue;
    Layer layer(c);
    layer.forward(k, format);
    const Layer plain = layer;
    layer.forward(k, format, rows);
    check_same(layer, plain);
  }
  // Too few steps, more than one sequence, too few units for each member.
  const auto rows = [&](int64_t T, int64_t B, int64_t H) {
    return k.rows_beside({cell, T, B, 40, H, H, false}, format, 2);
  };
  CHECK_EQ(rows(least - 1, 1, 512), 0);
  CHECK_EQ(rows(40, 2, 512), 0);
  CHECK_EQ(rows(40, 1, 32), 0);
}

// The derivative of sum(y * weight) along a random direction of each argument.
void test_backward(const Kernels& k, const Case& c, bool apart) {
  Layer layer(c);
  if (!c.initial) layer.h0.assign(layer.h0.size(), 0.0f);
  layer.forward(k, Format::kFloat32);
  const Shape& s = c.shape;
  std::vector<float> gy = random_floats(static_cast<int64_t>(layer.y.size()), 1.0f);
  std::vector<float> gx(layer.x.size(), 0.0f), gh0(layer.h0.size()), gc0(layer.c0.size());
  std::vector<float> gih(layer.w_ih.size()), ghh(layer.w_hh.size());
  std::vector<float> gb_ih(layer.b_ih.size()), gb_hh(layer.b_hh.size());
  Backward f{};
  f.shape = s;
  f.shape.T = layer.q.T;
  f.sequences = layer.q;
  f.dtype = Format::kFloat32;
  f.input = layer.steps(layer.x, s.I);
  f.grad_input = layer.steps(gx, s.I);
  BackwardDirection& d = f.direction[0];
  d.weights = layer.weights();
  d.reverse = c.reverse;
  if (c.initial) d.h0 = chars(layer.h0), d.grad_h0 = chars(gh0);
  d.c0 = chars(layer.c0);
  d.output = layer.steps(layer.y, s.P);
  d.cells = layer.steps(layer.cells, s.H);
  d.gates = chars(layer.gates);
  d.grad_output = layer.steps(gy, s.P);
  d.grad_c0 = chars(gc0);
  d.grad_ih = chars(gih);
  d.grad_hh = chars(ghh);
  if (c.biased) d.grad_b_ih = chars(gb_ih), d.grad_b_hh = chars(gb_hh);
  f.threads = c.threads;
  f.apart = apart;
  f.chunk_rows = c.chunk_rows;
  Lines workspace(k.backward_workspace(f));
  f.workspace = workspace.data;
  k.backward(f);

  const auto loss = [&] {
    std::vector<double> out, h, cell;
    layer.reference(out, h, cell);
    double sum = 0.0;
    for (size_t i = 0; i < out.size(); ++i) sum += out[i] * gy[i];
    return sum;
  };
  const auto check = [&](std::vector<float>& argument, const std::vector<float>& grad) {
    const std::vector<float> kept = argument;
    const std::vector<float> way = random_floats(static_cast<int64_t>(kept.size()), 1.0f);
    double along = 0.0, size = 0.0, values[2];
    constexpr float kStep = 1.0f / 512;
    for (int side = 0; side < 2; ++side) {
      for (size_t i = 0; i < kept.size(); ++i)
        argument[i] = kept[i] + (side ? -kStep : kStep) * way[i];
      values[side] = loss();
    }
    argument = kept;
    for (size_t i = 0; i < kept.size(); ++i) {
      along += double(grad[i]) * way[i];
      size += std::fabs(double(grad[i]) * way[i]);
    }
    CHECK_NEAR((values[0] - values[1]) / (2 * kStep), along, 2e-3 * size + 1e-4);
  };
  check(layer.x, gx);
  if (c.initial) check(layer.h0, gh0);
  if (s.cell == Cell::kLstm) check(layer.c0, gc0);
  check(layer.w_ih, gih);
  check(layer.w_hh, ghh);
  if (c.biased) check(layer.b_ih, gb_ih), check(layer.b_hh, gb_hh);
}

}  // namespace

void run_tests() {
  for (const Isa isa : kAllIsas) {
    if (!use_isa(isa)) continue;
    const Kernels& k = kernels(isa);
    for (const Cell cell : {Cell::kLstm, Cell::kGru, Cell::kTanh, Cell::kRelu}) {
      const double scale = cell == Cell::kRelu ? 40 : 1;
      for (const auto& [format, tolerance] : {std::pair{Format::kFloat32, 5e-6 * scale},
                                              {Format::kBfloat16, 5e-2 * scale},
                                              {Format::kFloat16, 2e-2 * scale},
                                              {Format::kInt8, 0.1 * scale}}) {
        test_beside(k, isa, cell, format);
        test_apart(k, cell, format, tolerance);
      }
      for (const int64_t H : {1, 33, 48}) {
        for (int variant = 0; variant < 8; ++variant) {
          const bool projected = cell == Cell::kLstm && variant % 3 == 2;
          const Case c{{cell, 5, 17, 7, H, projected ? 1 + H / 2 : H, projected},
                       variant % 2 == 1,
                       variant / 2 % 2 == 1,
                       variant != 4,
                       1 + variant / 4};
          test_forward(k, c, Format::kFloat32, 5e-6 * scale);
          test_forward(k, c, Format::kBfloat16, 5e-2 * scale);
          test_forward(k, c, Format::kFloat16, 2e-2 * scale);
          test_forward(k, c, Format::kInt8, 0.1 * scale);
          test_packs(k, c, 5e-6 * scale);
          if (projected || cell == Cell::kRelu) continue;
          test_backward(k, c, false);
          if (c.threads > 1) test_backward(k, c, true);
          Case from_nothing = c;  // in one chunk
          from_nothing.initial = false;
          from_nothing.chunk_rows = c.shape.T * c.shape.B;
          test_backward(k, from_nothing, false);
        }
      }
    }
  }
}
