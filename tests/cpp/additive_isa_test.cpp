// The error that additive_factors.h states for tanh(q + k) from factors, over its whole range.
#include <cmath>

#include "attention/additive_factors.h"
#include "check.h"

using namespace encdec;
using namespace encdec::attention::ENCDEC_ISA_NAMESPACE;

namespace {

// tanh(q + k) as the kernels have it, for kLanes keys.
template <bool direct>
bool tanh_of_sum(float q, const float* k, float* out) {
  alignas(64) float own[kLanes], keys[kLanes];
  bool good = factor_row<direct>(Format::kFloat32, reinterpret_cast<const char*>(&q), 1, nullptr,
                                 nullptr, own);
  good &= factor_row<direct>(Format::kFloat32, reinterpret_cast<const char*>(k), kLanes, nullptr,
                             nullptr, keys);
  const Float r = reciprocal_of<direct>(set1(own[0]), load(keys));
  store(out, fnma(set1(2.0f), r, set1(1.0f)));
  return good;
}

template <bool direct>
double worst_error(float range) {
  double worst = 0.0;
  alignas(64) float k[kLanes], out[kLanes];
  for (float q = -range; q <= range; q += range / 487) {
    for (float start = -range; start <= range; start += range / 37) {
      for (int l = 0; l < kLanes; ++l) {
        k[l] = start + range / 37 / kLanes * static_cast<float>(l);
        if (k[l] > range) k[l] = range;
      }
      CHECK_EQ(tanh_of_sum<direct>(q, k, out), true);
      for (int l = 0; l < kLanes; ++l) {
        const double exact = std::tanh(static_cast<double>(q) + static_cast<double>(k[l]));
        const double error = std::fabs(out[l] - exact);
        check::raise(worst, error);
      }
    }
  }
  return worst;
}

// Of the weighted sum over two elements, relative to the weights: half of what tanh may have.
double worst_pair_error(float range) {
  double worst = 0.0;
  alignas(64) float k[2][kLanes], factors[2][kLanes], own[2][kLanes], out[kLanes];
  const auto row = [](const float* from, int count, float* to) {
    return factor_row<false>(Format::kFloat32, reinterpret_cast<const char*>(from), count, nullptr,
                             nullptr, to, kLargestOfPairs);
  };
  const float v = 0.75f, w = -1.25f;
  for (float q = -range; q <= range; q += range / 97) {
    const float other = -q * 0.9f;
    for (float start = -range; start <= range; start += range / 37) {
      for (int l = 0; l < kLanes; ++l) {
        k[0][l] = std::fmin(range, start + range / 37 / kLanes * static_cast<float>(l));
        k[1][l] = l % 2 ? k[0][l] : -k[0][l];
      }
      bool good = row(&q, 1, own[0]) && row(&other, 1, own[1]);
      for (int i = 0; i < 2; ++i) good &= row(k[i], kLanes, factors[i]);
      CHECK(good);
      store(out, add_weighted<false>(zero(), {set1(v), set1(w)}, {set1(own[0][0]), set1(own[1][0])},
                                     {load(factors[0]), load(factors[1])}));
      for (int l = 0; l < kLanes; ++l) {
        const auto r = [](double x) { return 1.0 / (1.0 + std::exp(2.0 * x)); };
        const double exact = v * r(static_cast<double>(q) + static_cast<double>(k[0][l])) +
                             w * r(static_cast<double>(other) + static_cast<double>(k[1][l]));
        const double error = std::fabs(out[l] - exact) / (v - w);
        check::raise(worst, error);
      }
    }
  }
  return worst;
}

}  // namespace

void run_tests() {
  CHECK_NEAR(worst_pair_error(1.0f), 0, 2.5e-7);
  CHECK_NEAR(worst_pair_error(kLargestOfPairs / 2), 0, 2.5e-7);
  CHECK_NEAR(worst_error<false>(1.0f), 0, 5e-7);
  CHECK_NEAR(worst_error<false>(kLargestDouble / 2), 0, 5e-7);
  CHECK_NEAR(worst_error<true>(1.0f), 0, 5e-7);
  CHECK_NEAR(worst_error<true>(1e4f), 0, 5e-7);
  // Just out of range, and NaN: said so.
  alignas(64) float k[kLanes] = {}, out[kLanes];
  CHECK_EQ(tanh_of_sum<false>(kLargestDouble / 2 + 0.1f, k, out), false);
  k[kLanes - 1] = -kLargestDouble;
  CHECK_EQ(tanh_of_sum<false>(0.0f, k, out), false);
  k[kLanes - 1] = std::nanf("");
  CHECK_EQ(tanh_of_sum<false>(0.0f, k, out), false);
}
