// The inner product step of the matrix product, for each format that weights are stored in.
//
// A kernel walks the common dimension k in groups that fill one 32-bit word of a row: one float,
// two bf16, four bytes. `Dot<format>` says how a word of the row, broadcast to all lanes, meets a
// vector of weights: kLanes output columns, the group's k next to each other in each column.
#pragma once

#include "core/format.h"
#include "core/simd.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {

template <Format format>
struct Dot;

template <>
struct Dot<Format::kFloat32> {
  using Acc = Float;
  static ENCDEC_INLINE Acc start() { return zero(); }
  static ENCDEC_INLINE Float weights(const char* p) {
    return load(reinterpret_cast<const float*>(p));
  }
  static ENCDEC_INLINE Float word(const char* p) {
    return set1(*reinterpret_cast<const float*>(p));
  }
  static ENCDEC_INLINE Acc step(Acc acc, Float x, Float w) { return fma(x, w, acc); }
  static ENCDEC_INLINE Acc sum(Acc a, Acc b) { return add(a, b); }
  static ENCDEC_INLINE void put(float* out, Acc acc) { store(out, acc); }
};

// Weights in half precision, widened on load; rows are float.
template <>
struct Dot<Format::kFloat16> : Dot<Format::kFloat32> {
  static ENCDEC_INLINE Float weights(const char* p) { return from_f16(load_half(p)); }
};

template <>
struct Dot<Format::kBfloat16> {
  using Acc = Float;
  static ENCDEC_INLINE Acc start() { return zero(); }
  static ENCDEC_INLINE Int weights(const char* p) { return iload(p); }
  static ENCDEC_INLINE Int word(const char* p) {
    return iset1(*reinterpret_cast<const int32_t*>(p));
  }
  static ENCDEC_INLINE Acc step(Acc acc, Int x, Int w) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w);
#elif defined(__AVX512F__)
    const Int high = iset1(static_cast<int32_t>(0xffff0000u));
    acc = fma(from_bits(_mm512_slli_epi32(x, 16)), from_bits(_mm512_slli_epi32(w, 16)), acc);
    return fma(from_bits(_mm512_and_si512(x, high)), from_bits(_mm512_and_si512(w, high)), acc);
#else
    const Int high = iset1(static_cast<int32_t>(0xffff0000u));
    acc = fma(from_bits(_mm256_slli_epi32(x, 16)), from_bits(_mm256_slli_epi32(w, 16)), acc);
    return fma(from_bits(_mm256_and_si256(x, high)), from_bits(_mm256_and_si256(w, high)), acc);
#endif
  }
  static ENCDEC_INLINE Acc sum(Acc a, Acc b) { return add(a, b); }
  static ENCDEC_INLINE void put(float* out, Acc acc) { store(out, acc); }
};

// Unsigned rows times signed weights, exact 32-bit sums on every instruction set. (The saturating
// 8-bit multiply-add of AVX2 is not used: even and odd bytes are widened to 16 bits first.)
template <>
struct Dot<Format::kInt8> {
  using Acc = Int;
  static ENCDEC_INLINE Acc start() { return izero(); }
  static ENCDEC_INLINE Int weights(const char* p) { return iload(p); }
  static ENCDEC_INLINE Int word(const char* p) {
    return iset1(*reinterpret_cast<const int32_t*>(p));
  }
  static ENCDEC_INLINE Acc step(Acc acc, Int x, Int w) {
#if defined(__AVX512VNNI__)
    // The intrinsic makes GCC 12 copy every accumulator to the stack and back in each step.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
    return acc;
#elif defined(__AVX512F__)
    const Int low = _mm512_set1_epi16(0xff);
    const Int even =
        _mm512_madd_epi16(_mm512_and_si512(x, low), _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8));
    const Int odd = _mm512_madd_epi16(_mm512_srli_epi16(x, 8), _mm512_srai_epi16(w, 8));
    return iadd(acc, iadd(even, odd));
#else
    const Int low = _mm256_set1_epi16(0xff);
    const Int even =
        _mm256_madd_epi16(_mm256_and_si256(x, low), _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
    const Int odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(w, 8));
    return iadd(acc, iadd(even, odd));
#endif
  }
  static ENCDEC_INLINE Acc sum(Acc a, Acc b) { return iadd(a, b); }
  static ENCDEC_INLINE void put(float* out, Acc acc) { store(out, to_float(acc)); }
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
