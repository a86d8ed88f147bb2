// The attention decoder in every dtype and on every instruction set that the machine has, on
// buffers of exactly the sizes that a call has: forward against sums in double, gradients against
// its differences.
#include "decoder/attention_decoder.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <vector>

#include "buffers.h"
#include "check.h"
#include "isas.h"
#include "rnn/rnn_plan.h"

using namespace encdec;
using namespace encdec::decoder;

namespace {

using Numbers = std::vector<float>;

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// A decoder's sizes, tensors and gradients of its results. LSTM: 4 gates, GRU: 3. Of location A
// positions have scores, at least S. output: with W_o; else F = M. cover: with coverage.
struct Decoder {
  rnn::Cell cell;
  Score score;
  bool output, cover;
  int64_t B, T, S, I, H, A, M;
  int64_t gates = rnn::gate_count(cell), F = output ? M + 3 : M;
  int64_t W = score == Score::kLocation ? A : S;  // numbers in a row of weights
  Numbers x = random_floats(B * T * I), h0 = random_floats(B * H), c0 = random_floats(B * H),
          f0 = random_floats(B * F), keys = random_floats(B * S * A),
          values = random_floats(B * S * M), w_ih = random_floats(gates * H * (I + F), 0.5f),
          w_hh = random_floats(gates * H * H, 0.5f), b_ih = random_floats(gates * H),
          b_hh = random_floats(gates * H), w_q = random_floats(A * H, 0.5f), v = random_floats(A),
          positions = random_floats(B * T * A), coverage = random_floats(B * S),
          u = random_floats(A), w_o = random_floats(F * (M + H), 0.5f),
          grad = random_floats(B * T * (H + F)), grad_w = random_floats(B * T * W);
  std::vector<int64_t> lengths;
  // Numbers that a dtype has.
  void round_to(Format format) {
    for (Numbers* t : {&x, &h0, &c0, &f0, &keys, &values, &w_ih, &w_hh, &b_ih, &b_hh, &w_q, &v,
                       &positions, &coverage, &u, &w_o, &grad}) {
      for (float& number : *t) {
        char bytes[4];
        put_number(format, bytes, number);
        number = get_number(format, bytes);
      }
    }
  }
  Decoder(rnn::Cell cell, Score score, bool output, bool cover, int64_t B, int64_t T, int64_t S,
          int64_t I, int64_t H, int64_t A, int64_t M)
      : cell(cell),
        score(score),
        output(output),
        cover(cover),
        B(B),
        T(T),
        S(S),
        I(I),
        H(H),
        A(A),
        M(M) {
    for (int64_t b = 0; b < B; ++b) lengths.push_back(b % 3 == 1 ? S / 2 : b % 3 == 2 ? 0 : S);
  }

