// One vector register of floats or 32-bit sums, the same few operations for every instruction set.
//
// This header is compiled once per instruction set, inside the namespace that the build names
// (ENCDEC_ISA_NAMESPACE), so that no code made for one processor can be linked into the objects
// of another. Whoever includes it must be compiled that way too.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef ENCDEC_ISA_NAMESPACE
#error "simd.h is for sources that are compiled once per instruction set"
#endif

#define ENCDEC_INLINE inline __attribute__((always_inline))

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {

#if defined(__AVX512F__)

constexpr int kLanes = 16;      // floats in a vector
constexpr int kRegisters = 32;  // architectural vector registers
using Float = __m512;           // kLanes floats
using Int = __m512i;            // kLanes 32-bit integers
using Half = __m256i;           // kLanes 16-bit values
using Mask = __mmask16;

ENCDEC_INLINE Float zero() { return _mm512_setzero_ps(); }
ENCDEC_INLINE Float set1(float x) { return _mm512_set1_ps(x); }
ENCDEC_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
ENCDEC_INLINE void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
ENCDEC_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
ENCDEC_INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
ENCDEC_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
ENCDEC_INLINE Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
ENCDEC_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }    // ab + c
ENCDEC_INLINE Float fnma(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); }  // c - ab
ENCDEC_INLINE Float fmsub(Float a, Float b, Float c) { return _mm512_fmsub_ps(a, b, c); }  // ab - c
// The second operand is what comes out when either is NaN: put the variable there.
ENCDEC_INLINE Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
ENCDEC_INLINE Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
ENCDEC_INLINE Float abs(Float a) { return _mm512_abs_ps(a); }
// 1 / a to 1 ulp, for a and 1 / a normal: an estimate of 14 bits and a step of Newton's.
ENCDEC_INLINE Float reciprocal(Float a) {
  const Float estimate = _mm512_rcp14_ps(a);
  return fma(estimate, fnma(a, estimate, _mm512_set1_ps(1.0f)), estimate);
}
ENCDEC_INLINE Float round(Float a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// v 2^n for integral n in [-126, 128] and v in [0.7, 1.5]. 2^128 may be infinite by itself. With
// kZeroExponent it is 0.
constexpr float kZeroExponent = -151.0f;
ENCDEC_INLINE Float times_exp2(Float v, Float n) { return _mm512_scalef_ps(v, n); }
ENCDEC_INLINE Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
ENCDEC_INLINE Int to_int(Float v) { return _mm512_cvtps_epi32(v); }
ENCDEC_INLINE Int bits(Float v) { return _mm512_castps_si512(v); }
ENCDEC_INLINE Float from_bits(Int v) { return _mm512_castsi512_ps(v); }
ENCDEC_INLINE Int izero() { return _mm512_setzero_si512(); }
ENCDEC_INLINE Int iset1(int32_t x) { return _mm512_set1_epi32(x); }
ENCDEC_INLINE Int iload(const void* p) { return _mm512_loadu_si512(p); }
ENCDEC_INLINE void istore(void* p, Int v) { _mm512_storeu_si512(p, v); }
ENCDEC_INLINE void istore_past_caches(void* p, Int v) {
  _mm512_stream_si512(static_cast<__m512i*>(p), v);
}
ENCDEC_INLINE Int iadd(Int a, Int b) { return _mm512_add_epi32(a, b); }
ENCDEC_INLINE Int ixor(Int a, Int b) { return _mm512_xor_si512(a, b); }
ENCDEC_INLINE Int iand(Int a, Int b) { return _mm512_and_si512(a, b); }
ENCDEC_INLINE Int imax(Int a, Int b) { return _mm512_max_epi32(a, b); }
template <int n>
ENCDEC_INLINE Int shift_left(Int v) {
  return _mm512_slli_epi32(v, n);
}
template <int n>
ENCDEC_INLINE Int shift_right(Int v) {  // zeros come in
  return _mm512_srli_epi32(v, n);
}
// Entry i of a table of kLanes, i the last bits of a lane's index.
ENCDEC_INLINE Int lookup(Int table, Int index) { return _mm512_permutexvar_epi32(index, table); }
// Both 16-bit halves of every lane by themselves.
template <int n>
ENCDEC_INLINE Int shift_left_halves(Int v) {
  return _mm512_slli_epi16(v, n);
}
// The upper byte of each half as a signed number.
ENCDEC_INLINE Int signed_high_bytes(Int v) { return _mm512_srai_epi16(v, 8); }
// The sum of the products of both halves of a lane.
ENCDEC_INLINE Int madd_halves(Int a, Int b) { return _mm512_madd_epi16(a, b); }
// The 64 bits of a product of two unsigned numbers, as its upper and lower half.
ENCDEC_INLINE void mul_wide(Int a, Int b, Int* high, Int* low) {
  const Int even = _mm512_mul_epu32(a, b);
  const Int odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
  *high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  *low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
}
// v where the unsigned number of a lane is at least `least`, else 0.
ENCDEC_INLINE Float where_at_least(Int numbers, uint32_t least, Float v) {
  return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(numbers, iset1(static_cast<int32_t>(least))),
                             v);
}
ENCDEC_INLINE float reduce_max(Float v) { return _mm512_reduce_max_ps(v); }
ENCDEC_INLINE float reduce_add(Float v) { return _mm512_reduce_add_ps(v); }
// Bit i: the comparison a <= b is false in lane i, NaN included.
ENCDEC_INLINE uint32_t lanes_not_le(Float a, Float b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ);
}
// v where a > 0, else 0.
ENCDEC_INLINE Float where_positive(Float a, Float v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, zero(), _CMP_GT_OQ), v);
}
// v >= 0 with the sign of s.
ENCDEC_INLINE Float with_sign_of(Float v, Float s) {
  return from_bits(
      _mm512_or_si512(bits(v), _mm512_and_si512(bits(s), iset1(static_cast<int32_t>(1u << 31)))));
}
// v where the byte of a lane is not 0, else `otherwise`; reads kLanes bytes.
ENCDEC_INLINE Float where_bytes(const void* bytes, Float v, Float otherwise) {
  const Int wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
  return _mm512_mask_mov_ps(otherwise, _mm512_test_epi32_mask(wide, wide), v);
}
ENCDEC_INLINE Half load_half(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
ENCDEC_INLINE void store_half(void* p, Half v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
ENCDEC_INLINE Float from_bf16(Half h) {
  return from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
// The bfloat16 of each lane in the upper half of its word. Round to nearest even on the integer
// image; a NaN keeps its sign and becomes quiet. The hardware conversion is not used: it flushes
// denormals, and results would differ by machine.
ENCDEC_INLINE Int bf16_words(Float v) {
  const Int b = bits(v);
  const Int lsb = _mm512_and_si512(_mm512_srli_epi32(b, 16), iset1(1));
  const Int rounded = _mm512_add_epi32(b, _mm512_add_epi32(lsb, iset1(0x7fff)));
  const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, b, iset1(0x400000));
}
ENCDEC_INLINE Half to_bf16(Float v) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_words(v), 16));
}
// The halves of two vectors, one behind the other.
ENCDEC_INLINE Int bf16_pair(Float first, Float second) {
  alignas(64) static constexpr int16_t kUpper[2 * kLanes] = {
      1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(bf16_words(first), iload(kUpper), bf16_words(second));
}
ENCDEC_INLINE Int join_halves(Half first, Half second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}
// One word per lane: a in its lower, b in its upper half.
ENCDEC_INLINE Int pair_halves(Half a, Half b) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}
ENCDEC_INLINE Float from_f16(Half h) { return _mm512_cvtph_ps(h); }
ENCDEC_INLINE Half to_f16(Float v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Rows become columns.
ENCDEC_INLINE void transpose(Float (&r)[kLanes]) {
  Float t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  // Afterwards quarter q of r[4 i + c] holds column 4 q + c of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);
    t[4 + c] = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    t[8 + c] = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    t[12 + c] = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    r[c] = _mm512_shuffle_f32x4(t[c], t[8 + c], 0x88);
    r[8 + c] = _mm512_shuffle_f32x4(t[c], t[8 + c], 0xdd);
    r[4 + c] = _mm512_shuffle_f32x4(t[4 + c], t[12 + c], 0x88);
    r[12 + c] = _mm512_shuffle_f32x4(t[4 + c], t[12 + c], 0xdd);
  }
}
// Lane i of the result is the sum of vector i: half of what a transpose takes.
ENCDEC_INLINE Float sums_of(const Float (&v)[kLanes]) {
  Float quads[4];  // of 4 vectors each: in every quarter one lane per vector
  for (int i = 0; i < 4; ++i) {
    Float pairs[2];
    for (int j = 0; j < 2; ++j) {
      const Float a = v[4 * i + 2 * j], b = v[4 * i + 2 * j + 1];
      pairs[j] = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    const __m512d a = _mm512_castps_pd(pairs[0]), b = _mm512_castps_pd(pairs[1]);
    quads[i] =
        add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto halves = [](Float a, Float b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halves(halves(quads[0], quads[1]), halves(quads[2], quads[3]));
}
// Unsigned bytes of integers that lie in [0, 255].
ENCDEC_INLINE void store_u8(uint8_t* p, Int v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
using Float = __m256;
using Int = __m256i;
using Half = __m128i;

ENCDEC_INLINE Float zero() { return _mm256_setzero_ps(); }
ENCDEC_INLINE Float set1(float x) { return _mm256_set1_ps(x); }
ENCDEC_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
ENCDEC_INLINE void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
ENCDEC_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
ENCDEC_INLINE Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
ENCDEC_INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
ENCDEC_INLINE Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
ENCDEC_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
ENCDEC_INLINE Float fnma(Float a, Float b, Float c) { return _mm256_fnmadd_ps(a, b, c); }
ENCDEC_INLINE Float fmsub(Float a, Float b, Float c) { return _mm256_fmsub_ps(a, b, c); }
ENCDEC_INLINE Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
ENCDEC_INLINE Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
ENCDEC_INLINE Float abs(Float a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
ENCDEC_INLINE Float reciprocal(Float a) { return _mm256_div_ps(_mm256_set1_ps(1.0f), a); }
ENCDEC_INLINE Float round(Float a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
ENCDEC_INLINE Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
ENCDEC_INLINE Int to_int(Float v) { return _mm256_cvtps_epi32(v); }
ENCDEC_INLINE Int bits(Float v) { return _mm256_castps_si256(v); }
ENCDEC_INLINE Float from_bits(Int v) { return _mm256_castsi256_ps(v); }
ENCDEC_INLINE Int izero() { return _mm256_setzero_si256(); }
ENCDEC_INLINE Int iset1(int32_t x) { return _mm256_set1_epi32(x); }
ENCDEC_INLINE Int iload(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
ENCDEC_INLINE void istore(void* p, Int v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
ENCDEC_INLINE void istore_past_caches(void* p, Int v) {
  _mm256_stream_si256(static_cast<__m256i*>(p), v);
}
ENCDEC_INLINE Int iadd(Int a, Int b) { return _mm256_add_epi32(a, b); }
ENCDEC_INLINE Int ixor(Int a, Int b) { return _mm256_xor_si256(a, b); }
ENCDEC_INLINE Int iand(Int a, Int b) { return _mm256_and_si256(a, b); }
ENCDEC_INLINE Int imax(Int a, Int b) { return _mm256_max_epi32(a, b); }
template <int n>
ENCDEC_INLINE Int shift_left(Int v) {
  return _mm256_slli_epi32(v, n);
}
template <int n>
ENCDEC_INLINE Int shift_right(Int v) {  // zeros come in
  return _mm256_srli_epi32(v, n);
}
ENCDEC_INLINE Int lookup(Int table, Int index) { return _mm256_permutevar8x32_epi32(table, index); }
template <int n>
ENCDEC_INLINE Int shift_left_halves(Int v) {
  return _mm256_slli_epi16(v, n);
}
ENCDEC_INLINE Int signed_high_bytes(Int v) { return _mm256_srai_epi16(v, 8); }
ENCDEC_INLINE Int madd_halves(Int a, Int b) { return _mm256_madd_epi16(a, b); }
ENCDEC_INLINE void mul_wide(Int a, Int b, Int* high, Int* low) {
  const Int even = _mm256_mul_epu32(a, b);
  const Int odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
ENCDEC_INLINE Float where_at_least(Int numbers, uint32_t least, Float v) {
  const Int larger = _mm256_max_epu32(numbers, iset1(static_cast<int32_t>(least)));
  return _mm256_and_ps(from_bits(_mm256_cmpeq_epi32(larger, numbers)), v);
}
constexpr float kZeroExponent = -127.0f;
ENCDEC_INLINE Float times_exp2(Float v, Float n) {
  return mul(v, from_bits(_mm256_slli_epi32(_mm256_add_epi32(to_int(n), iset1(127)), 23)));
}
ENCDEC_INLINE float reduce_max(Float v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
ENCDEC_INLINE float reduce_add(Float v) {
  __m128 m = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_shuffle_ps(m, m, 1)));
}
ENCDEC_INLINE uint32_t lanes_not_le(Float a, Float b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
}
ENCDEC_INLINE Float where_positive(Float a, Float v) {
  return _mm256_and_ps(_mm256_cmp_ps(a, zero(), _CMP_GT_OQ), v);
}
ENCDEC_INLINE Float with_sign_of(Float v, Float s) {
  return _mm256_or_ps(v, _mm256_and_ps(s, _mm256_set1_ps(-0.0f)));
}
ENCDEC_INLINE Float where_bytes(const void* bytes, Float v, Float otherwise) {
  const Int wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(bytes)));
  const Float zero_bytes = from_bits(_mm256_cmpeq_epi32(wide, izero()));
  return _mm256_blendv_ps(v, otherwise, zero_bytes);
}
ENCDEC_INLINE Half load_half(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
ENCDEC_INLINE void store_half(void* p, Half v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
ENCDEC_INLINE Float from_bf16(Half h) {
  return from_bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
ENCDEC_INLINE Half narrow_epu32_epu16(Int v) {  // values below 65536
  const Int packed = _mm256_packus_epi32(v, v);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
ENCDEC_INLINE Half to_bf16(Float v) {
  const Int b = bits(v);
  const Int lsb = _mm256_and_si256(_mm256_srli_epi32(b, 16), iset1(1));
  const Int rounded = _mm256_add_epi32(b, _mm256_add_epi32(lsb, iset1(0x7fff)));
  const Int nan = bits(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const Int kept = _mm256_blendv_epi8(rounded, _mm256_or_si256(b, iset1(0x400000)), nan);
  return narrow_epu32_epu16(_mm256_srli_epi32(kept, 16));
}
ENCDEC_INLINE Int join_halves(Half first, Half second) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
}
ENCDEC_INLINE Int bf16_pair(Float first, Float second) {
  return join_halves(to_bf16(first), to_bf16(second));
}
ENCDEC_INLINE Int pair_halves(Half a, Half b) {
  return _mm256_or_si256(_mm256_cvtepu16_epi32(a), _mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16));
}
ENCDEC_INLINE Float from_f16(Half h) { return _mm256_cvtph_ps(h); }
ENCDEC_INLINE Half to_f16(Float v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
ENCDEC_INLINE void transpose(Float (&r)[kLanes]) {
  Float t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  // Afterwards half q of r[4 i + c] holds column 4 q + c of rows 4 i to 4 i + 3.
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const __m256d a = _mm256_castps_pd(t[i]), b = _mm256_castps_pd(t[i + 1]);
    const __m256d c = _mm256_castps_pd(t[i + 2]), d = _mm256_castps_pd(t[i + 3]);
    r[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    r[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    r[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    r[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x20);
    t[4 + c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
ENCDEC_INLINE Float sums_of(const Float (&v)[kLanes]) {
  Float quads[2];
  for (int i = 0; i < 2; ++i) {
    Float pairs[2];
    for (int j = 0; j < 2; ++j) {
      const Float a = v[4 * i + 2 * j], b = v[4 * i + 2 * j + 1];
      pairs[j] = add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    }
    const __m256d a = _mm256_castps_pd(pairs[0]), b = _mm256_castps_pd(pairs[1]);
    quads[i] =
        add(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return add(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
             _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
}
ENCDEC_INLINE void store_u8(uint8_t* p, Int v) {
  const Half words = narrow_epu32_epu16(v);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

#else
#error "no vector implementation for this instruction set"
#endif

ENCDEC_INLINE bool any_not_le(Float a, Float b) { return lanes_not_le(a, b) != 0; }

// The first n lanes of memory, zeros behind them; nothing past p + n is touched.
ENCDEC_INLINE Float load_partial(const float* p, int n) {
  alignas(64) float tmp[kLanes] = {};
  std::memcpy(tmp, p, sizeof(float) * static_cast<size_t>(n));
  return load(tmp);
}
ENCDEC_INLINE void store_partial(float* p, Float v, int n) {
  alignas(64) float tmp[kLanes];
  store(tmp, v);
  std::memcpy(p, tmp, sizeof(float) * static_cast<size_t>(n));
}
// v with zeros from lane n on.
ENCDEC_INLINE Float first_lanes(Float v, int n) {
  if (n == kLanes) return v;
  alignas(64) float tmp[kLanes];
  store(tmp, v);
  return load_partial(tmp, n);
}
ENCDEC_INLINE Half load_half_partial(const void* p, int n) {
  alignas(64) uint16_t tmp[kLanes] = {};
  std::memcpy(tmp, p, 2 * static_cast<size_t>(n));
  return load_half(tmp);
}
ENCDEC_INLINE void store_half_partial(void* p, Half v, int n) {
  alignas(64) uint16_t tmp[kLanes];
  store_half(tmp, v);
  std::memcpy(p, tmp, 2 * static_cast<size_t>(n));
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
