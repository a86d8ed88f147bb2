// What forward and backward of additive attention share: the factors of tanh(q + k).
//
//     tanh(q + k) = 1 - 2 r,    r = 1 / (1 + e^{2q} e^{2k})
//
// With the exponentials taken once per row, an element of the (Tq, S, A) product costs a
// multiply-add and a reciprocal. Two exponentials of up to 2 ulp, a product and a reciprocal leave
// an absolute error of at most 5e-7 in tanh, wherever it is (tests/cpp/additive_isa_test.cpp).
// Factors up to e^43 cannot overflow in the product nor vanish. A unit of work that meets a larger
// number, or NaN, is done once more with rows of 2q and 2k, and r = sigmoid(-(2q + 2k)).
#pragma once

#include "attention/additive.h"
#include "attention/tiles.h"
#include "attention/units.h"
#include "core/team.h"

namespace encdec::attention {
namespace ENCDEC_ISA_NAMESPACE {

constexpr float kLargestDouble = 43.0f;  // of |2q| and |2k|

constexpr int64_t row_floats(int64_t size) { return staged_row_bytes(Format::kFloat32, size) / 4; }

template <bool direct>
ENCDEC_INLINE Float reciprocal_of(Float q, Float k) {
  if constexpr (direct) {
    return sigmoid(sub(zero(), add(q, k)));
  } else {
    return reciprocal(fma(q, k, set1(1.0f)));
  }
}

// The factors of `count` numbers of a tensor, in whole vectors. Coverage c adds c times row
// `coverage_weight` to the numbers. Returns whether all are in range.
template <bool direct>
inline bool factor_row(Format dtype, const char* src, int64_t count, const char* coverage,
                       const char* coverage_weight, float* dst) {
  const int bytes = element_bytes(dtype);
  const Float c = coverage ? set1(reduce_add(load_as(dtype, coverage, 1))) : zero();
  bool good = true;
  for (int64_t a = 0; a < count; a += kLanes) {
    const int n = lanes_left(a, count);
    Float x = load_as(dtype, src + a * bytes, n);
    if (coverage) x = fma(c, load_as(dtype, coverage_weight + a * bytes, n), x);
    x = add(x, x);
    if constexpr (direct) {
      store(dst + a, x);
    } else {
      good &= !any_not_le(abs(x), set1(kLargestDouble));
      store(dst + a, exp(x));
    }
  }
  return good;
}

inline void zero_row(char* row, int64_t count, Format dtype) {
  std::memset(row, 0, static_cast<size_t>(count * element_bytes(dtype)));
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::attention
