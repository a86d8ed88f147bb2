// The attention kernels on every instruction set that the machine has, on buffers of exactly the
// sizes that a call has: what reads or writes beyond them is for AddressSanitizer to find. Results
// are held to sums in double.
#include "attention/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention/additive.h"
#include "buffers.h"
#include "check.h"
#include "isas.h"

using namespace encdec;
using namespace encdec::attention;

namespace {

std::vector<double> softmax(std::vector<double> e) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0.0;
  for (double x : e) top = std::max(top, x);
  for (double& x : e) sum += x = std::exp(x - top);
  for (double& x : e) x /= sum;
  return e;
}

void test_attention(const AttentionKernels& kernels, int64_t Tq, int64_t S, int64_t D, int64_t V,
                    int threads, bool side_by_side = false) {
  const int64_t H = side_by_side ? 16 : 4, G = side_by_side ? 16 : 2;
  Attention f{};
  f.B = 2;
  f.H = H;
  f.G = G;
  f.Tq = Tq;
  f.S = S;
  f.D = D;
  f.V = V;
  f.dtype = Format::kFloat32;
  std::vector<float> q = random_floats(2 * H * Tq * D), k = random_floats(2 * G * S * D),
                     v = random_floats(2 * G * S * V), out(static_cast<size_t>(2 * H * Tq * V)),
                     w(static_cast<size_t>(2 * H * Tq * S)), bias = random_floats(Tq * S);
  std::vector<char> mask(static_cast<size_t>(2 * S));
  for (char& m : mask) m = next() > -0.5f;
  const std::vector<int64_t> lengths{S, S / 2};
  const auto heads = [&](auto& x, int64_t count, int64_t rows, int64_t size) -> Heads {
    const int64_t row = side_by_side ? count * size : size,
                  head = side_by_side ? size : rows * size;
    return {chars(x), count * rows * size * 4, head * 4, row * 4};
  };
  f.query = heads(q, H, Tq, D);
  f.key = heads(k, G, S, D);
  f.value = heads(v, G, S, V);
  f.output = heads(out, H, Tq, V);
  const auto at = [](const Heads& x, int64_t b, int64_t h, int64_t row, int64_t c) {
    return double(reinterpret_cast<const float*>(x.at(b, h, row))[c]);
  };
  f.scale = 0.7f;
  f.causal = Tq > 3;
  f.lengths = lengths.data();
  f.mask = {mask.data(), S, 0, 0, 1};
  f.bias = {chars(bias), 0, 0, S * 4, 4};
  f.weights = w.data();
  plan(f, threads);
  f.round_heads = 3;  // several rounds, and a last one that is not full
  // Of 16 and 32 numbers a head there are registers for several heads on every instruction set.
  if (!side_by_side) CHECK_EQ(kernels.heads_of_unit(f), 1);
  if (side_by_side && (D == 16 || D == 32)) CHECK(kernels.heads_of_unit(f) > 1);
  Lines workspace(kernels.workspace(f));
  f.workspace = workspace.data;
  kernels.run(f);
  double worst = 0.0;
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t t = 0; t < Tq; ++t) {
        std::vector<double> e;
        std::vector<int64_t> keys;
        for (int64_t s = 0; s < lengths[static_cast<size_t>(b)]; ++s) {
          if (!mask[static_cast<size_t>(b * S + s)] || (f.causal && s > t)) continue;
          double dot = 0.0;
          for (int64_t d = 0; d < D; ++d) {
            dot += at(f.query, b, h, t, d) * at(f.key, b, h * G / H, s, d);
          }
          e.push_back(0.7 * dot + double(bias[static_cast<size_t>(t * S + s)]));
          keys.push_back(s);
        }
        const std::vector<double> p = softmax(e);
        double sum = 0.0;
        for (int64_t s = 0; s < S; ++s)
          sum += double(w[static_cast<size_t>(((b * H + h) * Tq + t) * S + s)]);
        CHECK_NEAR(sum, keys.empty() ? 0.0 : 1.0, 1e-5);
        for (int64_t c = 0; c < V; ++c) {
          double expected = 0.0;
          for (size_t i = 0; i < keys.size(); ++i) {
            expected += p[i] * at(f.value, b, h * G / H, keys[i], c);
          }
          check::raise(worst, std::fabs(at(f.output, b, h, t, c) - expected));
        }
      }
    }
  }
  CHECK_NEAR(worst, 0.0, 1e-5);
}

