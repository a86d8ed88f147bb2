// The recurrences for GPUs, run on the CPU with threads in random order (gpu_on_cpu.h): right for
// every form, chunk and dtype, and wrong as soon as any barrier, fence or wait is left out.
#include "rnn/rnn_gpu.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffers.h"
#include "check.h"
#include "core/gpu.cuh"

using namespace encdec;
using namespace encdec::rnn::gpu;
using rnn::Cell;
using rnn::gate_count;
namespace on_cpu = encdec::gpu::cpu;

namespace {

// Numbers of the case's dtype, and the values that they have.
class Numbers {
 public:
  Numbers(Format dtype, int64_t n, float scale) : Numbers(dtype, random_floats(n, scale)) {}
  Numbers(Format dtype, const std::vector<float>& values)
      : dtype_(dtype), bytes_(values.size() * static_cast<size_t>(element_bytes(dtype))) {
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  void* data() { return bytes_.data(); }
  float operator[](int64_t i) const {
    const char* at = bytes_.data() + i * element_bytes(dtype_);
    if (dtype_ == Format::kBfloat16) return encdec::gpu::to_float(read<encdec::gpu::Bfloat16>(at));
    if (dtype_ == Format::kFloat16) return encdec::gpu::to_float(read<encdec::gpu::Float16>(at));
    return read<float>(at);
  }

 private:
  template <class T>
  static T read(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof(T));
    return value;
  }
  template <class T>
  void put(size_t i, float value) {
    const T rounded = encdec::gpu::from_float<T>(value);
    std::memcpy(bytes_.data() + i * sizeof(T), &rounded, sizeof(T));
  }
  void set(size_t i, float value) {
    if (dtype_ == Format::kBfloat16) return put<encdec::gpu::Bfloat16>(i, value);
    if (dtype_ == Format::kFloat16) return put<encdec::gpu::Float16>(i, value);
    put<float>(i, value);
  }
  Format dtype_;
  std::vector<char> bytes_;
};

struct Case {
  Shape shape;
  Plan plan;
  int T;
  bool unequal, resets;
};

// A padded batch in (T, B) order, whose sequences are in order of falling length.
struct Layer {
  Case c;
  int64_t T, B, H, D, G;
  std::vector<int32_t> lengths;
  std::vector<uint8_t> resets;
  std::vector<float> products;
  Numbers weight, h0, c0, grad_output, grad_h_n;

  explicit Layer(const Case& c)
      : c(c),
        T(c.T),
        B(c.shape.B),
        H(c.shape.H),
        D(c.shape.directions),
        G(gate_count(c.shape.cell)),
        lengths(static_cast<size_t>(B)),
        resets(static_cast<size_t>(T * B)),
        products(random_floats(T * B * D * G * H)),
        weight(c.shape.dtype, D * G * H * H, 0.5f),
        h0(c.shape.dtype, D * B * H, 0.9f),
        c0(c.shape.dtype, D * B * H, 1.0f),
        grad_output(c.shape.dtype, T * B * D * H, 1.0f),
        grad_h_n(c.shape.dtype, D * B * H, 1.0f) {
    for (int64_t n = 0; n < B; ++n) {
      lengths[static_cast<size_t>(n)] =
          static_cast<int32_t>(c.unequal ? T - n * (T - 1) / (B > 1 ? B - 1 : 1) : T);
    }
    for (size_t i = 0; i < resets.size(); ++i) resets[i] = c.resets && i % 5 == 3;
  }

  // In doubles; results like the kernel's.
  struct Results {
    std::vector<double> output, c, h_n;
  };

  double sigmoid(double x) const { return 1 / (1 + std::exp(-x)); }

