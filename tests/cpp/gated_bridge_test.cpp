// The gated bridge on every instruction set that the machine has, on buffers of exactly the sizes
// that a call has, against sums in double: every format, both ways to split the work.
#include "bridge/gated_bridge.h"

#include <cmath>
#include <vector>

#include "buffers.h"
#include "check.h"
#include "isas.h"

using namespace encdec;
using namespace encdec::bridge;

namespace {

// Row n of a weight of `stride` columns, from column `from` on, times row m of x.
double dot(const std::vector<float>& x, int64_t m, int64_t K, const std::vector<float>& w,
           int64_t n, int64_t stride, int64_t from) {
  double sum = 0.0;
  for (int64_t k = 0; k < K; ++k) {
    sum += double(x[static_cast<size_t>(m * K + k)]) *
           double(w[static_cast<size_t>(n * stride + from + k)]);
  }
  return sum;
}

void test(const Kernels& kernels, Format format, int64_t M, int64_t H, int64_t C, int threads,
          bool split, bool save) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(H + C));
  std::vector<float> state = random_floats(M * H), context = random_floats(M * C),
                     gate = random_floats(H * (H + C), scale), bias = random_floats(H),
                     candidate = random_floats(H * C, scale);
  std::vector<float> out(static_cast<size_t>(M * H)), g = out, u = out;
  Lines packed(kernels.packed_bytes(H, C, format));
  kernels.pack({Format::kFloat32, chars(gate), H + C, H, H + C},
               {Format::kFloat32, chars(candidate), C, H, C}, format, threads, packed.data);
  GatedBridge f{};
  f.dtype = Format::kFloat32;
  f.M = M;
  f.H = H;
  f.C = C;
  f.packed = packed.data;
  f.state = chars(state);
  f.context = chars(context);
  f.context_stride = C * 4;
  f.bias = save ? chars(bias) : nullptr;
  f.output = chars(out);
  f.state_stride = f.output_stride = H * 4;
  if (save) {
    f.gate = chars(g);
    f.candidate = chars(u);
  }
  plan(f, format, threads);
  f.plan.threads = threads;
  f.plan.split_rows = split;
  f.plan.chunk_rows = 17;  // several chunks, and a last one that is not full
  Lines workspace(kernels.workspace(f));
  f.workspace = workspace.data;
  kernels.run(f);
  const double allowed = format == Format::kFloat32 ? 1e-6 : format == Format::kInt8 ? 0.03 : 0.01;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < H; ++n) {
      const size_t at = static_cast<size_t>(m * H + n);
      const double logit =
          dot(state, m, H, gate, n, H + C, 0) + dot(context, m, C, gate, n, H + C, H);
      const double mix = 1 / (1 + std::exp(-logit - (save ? double(bias[size_t(n)]) : 0.0)));
      const double own = std::tanh(dot(context, m, C, candidate, n, C, 0));
      CHECK_NEAR(out[at], mix * double(state[at]) + (1 - mix) * own, allowed);
      if (!save) continue;
      CHECK_NEAR(g[at], mix, allowed);
      CHECK_NEAR(u[at], own, allowed);
    }
  }
}

}  // namespace

void run_tests() {
  for (const Isa isa : kAllIsas) {
    if (!use_isa(isa)) continue;
    for (const Format format :
         {Format::kFloat32, Format::kBfloat16, Format::kFloat16, Format::kInt8}) {
      for (const bool save : {false, true}) {
        for (const bool split : {false, true}) {
          test(kernels(isa), format, 1, 1, 1, 1, split, save);
          test(kernels(isa), format, 40, 70, 33, 3, split, save);
          test(kernels(isa), format, 5, 64, 130, 2, split, save);
        }
      }
    }
  }
}