// Gradients against differences of the forward in double: two query heads over one key head, a
// bias for each head, and dropout, whose zeros are read off the weights that forward shows.
void test_attention_backward(const AttentionKernels& kernels, int64_t Tq, int64_t S, int64_t D,
                             int64_t V, bool causal, double dropout, int threads) {
  const int64_t B = 2, H = 2;
  std::vector<float> q = random_floats(B * H * Tq * D), k = random_floats(B * S * D),
                     v = random_floats(B * S * V), bias = random_floats(H * Tq * S),
                     grad = random_floats(B * H * Tq * V), grad_w = random_floats(B * H * Tq * S),
                     out(grad.size()), w(grad_w.size()), gq(q.size()), gk(k.size()), gv(v.size()),
                     gbias(bias.size());
  const std::vector<int64_t> lengths{S, S / 2};
  AttentionBackward back{};
  Attention& f = back.forward;
  f.B = B;
  f.H = H;
  f.G = 1;
  f.Tq = Tq;
  f.S = S;
  f.D = D;
  f.V = V;
  f.dtype = Format::kFloat32;
  f.query = {chars(q), H * Tq * D * 4, Tq * D * 4, D * 4};
  f.key = {chars(k), S * D * 4, 0, D * 4};
  f.value = {chars(v), S * V * 4, 0, V * 4};
  f.output = {chars(out), H * Tq * V * 4, Tq * V * 4, V * 4};
  f.scale = 0.7f;
  f.causal = causal;
  f.lengths = lengths.data();
  f.bias = {chars(bias), 0, Tq * S * 4, S * 4, 4};
  f.dropout = dropout;
  f.seed = 0x123456789abcdefull;
  f.weights = w.data();
  plan(f, threads);
  Lines workspace(kernels.workspace(f));
  f.workspace = workspace.data;
  kernels.run(f);
  const auto loss = [&](double step, const float* at) {  // sum of grad * results, *at moved
    const auto value = [&](const std::vector<float>& x, int64_t i) {
      const float* p = &x[static_cast<size_t>(i)];
      return double(*p) + (p == at ? step : 0.0);
    };
    double total = 0.0;
    for (int64_t row = 0; row < B * H * Tq; ++row) {
      const int64_t b = row / (H * Tq), h = row / Tq % H, t = row % Tq;
      const int64_t n = std::min(lengths[static_cast<size_t>(b)], causal ? t + 1 : S);
      if (n == 0) continue;
      std::vector<double> e;
      for (int64_t s = 0; s < n; ++s) {
        double sum = 0.0;
        for (int64_t d = 0; d < D; ++d)
          sum += value(q, row * D + d) * value(k, (b * S + s) * D + d);
        e.push_back(0.7 * sum + value(bias, (h * Tq + t) * S + s));
      }
      const std::vector<double> p = softmax(e);
      for (int64_t s = 0; s < n; ++s) {
        const int64_t i = row * S + s;
        const double kept = w[static_cast<size_t>(i)] == 0.0f ? 0.0 : 1.0 / (1.0 - dropout);
        double sum = double(grad_w[static_cast<size_t>(i)]);
        for (int64_t c = 0; c < V; ++c)
          sum += double(grad[static_cast<size_t>(row * V + c)]) * value(v, (b * S + s) * V + c);
        total += kept * p[static_cast<size_t>(s)] * sum;
      }
    }
    return total;
  };
  double found = 0.0;
  for (size_t i = 0; i < out.size(); ++i) found += double(grad[i]) * double(out[i]);
  for (size_t i = 0; i < w.size(); ++i) found += double(grad_w[i]) * double(w[i]);
  CHECK_NEAR(found, loss(0.0, nullptr), 1e-4);

  back.grad_output = {chars(grad), H * Tq * V * 4, Tq * V * 4, V * 4};
  back.grad_weights = grad_w.data();
  back.grad_query = {chars(gq), H * Tq * D * 4, Tq * D * 4, D * 4};
  back.grad_key = {chars(gk), S * D * 4, 0, D * 4};
  back.grad_value = {chars(gv), S * V * 4, 0, V * 4};
  back.grad_bias = gbias.data();
  back.grad_bias_size = H * Tq * S;
  back.bias_head = Tq * S;
  back.bias_row = S;
  back.bias_key = 1;
  plan_backward(f, threads);
  Lines again(kernels.backward_workspace(back));
  back.workspace = again.data;
  kernels.backward(back);
  const auto compare = [&](const std::vector<float>& x, const std::vector<float>& gradient) {
    for (size_t i = 0; i < x.size(); i += 1 + x.size() / 7) {
      const double slope = (loss(1e-4, &x[i]) - loss(-1e-4, &x[i])) / 2e-4;
      CHECK_NEAR(double(gradient[i]), slope, 1e-4);
    }
  };
  compare(q, gq);
  compare(k, gk);
  compare(v, gv);
  compare(bias, gbias);
}