  Results reference() const {
    Results r;
    r.output.assign(static_cast<size_t>(T * B * D * H), 0);
    r.c.assign(static_cast<size_t>(D * B * H), 0);
    r.h_n = r.c;
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t n = 0; n < B; ++n) {
        std::vector<double> h(static_cast<size_t>(H)), cell(h);
        for (int64_t u = 0; u < H; ++u) {
          h[u] = h0[(d * B + n) * H + u];
          cell[u] = c0[(d * B + n) * H + u];
        }
        for (int64_t j = 0; j < lengths[n]; ++j) {
          const int64_t t = d == 0 ? j : lengths[n] - 1 - j, row = t * B + n;
          if (resets[row]) h.assign(h.size(), 0), cell.assign(h.size(), 0);
          std::vector<double> next(h.size());
          for (int64_t u = 0; u < H; ++u) {
            double x[4], of_h[4] = {};
            for (int64_t g = 0; g < G; ++g) {
              x[g] = products[((row * D + d) * G + g) * H + u];
              for (int64_t k = 0; k < H; ++k) {
                of_h[g] += static_cast<double>(weight[((d * G + g) * H + u) * H + k]) * h[k];
              }
            }
            if (c.shape.cell == Cell::kLstm) {
              cell[u] = sigmoid(x[1] + of_h[1]) * cell[u] +
                        sigmoid(x[0] + of_h[0]) * std::tanh(x[2] + of_h[2]);
              next[u] = sigmoid(x[3] + of_h[3]) * std::tanh(cell[u]);
            } else {
              const double z = sigmoid(x[1] + of_h[1]);
              const double fresh = std::tanh(x[2] + sigmoid(x[0] + of_h[0]) * of_h[2]);
              next[u] = fresh + z * (h[u] - fresh);
            }
          }
          h = next;
          for (int64_t u = 0; u < H; ++u) r.output[(row * D + d) * H + u] = h[u];
        }
        for (int64_t u = 0; u < H; ++u) {
          r.h_n[(d * B + n) * H + u] = h[u];
          r.c[(d * B + n) * H + u] = cell[u];
        }
      }
    }
    return r;
  }

  Steps steps() const {
    Steps s{};
    s.T = static_cast<int32_t>(T), s.B = static_cast<int32_t>(B), s.H = static_cast<int32_t>(H);
    s.directions = static_cast<int32_t>(D);
    s.rows = T * B;
    s.step = B, s.sequence = 1;
    if (c.unequal) s.lengths = lengths.data();
    if (c.resets) s.resets = resets.data();
    return s;
  }

  // What the kernels leave.
  struct State {
    Numbers output, h_n, cells, gates;
    std::vector<float> carry;
  };

  State forward() {
    const Format dtype = c.shape.dtype;
    const bool lstm = c.shape.cell == Cell::kLstm;
    const auto zeros = [&](int64_t n) {
      return Numbers(dtype, std::vector<float>(static_cast<size_t>(n)));
    };
    State s{zeros(T * B * D * H), zeros(D * B * H), zeros(T * B * D * H), zeros(T * B * D * 4 * H),
            std::vector<float>(static_cast<size_t>(D * B * H))};
    for (size_t i = 0; i < s.carry.size(); ++i) s.carry[i] = c0[static_cast<int64_t>(i)];
    Forward f{};
    f.steps = steps();
    f.products = products.data();
    f.weight = weight.data();
    f.h0 = h0.data();
    if (lstm) f.c = s.carry.data(), f.cells = s.cells.data();
    f.output = s.output.data();
    f.gates = s.gates.data();
    f.h_n = s.h_n.data();
    const Shape shape = of(false);
    std::vector<char> exchange(static_cast<size_t>(exchange_bytes(shape, c.plan)));
    (lstm ? lstm_forward : gru_forward)(f, shape, c.plan, exchange.data(), nullptr);
    return s;
  }

  struct Grads {
    Numbers grads, previous, grad_h0;
    std::vector<float> carry;
  };

  Grads backward(State& s) {
    const Format dtype = c.shape.dtype;
    const bool lstm = c.shape.cell == Cell::kLstm;
    const auto zeros = [&](int64_t n) {
      return Numbers(dtype, std::vector<float>(static_cast<size_t>(n)));
    };
    Grads g{zeros(T * B * D * 4 * H), zeros(T * B * D * H), zeros(D * B * H),
            std::vector<float>(static_cast<size_t>(D * B * H))};
    std::vector<float> transposed(static_cast<size_t>(D * G * H * H));
    for (int64_t m = 0; m < D * G; ++m) {
      for (int64_t u = 0; u < H; ++u) {
        for (int64_t k = 0; k < H; ++k) {
          transposed[(m * H + k) * H + u] = weight[(m * H + u) * H + k];
        }
      }
    }
    Numbers turned(dtype, transposed);
    Backward b{};
    b.steps = steps();
    b.grad_output = grad_output.data();
    b.grad_h_n = grad_h_n.data();
    b.weight = turned.data();
    b.gates = s.gates.data();
    b.output = s.output.data();
    b.cells = s.cells.data();
    b.h0 = h0.data();
    b.c0 = c0.data();
    b.grads = g.grads.data();
    b.previous = g.previous.data();
    b.carry = g.carry.data();
    b.grad_h0 = g.grad_h0.data();
    const Shape shape = of(true);
    std::vector<char> exchange(static_cast<size_t>(exchange_bytes(shape, c.plan)));
    (lstm ? lstm_backward : gru_backward)(b, shape, c.plan, exchange.data(), nullptr);
    return g;
  }

  Shape of(bool backward) const {
    Shape shape = c.shape;
    shape.backward = backward;
    return shape;
  }
};

