// The error bounds that core/math.h states, over every 4099th float of each range: few enough for
// an emulated processor too.
#include <cmath>
#include <initializer_list>
#include <limits>

#include "check.h"
#include "core/math.h"

using namespace encdec::ENCDEC_ISA_NAMESPACE;

namespace {

// Distance in units of the last place of the float nearest to `exact`.
double ulps(double value, double exact) {
  int exponent;
  std::frexp(exact, &exponent);
  const double unit = std::ldexp(1.0, exponent - 24 < -149 ? -149 : exponent - 24);
  return std::fabs(value - exact) / unit;
}

struct Worst {
  double error = 0.0;
  float at = 0.0f;
};

template <class Function, class Exact>
Worst worst_ulps(float low, float high, Function function, Exact exact) {
  Worst worst;
  // Positive floats are ordered like their images.
  const auto scan = [&](float from, float to, float sign) {
    uint32_t first, last;
    std::memcpy(&first, &from, 4);
    std::memcpy(&last, &to, 4);
    alignas(64) float in[kLanes], out[kLanes];
    for (uint64_t image = first; image <= last; image += 4099 * kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const uint64_t i = image + 4099 * l <= last ? image + 4099 * l : last;
        const uint32_t word = static_cast<uint32_t>(i);
        std::memcpy(&in[l], &word, 4);
        in[l] *= sign;
      }
      store(out, function(load(in)));
      for (int l = 0; l < kLanes; ++l) {
        const double error = ulps(out[l], exact(static_cast<double>(in[l])));
        if (!std::isnan(worst.error) && !(error <= worst.error)) worst = {error, in[l]};
      }
    }
  };
  if (high > 0) scan(1e-30f, high, 1.0f);
  if (low < 0) scan(1e-30f, -low, -1.0f);
  return worst;
}

float one(Float v) {
  alignas(64) float out[kLanes];
  store(out, v);
  return out[kLanes - 1];
}

}  // namespace

void run_tests() {
  CHECK_NEAR(
      worst_ulps(
          -87.3f, 88.3f, [](Float x) { return exp(x); }, [](double x) { return std::exp(x); })
          .error,
      0, 2);
  CHECK_NEAR(
      worst_ulps(
          -43, 43, [](Float x) { return exp_twice(x); }, [](double x) { return std::exp(2 * x); })
          .error,
      0, 2);
  CHECK_NEAR(worst_ulps(
                 -126, 127, [](Float x) { return exp2(x); }, [](double x) { return std::exp2(x); })
                 .error,
             0, 2);
  CHECK_NEAR(worst_ulps(
                 -10, 10, [](Float x) { return expm1_twice(x); },
                 [](double x) { return std::expm1(2 * x); })
                 .error,
             0, 5);
  // What is lost of a negative argument grows with it.
  for (const float low : {-1.0f, -4.0f, -8.0f, -16.0f, -40.0f, -87.0f}) {
    CHECK_NEAR(worst_ulps(
                   low, 1e30f, [](Float x) { return sigmoid(x); },
                   [](double x) { return 1 / (1 + std::exp(-x)); })
                   .error,
               0, 3 - low / 4);
  }
  CHECK_NEAR(
      worst_ulps(
          -1e30f, 1e30f, [](Float x) { return tanh(x); }, [](double x) { return std::tanh(x); })
          .error,
      0, 5);
  CHECK_NEAR(
      worst_ulps(
          -1e30f, 1e30f, [](Float x) { return erf(x); }, [](double x) { return std::erf(x); })
          .error,
      0, 5);
  // Both arguments run over the range, at an irrational ratio.
  for (const float ratio : {0.37f, -2.19f}) {
    for (const float low : {-1.0f, -8.0f, -68.0f}) {
      CHECK_NEAR(worst_ulps(
                     low, 30, [&](Float x) { return sigmoid_tanh(x, mul(x, set1(ratio))); },
                     [&](double x) {
                       const double y = static_cast<double>(static_cast<float>(x) * ratio);
                       return std::tanh(y) / (1 + std::exp(-x));
                     })
                     .error,
                 0, 6 - low / 4);
    }
  }
  CHECK_NEAR(
      worst_ulps(
          1e-30f, 1e30f, [](Float x) { return reciprocal(x); }, [](double x) { return 1 / x; })
          .error,
      0, 1);

  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK_EQ(one(sigmoid(set1(-inf))), 0.0f);
  CHECK_EQ(one(sigmoid(set1(inf))), 1.0f);
  CHECK_EQ(one(tanh(set1(inf))), 1.0f);
  CHECK_EQ(one(tanh(set1(-inf))), -1.0f);
  CHECK_EQ(one(tanh(zero())), 0.0f);
  CHECK_EQ(one(erf(set1(-inf))), -1.0f);
  CHECK(std::isnan(one(erf(set1(nan)))));
  CHECK_EQ(one(sigmoid_tanh(set1(-inf), set1(inf))), 0.0f);
  CHECK_EQ(one(sigmoid_tanh(set1(inf), set1(-inf))), -1.0f);
  CHECK(std::isnan(one(sigmoid_tanh(set1(nan), set1(1.0f)))));
  CHECK(std::isnan(one(sigmoid_tanh(set1(-inf), set1(nan)))));
  CHECK(std::isnan(one(exp(set1(nan)))));
  CHECK_EQ(one(exp2(set1(-inf))), 0.0f);
  CHECK_EQ(one(exp2(set1(-152.0f))), 0.0f);
  CHECK(one(exp2(set1(-127.3f))) < 1.2e-38f);
  CHECK(std::isnan(one(exp2(set1(nan)))));
  CHECK(std::isnan(one(sigmoid(set1(nan)))));
  CHECK(std::isnan(one(tanh(set1(nan)))));

  // bf16: nearest, ties to even, NaN and infinities kept, denormals too.
  const auto through_bf16 = [](float x) { return one(from_bf16(to_bf16(set1(x)))); };
  CHECK_EQ(through_bf16(1.0f), 1.0f);
  CHECK_EQ(through_bf16(1.00390625f), 1.0f);       // halfway, down to even
  CHECK_EQ(through_bf16(1.01171875f), 1.015625f);  // halfway, up to even
  CHECK_EQ(through_bf16(-3.4e38f), -inf);
  CHECK_EQ(through_bf16(inf), inf);
  CHECK_EQ(through_bf16(1e-40f) > 0.0f, true);
  CHECK(std::isnan(through_bf16(nan)));
  CHECK_EQ(one(from_f16(to_f16(set1(0.1f)))), 0.0999755859375f);
}