  // The sum of grad * results, with *at moved by `step`.
  double loss(double step, const float* at) const {
    const auto value = [&](const Numbers& t, int64_t i) {
      const float* p = &t[static_cast<size_t>(i)];
      return double(*p) + (p == at ? step : 0.0);
    };
    double total = 0.0;
    for (int64_t b = 0; b < B; ++b) {
      std::vector<double> h, c, f, sums;
      for (int64_t s = 0; s < S; ++s) sums.push_back(value(coverage, b * S + s));
      for (int64_t i = 0; i < H; ++i) h.push_back(value(h0, b * H + i));
      for (int64_t i = 0; i < H; ++i) c.push_back(value(c0, b * H + i));
      for (int64_t i = 0; i < F; ++i) f.push_back(value(f0, b * F + i));
      // f of step t from h; adds the weights' part of the sum.
      const auto attend = [&](int64_t t) {
        const int64_t n = lengths[static_cast<size_t>(b)], row = b * T + t;
        std::vector<double> e, q, context(static_cast<size_t>(M), 0.0);
        for (int64_t a = 0; a < A; ++a) {
          double sum = 0.0;
          for (int64_t i = 0; i < H; ++i) sum += value(w_q, a * H + i) * h[static_cast<size_t>(i)];
          q.push_back(sum);
        }
        double top = -1e300, norm = 0.0;
        for (int64_t s = 0; s < n; ++s) {
          double sum = 0.0;
          for (int64_t a = 0; score != Score::kLocation && a < A; ++a) {
            const double own = q[static_cast<size_t>(a)];
            double k = value(keys, (b * S + s) * A + a);
            if (cover) k += sums[static_cast<size_t>(s)] * value(u, a);
            sum += score == Score::kAdditive ? value(v, a) * std::tanh(own + k) : 0.4 * own * k;
          }
          if (score == Score::kLocation) {
            sum = value(positions, row * A + s) + q[static_cast<size_t>(s)];
          }
          e.push_back(sum);
          top = std::max(top, sum);
        }
        for (double& p : e) norm += p = std::exp(p - top);
        for (int64_t s = 0; s < n; ++s) {
          const double p = e[static_cast<size_t>(s)] / norm;
          sums[static_cast<size_t>(s)] += p;
          total += p * double(grad_w[static_cast<size_t>(row * W + s)]);
          for (int64_t i = 0; i < M; ++i)
            context[static_cast<size_t>(i)] += p * value(values, (b * S + s) * M + i);
        }
        for (int64_t i = 0; i < F; ++i) {
          double& own = f[static_cast<size_t>(i)];
          own = output ? 0.0 : context[static_cast<size_t>(i)];
          if (!output) continue;
          const int64_t at = i * (M + H);
          for (int64_t j = 0; j < M; ++j)
            own += value(w_o, at + j) * context[static_cast<size_t>(j)];
          for (int64_t j = 0; j < H; ++j) own += value(w_o, at + M + j) * h[static_cast<size_t>(j)];
          own = std::tanh(own);
        }
      };
      for (int64_t t = 0; t < T; ++t) {
        if (score == Score::kLocation) attend(t);
        std::vector<double> from_x, from_h;
        for (int64_t g = 0; g < gates * H; ++g) {
          double a = value(b_ih, g), r = value(b_hh, g);
          for (int64_t i = 0; i < I; ++i)
            a += value(w_ih, g * (I + F) + i) * value(x, (b * T + t) * I + i);
          for (int64_t i = 0; i < F; ++i)
            a += value(w_ih, g * (I + F) + I + i) * f[static_cast<size_t>(i)];
          for (int64_t i = 0; i < H; ++i) r += value(w_hh, g * H + i) * h[static_cast<size_t>(i)];
          from_x.push_back(a);
          from_h.push_back(r);
        }
        for (int64_t i = 0; i < H; ++i) {
          const auto x_of = [&](int64_t g) { return from_x[static_cast<size_t>(g * H + i)]; };
          const auto h_of = [&](int64_t g) { return from_h[static_cast<size_t>(g * H + i)]; };
          double &own_h = h[static_cast<size_t>(i)], &own_c = c[static_cast<size_t>(i)];
          if (cell == rnn::Cell::kLstm) {
            own_c = sigmoid(x_of(1) + h_of(1)) * own_c +
                    sigmoid(x_of(0) + h_of(0)) * std::tanh(x_of(2) + h_of(2));
            own_h = sigmoid(x_of(3) + h_of(3)) * std::tanh(own_c);
          } else {
            const double r = sigmoid(x_of(0) + h_of(0)), z = sigmoid(x_of(1) + h_of(1));
            own_h = (1.0 - z) * std::tanh(x_of(2) + r * h_of(2)) + z * own_h;
          }
        }
        if (score != Score::kLocation) attend(t);
        const int64_t row = (b * T + t) * (H + F);
        for (int64_t i = 0; i < H; ++i)
          total += h[static_cast<size_t>(i)] * double(grad[static_cast<size_t>(row + i)]);
        for (int64_t i = 0; i < F; ++i)
          total += f[static_cast<size_t>(i)] * double(grad[static_cast<size_t>(row + H + i)]);
      }
    }
    return total;
  }

