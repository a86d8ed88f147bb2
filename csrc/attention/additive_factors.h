// What forward and backward of additive attention share: the factors of tanh(q + k).
//
//     tanh(q + k) = 1 - 2 r,    r = 1 / (1 + e^{2q} e^{2k})
//
// With the exponentials taken once per row, an element of the (Tq, S, A) product costs a
// multiply-add and a reciprocal. Two exponentials of up to 2 ulp, a product and a reciprocal leave
// an absolute error of at most 5e-7 in tanh, wherever it is (tests/cpp/additive_isa_test.cpp).
// Factors up to e^43 cannot overflow in the product nor vanish. A unit of work that meets a larger
// number, or NaN, is done once more with rows of 2q and 2k, and r = sigmoid(-(2q + 2k)).
//
// The sum of v r over two elements takes one reciprocal for both (forward, where it is all that is
// wanted): v/x + w/y = (v y + w x) / (x y). There factors go up to e^22, that is q and k up to 11.
#pragma once

#include "attention/additive.h"
#include "attention/tiles.h"
#include "attention/units.h"
#include "core/team.h"

namespace encdec::attention {
namespace ENCDEC_ISA_NAMESPACE {

constexpr float kLargestDouble = 43.0f;  // of |2q| and |2k|
constexpr float kLargestOfPairs = 22.0f;

constexpr int64_t row_floats(int64_t size) { return staged_row_bytes(Format::kFloat32, size) / 4; }

template <bool direct>
ENCDEC_INLINE Float reciprocal_of(Float q, Float k) {
  if constexpr (direct) {
    return sigmoid(sub(zero(), add(q, k)));
  } else {
    return reciprocal(fma(q, k, set1(1.0f)));
  }
}

// sum + v.first r.first + v.second r.second.
template <bool direct>
ENCDEC_INLINE Float add_weighted(Float sum, Pair v, Pair q, Pair k) {
  if constexpr (direct) {
    sum = fma(v.first, reciprocal_of<direct>(q.first, k.first), sum);
    return fma(v.second, reciprocal_of<direct>(q.second, k.second), sum);
  } else {
    const Float x = fma(q.first, k.first, set1(1.0f)), y = fma(q.second, k.second, set1(1.0f));
    return fma(fma(v.first, y, mul(v.second, x)), reciprocal(mul(x, y)), sum);
  }
}

// The factors of `count` numbers of a tensor, in whole vectors. Coverage c adds c times row
// `coverage_weight` to the numbers. Returns whether all are in range: twice them at most `largest`.
template <bool direct>
inline bool factor_row(Format dtype, const char* src, int64_t count, const char* coverage,
                       const char* coverage_weight, float* dst, float largest = kLargestDouble) {
  const int bytes = element_bytes(dtype);
  const Float c = coverage ? set1(reduce_add(load_as(dtype, coverage, 1))) : zero();
  bool good = true;
  for (int64_t a = 0; a < count; a += kLanes) {
    const int n = lanes_left(a, count);
    Float x = load_as(dtype, src + a * bytes, n);
    if (coverage) x = fma(c, load_as(dtype, coverage_weight + a * bytes, n), x);
    if constexpr (direct) {
      store(dst + a, add(x, x));
    } else {
      good &= !any_not_le(abs(x), set1(0.5f * largest));
      store(dst + a, exp_twice(x));
    }
  }
  return good;
}

inline void zero_row(char* row, int64_t count, Format dtype) {
  std::memset(row, 0, static_cast<size_t>(count * element_bytes(dtype)));
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::attention
