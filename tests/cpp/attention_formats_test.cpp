// Attention forward in every dtype and on every instruction set: batches with lengths whose weights
// are averaged over the heads, and sentences one behind the other. Buffers have exactly the sizes
// that a call has, and results are held to sums in double.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/attention.h"
#include "buffers.h"
#include "check.h"
#include "isas.h"

using namespace encdec;
using namespace encdec::attention;

namespace {

// A tensor's numbers.
class Numbers {
 public:
  Numbers(Format format, int64_t count)
      : format_(format), bytes_(static_cast<size_t>(count * element_bytes(format))) {
    for (int64_t i = 0; i < count; ++i) put_number(format, data() + i * size(), next());
  }
  char* data() { return bytes_.data(); }
  int64_t size() const { return element_bytes(format_); }
  double at(const char* p) const { return double(get_number(format_, p)); }

 private:
  Format format_;
  std::vector<char> bytes_;
};

struct Case {
  int64_t H, G, D, V;
  bool causal;
  int threads;
};

double allowed(Format format) {
  return format == Format::kFloat32 ? 1e-5 : format == Format::kFloat16 ? 2e-3 : 1.5e-2;
}

// f has its sizes and tensors; the dtype is that of `numbers`. mean: room for the averaged weights.
void test(const AttentionKernels& kernels, Attention& f, const Case& c, const Numbers& numbers,
          std::vector<float>* mean) {
  f.H = c.H;
  f.G = c.G;
  f.D = c.D;
  f.V = c.V;
  f.scale = 0.6f;
  f.causal = c.causal;
  if (mean) {
    f.weights = mean->data();
    f.average = true;
  }
  plan(f, c.threads);
  Lines workspace(kernels.workspace(f));
  f.workspace = workspace.data;
  kernels.run(f);
  const auto at = [&](const Heads& x, int64_t b, int64_t h, int64_t row, int64_t i) {
    return numbers.at(x.at(b, h, row) + i * numbers.size());
  };
  double worst = 0.0, worst_mean = 0.0;
  for (int64_t b = 0; b < f.B; ++b) {
    for (int64_t t = 0; t < f.queries_of(b); ++t) {
      const int64_t n = std::min(f.keys_of(b), f.causal ? t + 1 : f.S);
      std::vector<double> sums(static_cast<size_t>(f.S));
      for (int64_t h = 0; h < f.H; ++h) {
        std::vector<double> p(static_cast<size_t>(n));
        double total = 0.0;
        for (int64_t s = 0; s < n; ++s) {
          double dot = 0.0;
          for (int64_t d = 0; d < f.D; ++d) {
            dot += at(f.query, b, h, t, d) * at(f.key, b, h * f.G / f.H, s, d);
          }
          total += p[static_cast<size_t>(s)] = std::exp(0.6f * dot);
        }
        for (double& x : p) x /= total;
        for (int64_t s = 0; s < n; ++s) {
          sums[static_cast<size_t>(s)] += p[static_cast<size_t>(s)] / double(f.H);
        }
        for (int64_t i = 0; i < f.V; ++i) {
          double expected = 0.0;
          for (int64_t s = 0; s < n; ++s) {
            expected += p[static_cast<size_t>(s)] * at(f.value, b, h * f.G / f.H, s, i);
          }
          check::raise(worst, std::fabs(at(f.output, b, h, t, i) - expected));
        }
      }
      for (int64_t s = 0; mean && s < f.S; ++s) {
        const double found = double((*mean)[static_cast<size_t>((b * f.Tq + t) * f.S + s)]);
        check::raise(worst_mean, std::fabs(found - sums[static_cast<size_t>(s)]));
      }
    }
  }
  CHECK_NEAR(worst, 0.0, allowed(f.dtype));
  CHECK_NEAR(worst_mean, 0.0, f.dtype == Format::kFloat32 ? 1e-6 : 1e-3);
}

void test_batch(const AttentionKernels& kernels, Format format, int64_t Tq, int64_t S,
                const Case& c) {
  const int64_t B = 2, bytes = element_bytes(format);
  Numbers q(format, B * c.H * Tq * c.D), k(format, B * c.G * S * c.D), v(format, B * c.G * S * c.V),
      out(format, B * c.H * Tq * c.V);
  const std::vector<int64_t> lengths{S, S / 2};
  std::vector<float> mean(static_cast<size_t>(B * Tq * S));
  const auto heads = [&](Numbers& x, int64_t count, int64_t rows, int64_t size) -> Heads {
    return {x.data(), count * rows * size * bytes, rows * size * bytes, size * bytes};
  };
  Attention f{};
  f.dtype = format;
  f.B = B;
  f.Tq = Tq;
  f.S = S;
  f.query = heads(q, c.H, Tq, c.D);
  f.key = heads(k, c.G, S, c.D);
  f.value = heads(v, c.G, S, c.V);
  f.output = heads(out, c.H, Tq, c.V);
  f.lengths = lengths.data();
  test(kernels, f, c, q, &mean);
}

// As the projections of a layer leave them: rows of all heads side by side.
void test_sentences(const AttentionKernels& kernels, Format format, const Case& c) {
  const std::vector<int64_t> starts{0, 7, 7, 40, 41}, memory{0, 9, 12, 33, 97};
  const int64_t bytes = element_bytes(format);
  const int64_t N = starts.back(), M = memory.back();
  Numbers q(format, N * c.H * c.D), k(format, M * c.G * c.D), v(format, M * c.G * c.V),
      out(format, N * c.H * c.V);
  const auto heads = [&](Numbers& x, int64_t count, int64_t size, const auto& from) -> Heads {
    return {x.data(), 0, size * bytes, count * size * bytes, from.data()};
  };
  Attention f{};
  f.dtype = format;
  f.B = 4;
  f.Tq = 33;
  f.S = 64;
  f.query = heads(q, c.H, c.D, starts);
  f.key = heads(k, c.G, c.D, memory);
  f.value = heads(v, c.G, c.V, memory);
  f.output = heads(out, c.H, c.V, starts);
  test(kernels, f, c, q, nullptr);
}

}  // namespace

void run_tests() {
  for (const Isa isa : kAllIsas) {
    if (!use_isa(isa)) continue;
    const AttentionKernels& kernels = attention_kernels(isa);
    for (const Format format : {Format::kFloat32, Format::kBfloat16, Format::kFloat16}) {
      for (const int threads : {1, 3}) {
        for (const bool causal : {false, true}) {
          for (const Case& c : {Case{4, 2, 7, 5, causal, threads},
                                {3, 3, 64, 64, causal, threads},
                                {2, 1, 33, 40, causal, threads}}) {
            test_batch(kernels, format, 1, 9, c);
            test_batch(kernels, format, 20, 70, c);
            test_sentences(kernels, format, c);
          }
        }
      }
    }
  }
}
