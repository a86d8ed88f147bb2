// exp, exp2, expm1, sigmoid, tanh, erf on vectors of floats.
//
// Gates take most of them: sigmoid, tanh and expm1 rest on 2^t = 2^b 2^r, where b is t rounded to
// a multiple of 1 / kLanes. 2^b comes from a table that is one vector, so that r is small and two
// or three terms make 2^r; what 2^b lacks as a float is added to 2^r - 1, which keeps tanh accurate
// near zero. t = x log2(e) is not corrected for the error of that constant: sigmoid, which is small
// where that matters, can bear it. exp and exp2 round to whole exponents.
//
// Largest errors against double, over all floats of the stated range (tests/cpp/math_isa_test.cpp):
//     exp      2 ulp on [-87.3, 88.3], 1.2e-38 below, infinity above
//     exp_twice  2 ulp of e^(2x) on [-43, 43]
//     exp2     2 ulp on [-126, 127], at most 1.2e-38 below, 0 from -152 down
//     expm1_twice  5 ulp of e^(2x) - 1 on [-10, 10]
//     sigmoid  3 ulp, and |x| / 4 more where x is negative; 0 from -89 down
//     tanh     5 ulp everywhere
//     erf      5 ulp everywhere
//     sigmoid_tanh(x, y)  6 ulp, and |x| / 4 more where x is negative; absolute 4e-30 from -68 down
// NaN comes out where NaN went in.
#pragma once

#include "core/simd.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {

ENCDEC_INLINE Float exp(Float x) {
  x = max(set1(-87.3f), min(set1(89.0f), x));
  const Float n = round(mul(x, set1(1.44269504088896341f)));
  // ln 2 in two pieces: the first has few enough bits that its product with n is exact.
  Float r = fnma(n, set1(0.693145751953125f), x);
  r = fnma(n, set1(1.42860682030941723e-6f), r);
  Float q = set1(1.388251672e-3f);
  q = fma(q, r, set1(8.366547128e-3f));
  q = fma(q, r, set1(4.166720071e-2f));
  q = fma(q, r, set1(1.666654342e-1f));
  q = fma(q, r, set1(4.999999815e-1f));
  return times_exp2(add(set1(1.0f), fma(mul(r, r), q, r)), n);
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

// 2^(j / 16)
constexpr double kRootsOfTwo[16] = {1.0,
                                    1.0442737824274138,
                                    1.0905077326652577,
                                    1.1387886347566917,
                                    1.1892071150027211,
                                    1.241857812073484,
                                    1.2968395546510097,
                                    1.3542555469368927,
                                    1.414213562373095,
                                    1.4768261459394993,
                                    1.5422108254079408,
                                    1.6104903319492543,
                                    1.6817928305074291,
                                    1.7562521603732995,
                                    1.8340080864093425,
                                    1.9152065613971473};

// 2^(j / kLanes) for the lanes j, as scaled_expm1 wants it: the image of the nearest float, less
// j in the place where the fraction bits of an exponent come to stand; and what that float lacks,
// relative to it.
struct Exp2Table {
  int32_t image[kLanes];
  float missing[kLanes];
};

constexpr int kFractionPlace = kLanes == 16 ? 19 : 20;

constexpr Exp2Table make_exp2_table() {
  Exp2Table table{};
  for (int j = 0; j < kLanes; ++j) {
    const double exact = kRootsOfTwo[j * 16 / kLanes];
    const float nearest = static_cast<float>(exact);
    table.image[j] =
        0x3f800000 + static_cast<int32_t>((nearest - 1.0f) * 0x1p23f) - j * (1 << kFractionPlace);
    table.missing[j] = static_cast<float>((exact - nearest) / nearest);
  }
  return table;
}

alignas(64) constexpr Exp2Table kExp2 = make_exp2_table();

// e^(kx) as scale * (1 + expm1).
struct ScaledExpm1 {
  Float scale, expm1;
};

// `factor` is k log2(e), and kx in [-87.3, 88.72283], the upper end of which has an infinite scale.
ENCDEC_INLINE ScaledExpm1 scaled_expm1(Float x, float factor) {
  // To add this number rounds to multiples of 1 / kLanes, and leaves them in the last bits.
  constexpr float kRounder = 12582912.0f / kLanes;
  const Float shifted = fma(x, set1(factor), set1(kRounder));
  const Float r = fmsub(x, set1(factor), sub(shifted, set1(kRounder)));
  // (2^r - 1) / r, minimax: relative error 1.1e-7 and 3.7e-9.
  Float q;
  if constexpr (kLanes == 16) {
    q = fma(set1(5.550410867e-2f), r, set1(2.402335515e-1f));
    q = fma(q, r, set1(6.93147181e-1f));
  } else {
    q = fma(set1(9.618129086e-3f), r, set1(5.550931705e-2f));
    q = fma(q, r, set1(2.402265084e-1f));
    q = fma(q, r, set1(6.93147178e-1f));
  }
  const Int b = bits(shifted);
  const Int scale = iadd(lookup(iload(kExp2.image), b), shift_left<kFractionPlace>(b));
  return {from_bits(scale), fma(q, r, from_bits(lookup(iload(kExp2.missing), b)))};
}

// e^(2x) - 1, x in [-10, 10].
ENCDEC_INLINE Float expm1_twice(Float x) {
  const ScaledExpm1 e = scaled_expm1(x, 2.88539008177792681f);
  return fma(e.scale, e.expm1, sub(e.scale, set1(1.0f)));
}

// 1 + e^(-x)
ENCDEC_INLINE Float one_plus_exp_minus(Float x) {
  const Float bounded = max(set1(-88.72283935546875f), min(set1(87.3f), x));
  const ScaledExpm1 e = scaled_expm1(bounded, -1.44269504088896341f);
  return fma(e.scale, add(set1(1.0f), e.expm1), set1(1.0f));
}

// Beyond |x| = 10 tanh is 1 to the last bit.
ENCDEC_INLINE Float within_ten(Float x) { return max(set1(-10.0f), min(set1(10.0f), x)); }

ENCDEC_INLINE Float sigmoid(Float x) { return div(set1(1.0f), one_plus_exp_minus(x)); }

ENCDEC_INLINE Float tanh(Float x) {
  const Float e = expm1_twice(within_ten(x));
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
  return with_sign_of(sub(zero(), expm1_twice(mul(mul(p, z), set1(-0.5f)))), x);
}

// sigmoid(x) tanh(y), with one division for both. Where the product overflows the quotient is zero:
// sigmoid(x) is below 4e-30.
ENCDEC_INLINE Float sigmoid_tanh(Float x, Float y) {
  const Float e = expm1_twice(within_ten(y));
  return div(e, mul(one_plus_exp_minus(x), add(e, set1(2.0f))));
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