Plan plan(bool cluster, int tile, int chunk, int row_groups, int k_groups, int slice, int launch,
          int H) {
  Plan p{};
  p.cluster = cluster;
  p.tile = tile;
  p.chunk = chunk;
  p.row_groups = row_groups;
  p.k_groups = k_groups;
  p.slice = slice;
  p.launch = launch;
  p.blocks = (H + row_groups * kUnits - 1) / (row_groups * kUnits);
  return p;
}

double tolerance(Format dtype) {
  return dtype == Format::kFloat32 ? 2e-5 : dtype == Format::kFloat16 ? 4e-3 : 3e-2;
}

bool forward_is_right(Layer& layer) {
  const auto expected = layer.reference();
  const auto found = layer.forward();
  const double allowed = tolerance(layer.c.shape.dtype);
  const auto agree = [&](const std::vector<double>& a, const auto& b) {
    for (size_t i = 0; i < a.size(); ++i) {
      if (!check::near(a[i], b[static_cast<int64_t>(i)], allowed)) return false;
    }
    return true;
  };
  return agree(expected.output, found.output) && agree(expected.h_n, found.h_n) &&
         (layer.c.shape.cell != Cell::kLstm || agree(expected.c, found.carry));
}

// The gradients of h0 against differences of the reference, in float32.
bool backward_is_right(Layer& layer) {
  auto state = layer.forward();
  const auto found = layer.backward(state);
  const auto loss = [&] {
    const auto r = layer.reference();
    double sum = 0;
    for (size_t i = 0; i < r.output.size(); ++i) {
      sum += r.output[i] * layer.grad_output[static_cast<int64_t>(i)];
    }
    for (size_t i = 0; i < r.h_n.size(); ++i) {
      sum += r.h_n[i] * layer.grad_h_n[static_cast<int64_t>(i)];
    }
    return sum;
  };
  const auto slope = [&](float* x) {
    const float was = *x, step = 1.0f / 256;
    *x = was + step;
    const double up = loss();
    *x = was - step;
    const double down = loss();
    *x = was;
    return (up - down) / (2 * step);
  };
  float* const h0 = static_cast<float*>(layer.h0.data());
  bool right = true;
  const int64_t rows = layer.D * layer.B, H = layer.H;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * H + (row * 7 + 3) % H;
    right = right && check::near(found.grad_h0[at], slope(h0 + at), 2e-3);
  }
  // The gradient of a product is that of what enters the gate.
  const int64_t G = layer.G;
  for (int64_t i = 0; i < 6; ++i) {
    const int64_t n = i % layer.B, t = i * 5 % layer.lengths[static_cast<size_t>(n)];
    const int64_t row = (t * layer.B + n) * layer.D + i % layer.D, u = (i * 11 + 1) % H, g = i % G;
    const double grad = found.grads[(row * 4 + g) * H + u];
    right = right && check::near(grad, slope(&layer.products[(row * G + g) * H + u]), 2e-3);
  }
  return right;
}