// Forward, and gradients against differences of the forward in double.
void test_additive(const AdditiveKernels& kernels, int64_t Tq, int64_t S, int64_t A, int64_t D,
                   int threads) {
  const int64_t B = 2;
  std::vector<float> q = random_floats(B * Tq * A), k = random_floats(B * S * A),
                     values = random_floats(B * S * D), v = random_floats(A),
                     context(static_cast<size_t>(B * Tq * D)), w(static_cast<size_t>(B * Tq * S)),
                     grad = random_floats(B * Tq * D), gq(q.size()), gk(k.size()),
                     gvalues(values.size()), gv(v.size());
  const std::vector<int64_t> lengths{S / 2, S};
  AdditiveBackward back{};
  Additive& f = back.forward;
  f.shape = {B, Tq, S, A, D};
  f.dtype = Format::kFloat32;
  f.query = {chars(q), Tq * A * 4, A * 4};
  f.keys = {chars(k), S * A * 4, A * 4};
  f.values = {chars(values), S * D * 4, D * 4};
  f.score_weight = chars(v);
  f.lengths = lengths.data();
  f.context = {chars(context), Tq * D * 4, D * 4};
  f.weights = w.data();
  plan(f, threads);
  Lines workspace(kernels.forward_workspace(f));
  f.workspace = workspace.data;
  kernels.forward(f);
  const auto loss = [&](double step, const float* at) {  // sum of grad * context, *at moved
    const auto value = [&](const std::vector<float>& x, int64_t i) {
      const float* p = &x[static_cast<size_t>(i)];
      return double(*p) + (p == at ? step : 0.0);
    };
    double total = 0.0;
    for (int64_t b = 0; b < B; ++b) {
      const int64_t n = lengths[static_cast<size_t>(b)];
      for (int64_t t = 0; t < Tq && n > 0; ++t) {
        std::vector<double> e;
        for (int64_t s = 0; s < n; ++s) {
          double sum = 0.0;
          for (int64_t a = 0; a < A; ++a) {
            sum += value(v, a) *
                   std::tanh(value(q, (b * Tq + t) * A + a) + value(k, (b * S + s) * A + a));
          }
          e.push_back(sum);
        }
        const std::vector<double> p = softmax(e);
        for (int64_t s = 0; s < n; ++s) {
          for (int64_t d = 0; d < D; ++d) {
            total += double(grad[static_cast<size_t>((b * Tq + t) * D + d)]) *
                     p[static_cast<size_t>(s)] * value(values, (b * S + s) * D + d);
          }
        }
      }
    }
    return total;
  };
  double found = 0.0;
  for (size_t i = 0; i < context.size(); ++i) found += double(grad[i]) * double(context[i]);
  CHECK_NEAR(found, loss(0.0, nullptr), 1e-4);

  back.grad_context = {chars(grad), Tq * D * 4, D * 4};
  back.grad_query = {chars(gq), Tq * A * 4, A * 4};
  back.grad_keys = {chars(gk), S * A * 4, A * 4};
  back.grad_values = {chars(gvalues), S * D * 4, D * 4};
  back.grad_score_weight = gv.data();
  Lines again(kernels.backward_workspace(back));
  back.workspace = again.data;
  kernels.backward(back);
  const auto compare = [&](const std::vector<float>& x, const std::vector<float>& gradient) {
    for (size_t i = 0; i < x.size(); i += 1 + x.size() / 7) {
      const double slope = (loss(1e-4, &x[i]) - loss(-1e-4, &x[i])) / 2e-4;
      CHECK_NEAR(double(gradient[i]), slope, 1e-4);
    }
  };
  compare(q, gq);
  compare(k, gk);
  compare(values, gvalues);
  compare(v, gv);
}

}  // namespace

void run_tests() {
  for (const Isa isa : kAllIsas) {
    if (!use_isa(isa)) continue;
    for (const int threads : {1, 3}) {
      for (const int64_t Tq : {1, 5, 20}) {
        test_attention(attention_kernels(isa), Tq, 9, 7, 5, threads);
        test_attention(attention_kernels(isa), Tq, 70, 33, 40, threads);
        test_attention(attention_kernels(isa), Tq, 48, 32, 64, threads);
      }
      for (const int64_t D : {8, 16, 32, 64, 128}) {
        test_attention(attention_kernels(isa), 1, 37, D, D, threads, true);
      }
      test_attention_backward(attention_kernels(isa), 1, 9, 7, 5, false, 0.0, threads);
      test_attention_backward(attention_kernels(isa), 6, 41, 33, 40, true, 0.3, threads);
      test_attention_backward(attention_kernels(isa), 33, 70, 16, 20, false, 0.3, threads);
      test_additive(additive_kernels(isa), 1, 9, 7, 5, threads);
      test_additive(additive_kernels(isa), 1, 37, 64, 40, threads);
      test_additive(additive_kernels(isa), 6, 21, 33, 40, threads);
      test_additive(additive_kernels(isa), 3, 16, 16, 64, threads);
    }
  }
}
