// The inner product step of the matrix product, for each format that weights are stored in.
//
// A kernel walks the common dimension k in groups that fill one 32-bit word of a row: one float,
// two bf16, four bytes. `Dot<format>` says how a word of the row, broadcast to all lanes, meets a
// vector of weights: kLanes output columns, the group's k next to each other in each column.
//
// Where the processor has no product of halves or bytes (kWide), a word comes in two parts, which
// `widen` makes of kLanes words of a row, once for a whole tile. Either each part has products of
// its own (kParts is 2), with the same numbers that weights<part> takes from a vector of weights,
// or `word` reads both and one step takes them.
#pragma once

#include "core/format.h"
#include "core/simd.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {

// Words that are widened at a time: the second part of a word lies so many words behind its first.
constexpr int64_t kWideGroups = 64;

template <Format format>
struct Dot;

template <>
struct Dot<Format::kFloat32> {
  using Acc = Float;
  static constexpr int kParts = 1;
  static constexpr bool kWide = false;
  static ENCDEC_INLINE Acc start() { return zero(); }
  template <int part = 0>
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
  template <int part = 0>
  static ENCDEC_INLINE Float weights(const char* p) {
    return from_f16(load_half(p));
  }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<Format::kBfloat16> : Dot<Format::kFloat32> {
  template <int part = 0>
  static ENCDEC_INLINE Int weights(const char* p) {
    return iload(p);
  }
  static ENCDEC_INLINE Int word(const char* p) {
    return iset1(*reinterpret_cast<const int32_t*>(p));
  }
  static ENCDEC_INLINE Acc step(Acc acc, Int x, Int w) {
    return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w);
  }
};
#else
// Both halves of a word as floats.
template <>
struct Dot<Format::kBfloat16> : Dot<Format::kFloat32> {
  static constexpr int kParts = 2;
  static constexpr bool kWide = true;
  template <int part>
  static ENCDEC_INLINE Float half(Int words) {
    return from_bits(part == 0 ? shift_left<16>(words)
                               : iand(words, iset1(static_cast<int32_t>(0xffff0000u))));
  }
  template <int part>
  static ENCDEC_INLINE Float weights(const char* p) {
    return half<part>(iload(p));
  }
  static ENCDEC_INLINE Acc step(Acc acc, Float x, Float w) {
    acc = fma(x, w, acc);
    asm("" : "+v"(acc));  // in this register: a sum that goes through the stack holds up the next
    return acc;
  }
  static ENCDEC_INLINE void widen(Int words, char* first, char* second) {
    store(reinterpret_cast<float*>(first), half<0>(words));
    store(reinterpret_cast<float*>(second), half<1>(words));
  }
};
#endif

// Unsigned rows times signed weights, exact 32-bit sums on every instruction set. The first sums
// of columns start where the rows' zero point is taken off.
struct IntegerSums {
  using Acc = Int;
  static ENCDEC_INLINE Acc start() { return izero(); }
  static ENCDEC_INLINE Acc first(const int32_t* starts) { return iload(starts); }
  static ENCDEC_INLINE Int word(const char* p) {
    return iset1(*reinterpret_cast<const int32_t*>(p));
  }
  static ENCDEC_INLINE Acc sum(Acc a, Acc b) { return iadd(a, b); }
  static ENCDEC_INLINE void put(float* out, Acc acc) { store(out, to_float(acc)); }
};

#if defined(__AVX512VNNI__)
template <>
struct Dot<Format::kInt8> : IntegerSums {
  static constexpr int kParts = 1;
  static constexpr bool kWide = false;
  template <int part = 0>
  static ENCDEC_INLINE Int weights(const char* p) {
    return iload(p);
  }
  static ENCDEC_INLINE Acc step(Acc acc, Int x, Int w) {
    // The intrinsic makes GCC 12 copy every accumulator to the stack and back in each step.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
    return acc;
  }
};
#elif defined(__AVX512F__)
// Even and odd bytes as 16-bit numbers. (The multiply-add of bytes saturates.)
template <>
struct Dot<Format::kInt8> : IntegerSums {
  static constexpr int kParts = 2;
  static constexpr bool kWide = true;
  template <int part>
  static ENCDEC_INLINE Int weights(const char* p) {
    const Int w = iload(p);
    return signed_high_bytes(part == 0 ? shift_left_halves<8>(w) : w);
  }
  static ENCDEC_INLINE void widen(Int words, char* first, char* second) {
    istore(first, iand(words, iset1(0x00ff00ff)));
    istore(second, iand(shift_right<8>(words), iset1(0x00ff00ff)));
  }
  static ENCDEC_INLINE Acc step(Acc acc, Int x, Int w) {
    acc = iadd(acc, madd_halves(x, w));
    // GCC would add up both parts' products first, and have no register left for the sums.
    asm("" : "+v"(acc));
    return acc;
  }
};
#else
// The multiply-add of bytes takes unsigned by signed numbers and saturates, but not here: it gets
// the magnitudes of the row, 127 at most (128 in a row that is not finite), and the weights with
// the signs of the row, of which two products are 32,512 at most.
template <>
struct Dot<Format::kInt8> : IntegerSums {
  static constexpr int kParts = 1;
  static constexpr bool kWide = true;
  struct Word {
    Int magnitudes, signs;
  };
  static ENCDEC_INLINE Acc first(const int32_t*) { return izero(); }  // widen takes it off
  template <int part = 0>
  static ENCDEC_INLINE Int weights(const char* p) {
    return iload(p);
  }
  static ENCDEC_INLINE void widen(Int words, char* magnitudes, char* signs) {
    const Int number = ixor(words, iset1(static_cast<int32_t>(0x80808080u)));
    istore(magnitudes, _mm256_abs_epi8(number));
    istore(signs, number);
  }
  static ENCDEC_INLINE Word word(const char* p) {
    return {IntegerSums::word(p), IntegerSums::word(p + kWideGroups * 4)};
  }
  static ENCDEC_INLINE Acc step(Acc acc, Word x, Int w) {
    const Int pairs = _mm256_maddubs_epi16(x.magnitudes, _mm256_sign_epi8(w, x.signs));
    acc = iadd(acc, madd_halves(pairs, _mm256_set1_epi16(1)));
    asm("" : "+v"(acc));
    return acc;
  }
};
#endif

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