constexpr Shape shape(Cell cell, Format dtype, int B, int H, int D = 1) {
  return {cell, dtype, false, B, H, D, 1};
}

void test_every_kernel() {
  const Cell cells[] = {Cell::kLstm, Cell::kGru};
  const Format dtypes[] = {Format::kFloat32, Format::kBfloat16, Format::kFloat16};
  uint64_t seed = 1;
  for (const Cell cell : cells) {
    for (const Format dtype : dtypes) {
      for (const bool cluster : {false, true}) {
        for (const int tile : {8, 1, 4}) {
          if (tile != kTensorCoresTile && dtype != Format::kFloat32) continue;
          on_cpu::options().seed = ++seed;
          const int B = tile + 1;
          // Two slices, the second of one sequence; in two launches where there is no cluster.
          Layer layer({shape(cell, dtype, B, 40), plan(cluster, tile, tile, 1, 2, tile, tile, 40),
                       4, true, true});
          CHECK(forward_is_right(layer));
          if (dtype == Format::kFloat32) CHECK(backward_is_right(layer));
        }
      }
    }
  }
}

// Weights that do not fit the registers, several chunks, two directions, row groups, no lengths.
void test_larger() {
  for (const bool cluster : {false, true}) {
    on_cpu::options().seed = cluster ? 5 : 6;
    Layer layer({shape(Cell::kLstm, Format::kFloat32, 11, 88, 2),
                 plan(cluster, 8, 8, 2, 2, 11, 11, 88), 3, false, false});
    CHECK(shared_layout(layer.of(false), layer.c.plan).spilled == 0);
    CHECK(forward_is_right(layer));
    CHECK(backward_is_right(layer));
    Layer spills({shape(Cell::kGru, Format::kFloat32, 3, 136), plan(cluster, 8, 8, 2, 2, 3, 3, 136),
                  3, true, false});
    CHECK(shared_layout(spills.of(false), spills.c.plan).spilled > 0);
    CHECK(forward_is_right(spills));
    // A chunk of two tiles, the second of which is not full.
    Layer two({shape(Cell::kLstm, Format::kBfloat16, 13, 64),
               plan(cluster, 8, 16, 1, 4, 13, 13, 64), 3, true, false});
    CHECK(forward_is_right(two));
  }
}

// LSTM layers of one direction, in one launch and one after the other.
struct Stack {
  static constexpr int kLayers = 3;
  Case c;
  std::vector<Layer> layers;
  Numbers input_weight;
  std::vector<float> input_bias;

  explicit Stack(const Case& c)
      : c(c),
        layers(kLayers, Layer(c)),
        input_weight(c.shape.dtype, (kLayers - 1) * 4 * c.shape.H * c.shape.H, 0.4f),
        input_bias(random_floats((kLayers - 1) * 4 * c.shape.H)) {
    for (Layer& layer : layers) layer = Layer(c);
  }

  std::vector<Layer::State> by_themselves() {
    std::vector<Layer::State> found;
    const int64_t H = c.shape.H, rows = c.T * c.shape.B;
    for (int64_t l = 0; l < kLayers; ++l) {
      Layer& own = layers[static_cast<size_t>(l)];
      for (int64_t row = 0; l > 0 && row < rows; ++row) {
        for (int64_t n = 0; n < 4 * H; ++n) {
          double sum = input_bias[static_cast<size_t>((l - 1) * 4 * H + n)];
          for (int64_t k = 0; k < H; ++k) {
            sum += static_cast<double>(input_weight[((l - 1) * 4 * H + n) * H + k]) *
                   found.back().output[row * H + k];
          }
          own.products[static_cast<size_t>(row * 4 * H + n)] = static_cast<float>(sum);
        }
      }
      found.push_back(own.forward());
    }
    return found;
  }

