// exp, exp2, expm1, sigmoid, tanh, erf on vectors of floats.
//
// All but exp2 rest on one reduction: x = n ln 2 + r with |r| <= ln(2)/2, and
//     expm1(r) = r + r^2 q(r),   q of degree 4, minimax in relative error: 1.4e-8,
// so that exp(x) = 2^n (1 + expm1(r)) and expm1(x) = 2^n expm1(r) + (2^n - 1), the latter exact in
// its second term near zero, which keeps tanh accurate there.
//
// Largest errors against double, over all floats of the stated range (tests/cpp/math_isa_test.cpp):
//     exp      2 ulp on [-87.3, 88.3], 1.2e-38 below, infinity above
//     exp_twice  2 ulp of e^(2x) on [-43, 43]
//     exp2     2 ulp on [-126, 127], at most 1.2e-38 below, 0 from -152 down
//     expm1    3 ulp on [-20, 20]
//     sigmoid  3 ulp above -87, absolute 2e-38 below, 0 from -89 down
//     tanh     4 ulp everywhere
//     erf      6 ulp everywhere
//     sigmoid_tanh(x, y)  7 ulp for x above -68, absolute 4e-30 below
// NaN comes out where NaN went in.
#pragma once

#include "core/simd.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {

struct ScaledExpm1 {
  Float expm1_r;  // expm1 of the reduced argument
  Float n;        // integral
};

// x in [-87.3, 89].
ENCDEC_INLINE ScaledExpm1 reduce_exp(Float x) {
  const Float n = round(mul(x, set1(1.44269504088896341f)));
  // ln 2 in two pieces: the first has few enough bits that its product with n is exact.
  Float r = fnma(n, set1(0.693145751953125f), x);
  r = fnma(n, set1(1.42860682030941723e-6f), r);
  Float q = set1(1.388251672e-3f);
  q = fma(q, r, set1(8.366547128e-3f));
  q = fma(q, r, set1(4.166720071e-2f));
  q = fma(q, r, set1(1.666654342e-1f));
  q = fma(q, r, set1(4.999999815e-1f));
  return {fma(mul(r, r), q, r), n};
}

ENCDEC_INLINE Float exp(Float x) {
  const ScaledExpm1 e = reduce_exp(max(set1(-87.3f), min(set1(89.0f), x)));
  return times_exp2(add(set1(1.0f), e.expm1_r), e.n);
}

// e^(2x) for |x| up to 43, without a check. exp's reduction and polynomial with 2r in place of r,
// which scales their constants by powers of 2.
ENCDEC_INLINE Float exp_twice(Float x) {
  const Float n = round(mul(x, set1(2.88539008177792681f)));
  Float r = fnma(n, set1(0.3465728759765625f), x);
  r = fnma(n, set1(0.71430341015361861e-6f), r);
  Float q = set1(64 * 1.388251672e-3f);
  q = fma(q, r, set1(32 * 8.366547128e-3f));
  q = fma(q, r, set1(16 * 4.166720071e-2f));
  q = fma(q, r, set1(8 * 1.666654342e-1f));
  q = fma(q, r, set1(4 * 4.999999815e-1f));
  return times_exp2(fma(mul(r, r), q, fma(set1(2.0f), r, set1(1.0f))), n);
}

// 2^x for x up to 127. What softmax takes: its argument needs no reduction beyond the integral
// part. The polynomial's relative error is 2e-9; one of degree 5, 9e-8 always to the same side,
// is seen in gradients.
ENCDEC_INLINE Float exp2(Float x) {
  x = max(set1(kZeroExponent), x);
  const Float n = round(x);
  const Float r = sub(x, n);
  Float p = set1(1.535336194e-4f);
  p = fma(p, r, set1(1.339887440e-3f));
  p = fma(p, r, set1(9.618437357e-3f));
  p = fma(p, r, set1(5.550332471e-2f));
  p = fma(p, r, set1(2.402264791e-1f));
  p = fma(p, r, set1(6.931472029e-1f));
  p = fma(p, r, set1(1.0f));
  return times_exp2(p, n);
}

// x in [-20, 20].
ENCDEC_INLINE Float expm1_small(Float x) {
  const ScaledExpm1 e = reduce_exp(x);
  const Float scale = times_exp2(set1(1.0f), e.n);
  return fma(scale, e.expm1_r, sub(scale, set1(1.0f)));
}

ENCDEC_INLINE Float sigmoid(Float x) {
  return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x))));
}

ENCDEC_INLINE Float tanh(Float x) {
  // Beyond |x| = 10 the result is 1 to the last bit.
  const Float two_x = max(set1(-20.0f), min(set1(20.0f), add(x, x)));
  const Float e = expm1_small(two_x);
  return div(e, add(e, set1(2.0f)));
}

// -log(1 - erf(z)) is z times a polynomial, of degree 8 here: relative error of erf 4e-9 up
// to 3.95, beyond which erf is 1 to the last bit.
ENCDEC_INLINE Float erf(Float x) {
  const Float z = min(set1(3.95f), abs(x));
  Float p = set1(-9.256231351e-6f);
  p = fma(p, z, set1(1.176409510e-4f));
  p = fma(p, z, set1(-6.328356685e-4f));
  p = fma(p, z, set1(1.667025150e-3f));
  p = fma(p, z, set1(-1.603936689e-4f));
  p = fma(p, z, set1(-1.915306598e-2f));
  p = fma(p, z, set1(1.027778313e-1f));
  p = fma(p, z, set1(6.366193891e-1f));
  p = fma(p, z, set1(1.128379226f));
  return with_sign_of(sub(zero(), expm1_small(sub(zero(), mul(p, z)))), x);
}

// sigmoid(x) tanh(y), with one division for both.
ENCDEC_INLINE Float sigmoid_tanh(Float x, Float y) {
  const Float two_y = max(set1(-20.0f), min(set1(20.0f), add(y, y)));
  const Float e = expm1_small(two_y);
  // Where the product overflows the quotient is zero: sigmoid(x) is below 4e-30.
  const Float below = add(set1(1.0f), exp(sub(zero(), x)));
  return div(e, mul(below, add(e, set1(2.0f))));
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
