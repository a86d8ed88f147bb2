// The linear kernel on every instruction set that the machine has, on buffers of exactly the sizes
// that a call has, against sums in double: every format, both ways to split the work, a norm.
#include "linear/linear.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffers.h"
#include "check.h"
#include "isas.h"

using namespace encdec;
using namespace encdec::linear;

namespace {

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kGelu:
      return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
    case Activation::kGeluTanh:
      return 0.5 * x * (1.0 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case Activation::kSilu:
      return x / (1.0 + std::exp(-x));
    default:
      return x;
  }
}

void test(const Kernels& kernels, Format format, int64_t M, int64_t N, int64_t K, int threads,
          bool split, Norm norm, Activation activation = Activation::kRelu) {
  std::vector<float> x = random_floats(M * K), w = random_floats(N * K), bias = random_floats(N),
                     residual = random_floats(M * N), y(static_cast<size_t>(M * N)),
                     norm_weight = random_floats(N), norm_bias = random_floats(N);
  Lines packed(kernels.packed_bytes(N, K, format));
  kernels.pack({Format::kFloat32, chars(w), K, N, K}, format, threads, packed.data);
  Linear f{};
  f.dtype = Format::kFloat32;
  f.M = M;
  f.N = N;
  f.K = K;
  f.packed = packed.data;
  f.input = chars(x);
  f.input_stride = K * 4;
  f.bias = chars(bias);
  f.activation = activation;
  f.residual = chars(residual);
  f.residual_stride = N * 4;
  f.norm = norm;
  f.norm_eps = 0.1f;
  f.norm_weight = chars(norm_weight);
  f.norm_bias = chars(norm_bias);
  f.output = chars(y);
  f.output_stride = N * 4;
  plan(f, format, threads);
  f.plan.threads = threads;
  f.plan.split_rows = split;
  f.plan.chunk_rows = 17;  // several chunks, and a last one that is not full
  Lines workspace(kernels.workspace(f));
  f.workspace = workspace.data;
  kernels.run(f);
  const double allowed = (format == Format::kFloat32 ? 1e-5
                          : format == Format::kInt8  ? 0.03
                                                     : 0.01) *
                         std::sqrt(double(K));
  double worst = 0.0;
  for (int64_t m = 0; m < M; ++m) {
    std::vector<double> row;
    double mean = 0.0, square = 0.0;
    for (int64_t n = 0; n < N; ++n) {
      double sum = double(bias[static_cast<size_t>(n)]);
      for (int64_t k = 0; k < K; ++k) {
        sum +=
            double(x[static_cast<size_t>(m * K + k)]) * double(w[static_cast<size_t>(n * K + k)]);
      }
      row.push_back(activated(activation, sum) + double(residual[static_cast<size_t>(m * N + n)]));
      mean += row.back() / double(N);
    }
    if (norm != Norm::kLayer) mean = 0.0;
    for (double r : row) square += (r - mean) * (r - mean) / double(N);
    for (int64_t n = 0; n < N; ++n) {
      double expected = row[static_cast<size_t>(n)];
      if (norm != Norm::kNone) {
        expected = (expected - mean) / std::sqrt(square + 0.1);
        expected = expected * double(norm_weight[static_cast<size_t>(n)]) +
                   double(norm_bias[static_cast<size_t>(n)]);
      }
      check::raise(worst, std::fabs(double(y[static_cast<size_t>(m * N + n)]) - expected));
    }
  }
  CHECK_NEAR(worst, 0.0, allowed);
}

// The gradients against sums in double, with several chunks of rows.
void test_backward(const Kernels& kernels, int64_t M, int64_t N, int64_t K, int threads) {
  std::vector<float> x = random_floats(M * K), w = random_floats(N * K),
                     grad = random_floats(M * N), gx(x.size()), gw(w.size()),
                     gb(static_cast<size_t>(N));
  const auto at = [](const std::vector<float>& t, int64_t i) {
    return double(t[static_cast<size_t>(i)]);
  };
  LinearBackward f{};
  f.M = M;
  f.N = N;
  f.K = K;
  f.weight = {Format::kFloat32, chars(w), K, N, K};
  f.grad = chars(grad);
  f.grad_stride = N * 4;
  f.input = chars(x);
  f.input_stride = K * 4;
  f.grad_input = chars(gx);
  f.grad_weight = chars(gw);
  f.grad_bias = chars(gb);
  plan(f, threads);
  f.chunk_rows = (M + 2) / 3;
  Lines workspace(kernels.backward_workspace(f));
  f.workspace = workspace.data;
  kernels.backward(f);
  double worst = 0.0;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) {
      double sum = 0.0;
      for (int64_t n = 0; n < N; ++n) sum += at(grad, m * N + n) * at(w, n * K + k);
      check::raise(worst, std::fabs(sum - at(gx, m * K + k)));
    }
  }
  for (int64_t n = 0; n < N; ++n) {
    double bias = 0.0;
    for (int64_t m = 0; m < M; ++m) bias += at(grad, m * N + n);
    check::raise(worst, std::fabs(bias - at(gb, n)));
    for (int64_t k = 0; k < K; ++k) {
      double sum = 0.0;
      for (int64_t m = 0; m < M; ++m) sum += at(grad, m * N + n) * at(x, m * K + k);
      check::raise(worst, std::fabs(sum - at(gw, n * K + k)));
    }
  }
  CHECK_NEAR(worst, 0.0, 1e-4);
}

}  // namespace

void run_tests() {
  for (const Isa isa : kAllIsas) {
    if (!use_isa(isa)) continue;
    for (const int threads : {1, 3}) {
      test_backward(kernels(isa), 1, 1, 1, threads);
      test_backward(kernels(isa), 40, 33, 50, threads);
      test_backward(kernels(isa), 131, 70, 17, threads);
    }
    for (const Format format :
         {Format::kFloat32, Format::kBfloat16, Format::kFloat16, Format::kInt8}) {
      for (const Norm norm : {Norm::kNone, Norm::kLayer, Norm::kRms}) {
        for (const bool split : {false, true}) {
          test(kernels(isa), format, 1, 1, 1, 1, split, norm);
          test(kernels(isa), format, 40, 70, 33, 3, split, norm);
          test(kernels(isa), format, 5, 64, 130, 2, split, norm);
        }
      }
      for (const Activation activation :
           {Activation::kNone, Activation::kGelu, Activation::kGeluTanh, Activation::kSilu}) {
        test(kernels(isa), format, 40, 70, 33, 3, true, Norm::kNone, activation);
        test(kernels(isa), format, 5, 64, 130, 2, false, Norm::kLayer, activation);
      }
    }
  }
}