  // Whether one launch leaves the last layer's output and the states of all.
  bool is_right(const std::vector<Layer::State>& expected, double allowed) {
    const Format dtype = c.shape.dtype;
    const int64_t H = c.shape.H, B = c.shape.B, rows = c.T * B;
    const auto joined = [&](auto of, int64_t each) {
      std::vector<float> all;
      for (Layer& layer : layers) {
        for (int64_t i = 0; i < each; ++i) all.push_back(of(layer)[i]);
      }
      return Numbers(dtype, all);
    };
    Numbers weight = joined([](Layer& l) -> Numbers& { return l.weight; }, 4 * H * H);
    Numbers h0 = joined([](Layer& l) -> Numbers& { return l.h0; }, B* H);
    const Numbers c0 = joined([](Layer& l) -> Numbers& { return l.c0; }, B* H);
    const auto zeros = [&](int64_t n) {
      return Numbers(dtype, std::vector<float>(static_cast<size_t>(n)));
    };
    Numbers output = zeros(rows * H), h_n = zeros(kLayers * B * H),
            handed = zeros((kLayers - 1) * rows * H);
    std::vector<float> carry;
    for (int64_t i = 0; i < kLayers * B * H; ++i) carry.push_back(c0[i]);
    Shape shape = c.shape;
    shape.layers = kLayers;
    std::vector<char> exchange(static_cast<size_t>(exchange_bytes(shape, c.plan)));
    Forward f{};
    f.steps = layers[0].steps();
    f.layers = kLayers;
    f.products = layers[0].products.data();
    f.weight = weight.data(), f.h0 = h0.data(), f.c = carry.data();
    f.output = output.data(), f.h_n = h_n.data();
    f.input_weight = input_weight.data(), f.input_bias = input_bias.data();
    f.handed_up = handed.data();
    f.finished = reinterpret_cast<uint32_t*>(exchange.data() + exchange.size() -
                                             finished_bytes(shape, c.plan));
    lstm_forward(f, shape, c.plan, exchange.data(), nullptr);
    bool right = true;
    for (int64_t i = 0; i < rows * H; ++i) {
      right = right && check::near(output[i], expected.back().output[i], allowed);
    }
    for (int64_t i = 0; i < kLayers * B * H; ++i) {
      const auto& own = expected[static_cast<size_t>(i / (B * H))];
      const int64_t at = i % (B * H);
      right =
          right && check::near(h_n[i], own.h_n[at], allowed) &&
          check::near(carry[static_cast<size_t>(i)], own.carry[static_cast<size_t>(at)], allowed);
    }
    return right;
  }
};

void test_layers() {
  for (const bool cluster : {false, true}) {
    for (const bool unequal : {false, true}) {
      on_cpu::options() = {};
      on_cpu::options().seed = cluster ? 11 : 12;
      Stack stack({shape(Cell::kLstm, Format::kFloat32, 9, 40), plan(cluster, 8, 8, 1, 2, 9, 9, 40),
                   4, unequal, unequal});
      CHECK(stack.is_right(stack.by_themselves(), 2e-5));
    }
  }
}

// That every barrier, fence and wait is needed: without it some order of threads shows.
void check_all_are_needed(const std::function<bool()>& right, size_t at_least) {
  for (const std::string& site : on_cpu::not_needed(right, 60)) {
    std::printf("nothing shows that %s is needed\n", site.c_str());
    CHECK(false);
  }
  CHECK(on_cpu::options().sites.size() >= at_least);
  on_cpu::options() = {};
}

void test_mutations() {
  for (const bool cluster : {false, true}) {
    // Two chunks, so that the barrier between them counts; two blocks, two row groups.
    const Case c{shape(Cell::kLstm, Format::kFloat32, 9, 64), plan(cluster, 8, 8, 2, 2, 9, 9, 64),
                 5, false, false};
    Layer layer(c);
    check_all_are_needed([&] { return forward_is_right(layer); }, cluster ? 7 : 9);
    Stack stack(c);
    on_cpu::options() = {};
    const auto expected = stack.by_themselves();
    check_all_are_needed([&] { return stack.is_right(expected, 2e-5); }, 12);
  }
}