  // The gradient of number i of t. Kept, for each instruction set is held to it.
  double slope(const Numbers& t, int64_t i) const {
    const float* const at = &t[static_cast<size_t>(i)];
    const auto [found, missing] = slopes.try_emplace(at, 0.0);
    if (missing) found->second = (loss(1e-4, at) - loss(-1e-4, at)) / 2e-4;
    return found->second;
  }
  mutable std::map<const float*, double> slopes;
};

// A call's tensors, of its dtype, each of exactly its size.
class Tensors {
 public:
  explicit Tensors(Format format) : format_(format), bytes_(element_bytes(format)) {}
  char* room(int64_t count) {
    kept_.emplace_back(static_cast<size_t>(count * bytes_));
    return kept_.back().data();
  }
  char* of(const Numbers& values) {
    char* const to = room(static_cast<int64_t>(values.size()));
    for (size_t i = 0; i < values.size(); ++i) {
      put_number(format_, to + static_cast<int64_t>(i) * bytes_, values[i]);
    }
    return to;
  }
  double at(const char* t, int64_t i) const { return double(get_number(format_, t + i * bytes_)); }

 private:
  const Format format_;
  const int64_t bytes_;
  std::deque<std::vector<char>> kept_;
};

void test(Isa isa, const Decoder& d, int threads, Format format) {
  Tensors tensors(format);
  const int64_t bytes = element_bytes(format);
  const bool exact = format == Format::kFloat32;
  const rnn::Kernels& recurrent = rnn::kernels(isa);
  const DecoderKernels& kernels = decoder_kernels(isa);
  const int64_t P = d.H + d.F;
  const bool located = d.score == Score::kLocation;
  const bool lstm = d.cell == rnn::Cell::kLstm;
  const auto floats = [](int64_t n) { return Numbers(static_cast<size_t>(n)); };
  char *const out = tensors.room(d.B * d.T * P), *const cells = tensors.room(d.B * d.T * d.H);
  Numbers weights = floats(d.B * d.T * d.W), coverages = floats(d.B * d.T * d.S);
  const auto steps = [&](char* t, int64_t size) {
    return rnn::StepTensor{t, size * bytes, d.T * size * bytes};
  };
  const auto rows = [&](const Numbers& t, int64_t count, int64_t size) {
    return attention::Rows{tensors.of(t), count * size * bytes, size * bytes};
  };
  Forward f{};
  f.rnn.shape = {d.cell, d.T, d.B, d.I, d.H, d.H, false};
  f.rnn.sequences.T = d.T;
  f.rnn.sequences.B = d.B;
  f.rnn.dtype = f.rnn.format = format;
  f.rnn.input = steps(tensors.of(d.x), d.I);
  rnn::Weights w{};
  w.dtype = format;
  w.ih = tensors.of(d.w_ih);
  w.hh = tensors.of(d.w_hh);
  w.b_ih = tensors.of(d.b_ih);
  w.b_hh = tensors.of(d.b_hh);
  w.ih_stride = d.I + d.F;
  w.hh_stride = d.H;
  f.memory.feed_weight = w.ih + d.I * bytes;
  f.memory.feed_stride = w.ih_stride;
  f.memory.context0 = tensors.of(d.f0);
  f.memory.score = d.score;
  f.memory.S = d.S;
  f.memory.A = d.A;
  f.memory.M = d.M;
  f.memory.F = d.F;
  f.memory.scale = 0.4f;
  f.memory.query_weight = tensors.of(d.w_q);
  f.memory.query_stride = d.H;
  f.memory.score_weight = d.score == Score::kAdditive ? tensors.of(d.v) : nullptr;
  if (located) f.memory.positions = rows(d.positions, d.T, d.A);
  if (!located) f.memory.keys = rows(d.keys, d.S, d.A);
  if (d.output) f.memory.output_weight = tensors.of(d.w_o);
  f.memory.output_stride = d.M + d.H;
  if (d.cover) {
    f.memory.coverage = tensors.of(d.coverage);
    f.memory.coverage_weight = tensors.of(d.u);
    f.coverages = coverages.data();
  }
  f.memory.values = rows(d.values, d.S, d.M);
  f.memory.lengths = d.lengths.data();
  rnn::Direction& dir = f.rnn.direction[0];
  dir.h0 = tensors.of(d.h0);
  dir.c0 = lstm ? tensors.of(d.c0) : nullptr;
  dir.output = steps(out, P);
  dir.h_n = tensors.room(d.B * d.H);
  dir.c_n = lstm ? tensors.room(d.B * d.H) : nullptr;
  if (lstm) dir.cells = steps(cells, d.H);
  // At a line's beginning an LSTM's may take the place of the input products.
  const Lines gates(d.B * d.T * 4 * d.H * bytes);
  dir.gates = gates.data;
  f.weights = weights.data();
  f.queries = tensors.room(d.B * d.T * d.A);
  if (d.output) f.contexts = tensors.room(d.B * d.T * d.M);
  f.rnn.threads = threads;
  f.rnn.chunk_rows = 2 * d.B;  // several chunks
  Lines packed(recurrent.packed_bytes(f.rnn.shape, format));
  recurrent.pack(f.rnn.shape, w, format, threads, true, packed.data);
  dir.packed = packed.data;
  Lines work(recurrent.forward_workspace(f.rnn)), own(kernels.forward_workspace(f));
  f.rnn.workspace = work.data;
  f.workspace = own.data;
  kernels.forward(f);
  double found = 0.0;
  for (size_t i = 0; i < d.grad.size(); ++i) {
    found += tensors.at(out, static_cast<int64_t>(i)) * double(d.grad[i]);
  }
  for (size_t i = 0; i < weights.size(); ++i) found += double(weights[i]) * double(d.grad_w[i]);
  CHECK_NEAR(found, d.loss(0.0, nullptr), exact ? 1e-4 : format == Format::kFloat16 ? 0.02 : 0.15);
  if (format == Format::kFloat16) return;  // there is no backward

  const int64_t G = d.gates * d.H;
  char *const gx = tensors.of(d.x), *const gh0 = tensors.of(d.h0), *const gc0 = tensors.of(d.c0),
              *const gf0 = tensors.of(d.f0), *const g_ih = tensors.room(G * d.I),
              *const g_hh = tensors.of(d.w_hh), *const g_feed = tensors.room(G * d.F),
              *const gb_ih = tensors.of(d.b_ih), *const gb_hh = tensors.of(d.b_hh),
              *const g_q = tensors.of(d.w_q), *const g_p = tensors.of(Numbers(d.positions.size())),
              *const g_oc = tensors.room(d.F * d.M), *const g_oh = tensors.room(d.F * d.H),
              *const g_k = tensors.of(d.keys), *const g_v = tensors.of(d.v),
              *const g_coverage = tensors.of(d.coverage), *const g_u = tensors.of(d.u);
  Backward b{};
  b.rnn.shape = f.rnn.shape;
  b.rnn.sequences = f.rnn.sequences;
  b.rnn.dtype = format;
  b.rnn.input = f.rnn.input;
  b.rnn.grad_input = steps(gx, d.I);
  b.rnn.fed = d.F;
  b.rnn.threads = threads;
  b.rnn.chunk_rows = 2 * d.B;
  b.memory = f.memory;
  b.weights = weights.data();
  b.queries = f.queries;
  b.contexts = f.contexts;
  b.grad_positions = g_p;
  b.coverages = coverages.data();
  b.grad_keys = g_k;
  b.grad_score_weight = g_v;
  b.grad_coverage = g_coverage;
  b.grad_coverage_weight = g_u;
  b.grad_output_context = g_oc;
  b.grad_output_state = g_oh;
  b.grad_weights = d.grad_w.data();
  b.grad_context = tensors.room(d.B * d.T * d.M);
  b.grad_context0 = gf0;
  b.grad_feed_weight = g_feed;
  b.grad_query_weight = g_q;
  rnn::BackwardDirection& back = b.rnn.direction[0];
  back.weights = w;
  back.h0 = dir.h0;
  back.c0 = dir.c0;
  back.output = dir.output;
  back.cells = dir.cells;
  back.gates = dir.gates;
  back.grad_output = steps(tensors.of(d.grad), P);
  back.grad_h0 = gh0;
  back.grad_c0 = lstm ? gc0 : nullptr;
  back.grad_ih = g_ih;
  back.grad_hh = g_hh;
  back.grad_b_ih = gb_ih;
  back.grad_b_hh = gb_hh;
  Lines work_b(recurrent.backward_workspace(b.rnn)), own_b(kernels.backward_workspace(b));
  b.rnn.workspace = work_b.data;
  b.workspace = own_b.data;
  kernels.backward(b);
  const double allowed = exact ? 2e-4 : 0.07;
  const auto compare = [&](const Numbers& t, const char* gradient) {
    const int64_t n = static_cast<int64_t>(t.size());
    for (int64_t i = 0; i < n; i += 1 + n / 5) {
      CHECK_NEAR(tensors.at(gradient, i), d.slope(t, i), allowed);
    }
  };
  compare(d.x, gx);
  compare(d.h0, gh0);
  if (lstm) compare(d.c0, gc0);
  compare(d.f0, gf0);
  if (located) compare(d.positions, g_p);
  if (d.cover) {
    compare(d.keys, g_k);
    compare(d.v, g_v);
    compare(d.coverage, g_coverage);
    compare(d.u, g_u);
  }
  compare(d.w_hh, g_hh);
  compare(d.b_ih, gb_ih);
  compare(d.b_hh, gb_hh);
  compare(d.w_q, g_q);
  for (int64_t g = 0; g < d.gates * d.H; g += 1 + d.gates * d.H / 5) {
    const int64_t row = g * (d.I + d.F);
    CHECK_NEAR(tensors.at(g_ih, g * d.I), d.slope(d.w_ih, row), allowed);
    CHECK_NEAR(tensors.at(g_feed, g * d.F), d.slope(d.w_ih, row + d.I), allowed);
  }
  for (int64_t i = 0; d.output && i < d.F; i += 1 + d.F / 5) {
    const int64_t row = i * (d.M + d.H);
    CHECK_NEAR(tensors.at(g_oc, i * d.M), d.slope(d.w_o, row), allowed);
    CHECK_NEAR(tensors.at(g_oh, i * d.H), d.slope(d.w_o, row + d.M), allowed);
  }
}

}  // namespace

void run_tests() {
  for (const rnn::Cell cell : {rnn::Cell::kLstm, rnn::Cell::kGru}) {
    for (const Score score : {Score::kDot, Score::kAdditive, Score::kLocation}) {
      for (int kind = 0; kind < 4; ++kind) {
        const bool output = kind % 2 == 1, cover = kind / 2 == 1;
        if (output && score == Score::kLocation) continue;
        if (cover && score != Score::kAdditive) continue;
        for (const Format format : {Format::kFloat32, Format::kBfloat16, Format::kFloat16}) {
          const int threads = format == Format::kFloat32 ? 3 : 1;
          const auto test_all = [&](Decoder d, int most) {
            d.round_to(format);
            for (const Isa isa : kAllIsas) {
              if (use_isa(isa)) test(isa, d, most, format);
            }
          };
          test_all(Decoder(cell, score, output, cover, 1, 1, 1, 1, 1, 1, 1), threads);
          test_all(Decoder(cell, score, output, cover, 4, 3, 7, 5, 19, 11, 13), threads);
          test_all(Decoder(cell, score, output, cover, 3, 5, 18, 16, 48, 40, 34), 1);
        }
      }
    }
  }
}