// Of a device with clusters of up to so many blocks, in one group of multiprocessors.
Limits limits(int32_t capability, int32_t processors, int32_t shared_bytes, int largest) {
  Limits l{capability, processors, shared_bytes, {}};
  for (int blocks = 1; blocks <= largest; ++blocks) l.clusters[blocks] = processors / blocks;
  return l;
}

// A row group without units is nobody's to wait for, and must not wait itself.
void test_idle_row_groups() {
  for (uint64_t seed = 1; seed < 30; ++seed) {
    on_cpu::options() = {};
    on_cpu::options().seed = seed;
    Layer layer({shape(Cell::kLstm, Format::kFloat32, 1, 40), plan(true, 8, 8, 2, 2, 1, 1, 40), 12,
                 false, false});
    bool right = false;
    try {
      right = forward_is_right(layer);
    } catch (const std::runtime_error& error) {
      std::printf("%s\n", error.what());
    }
    CHECK(right);
  }
  on_cpu::options() = {};
}

void test_plans() {
  const Limits h200 = limits(90, 132, 232448, 16), a100 = limits(80, 108, 166912, 0),
               small = limits(120, 84, 101376, 8);
  Plan p;
  std::string why;
  const Shape usual = shape(Cell::kLstm, Format::kBfloat16, 16, 512);
  CHECK(make_plan(usual, h200, p, why));
  CHECK(p.cluster && p.tile == kTensorCoresTile && p.blocks <= 16);
  CHECK_EQ(shared_layout(usual, p).spilled, 0);
  CHECK(refuse(usual, h200, p).empty());
  CHECK(!refuse(usual, a100, p).empty());
  CHECK(make_plan(usual, a100, p, why));
  CHECK(!p.cluster);
  CHECK(make_plan(usual, small, p, why));
  // Too large for a cluster, not for a grid.
  const Shape large = shape(Cell::kLstm, Format::kFloat32, 8, 1024, 1);
  CHECK(make_plan(large, h200, p, why));
  CHECK(!p.cluster);
  CHECK(!make_plan(shape(Cell::kLstm, Format::kFloat32, 64, 8192), h200, p, why));
  CHECK(!why.empty());
  CHECK(!make_plan(usual, limits(75, 40, 65536, 0), p, why));
  // A product so large that a library is better at it.
  Shape backward = shape(Cell::kLstm, Format::kFloat32, 64, 1024);
  backward.backward = true;
  CHECK(make_plan(backward, h200, p, why));
  CHECK(slower(backward, p).find("again") != std::string::npos);
  CHECK(make_plan(usual, h200, p, why) && slower(usual, p).empty());
  // More sequences than a launch can have are cut into several.
  CHECK(make_plan(shape(Cell::kLstm, Format::kFloat32, 128, 512), limits(89, 128, 101376, 0), p,
                  why));
  CHECK(p.launch < 128);
  // Sizes that 32 bits do not hold, and more slices than a grid has.
  Shape huge = shape(Cell::kLstm, Format::kFloat32, 140000, 1024);
  huge.backward = true;
  for (const Limits& l : {h200, a100, small}) {
    if (make_plan(huge, l, p, why)) CHECK(p.shared_bytes > 0 && p.shared_bytes <= l.shared_bytes);
  }
  CHECK(make_plan(shape(Cell::kLstm, Format::kFloat32, 600000, 512), h200, p, why));
  CHECK(p.slices(p.launch) <= 65535);
  // A device whose groups of multiprocessors hold no cluster of sixteen.
  Limits cut = h200;
  for (int blocks = 9; blocks <= kMaxCluster; ++blocks) cut.clusters[blocks] = 0;
  CHECK(make_plan(usual, cut, p, why));
  CHECK(!p.cluster || p.blocks <= 8);
}

}  // namespace

void run_tests() {
  test_plans();
  test_every_kernel();
  test_larger();
  test_idle_row_groups();
  test_layers();
  test_mutations();
}
