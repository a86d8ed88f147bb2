// Rows of numbers as torch holds them, brought into the form that the matrix product reads.
#pragma once

#include <limits>
#include <type_traits>

#include "core/format.h"
#include "core/simd.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {

// Outputs of this size are written past the caches.
constexpr int64_t kPastCaches = int64_t{1} << 20;

// n <= kLanes numbers of a tensor as floats, zeros behind them.
ENCDEC_INLINE Float load_as(Format dtype, const char* p, int n = kLanes) {
  if (dtype == Format::kFloat32) {
    const float* f = reinterpret_cast<const float*>(p);
    return n == kLanes ? load(f) : load_partial(f, n);
  }
  const Half h = n == kLanes ? load_half(p) : load_half_partial(p, n);
  return dtype == Format::kBfloat16 ? from_bf16(h) : from_f16(h);
}

ENCDEC_INLINE void store_as(Format dtype, char* p, Float v, int n = kLanes) {
  if (dtype == Format::kFloat32) {
    float* f = reinterpret_cast<float*>(p);
    if (n == kLanes) {
      store(f, v);
    } else {
      store_partial(f, v, n);
    }
    return;
  }
  const Half h = dtype == Format::kBfloat16 ? to_bf16(v) : to_f16(v);
  if (n == kLanes) {
    store_half(p, h);
  } else {
    store_half_partial(p, h, n);
  }
}

// Calls visit with the dtype of a tensor as a constant.
template <class Visit>
inline void with_dtype(Format dtype, const Visit& visit) {
  switch (dtype) {
    case Format::kFloat32:
      return visit(std::integral_constant<Format, Format::kFloat32>{});
    case Format::kBfloat16:
      return visit(std::integral_constant<Format, Format::kBfloat16>{});
    default:
      return visit(std::integral_constant<Format, Format::kFloat16>{});
  }
}

// kLanes floats to memory that is not read soon, past the caches: nothing is read for what is
// overwritten. p starts at a whole vector; together such stores should fill lines. The barriers of
// a team order them.
ENCDEC_INLINE void store_past_caches(float* p, Float v) { istore_past_caches(p, bits(v)); }

// Two vectors, one behind the other, where asked for past the caches.
ENCDEC_INLINE void store_pair_as(Format dtype, char* p, Float first, Float second,
                                 bool past_caches = false) {
  const auto put = [=](char* to, Int v) __attribute__((always_inline)) {
    past_caches ? istore_past_caches(to, v) : istore(to, v);
  };
  if (dtype == Format::kFloat32) {
    put(p, bits(first));
    put(p + kLanes * 4, bits(second));
  } else {
    put(p, dtype == Format::kBfloat16 ? bf16_pair(first, second)
                                      : join_halves(to_f16(first), to_f16(second)));
  }
}

// Whether an output of so many bytes, of which each row's pairs of vectors fill lines, is better
// written past the caches: it would leave those that are near a core before it is read again.
ENCDEC_INLINE bool worth_past_caches(Format dtype, const char* first, int64_t row_stride,
                                     int64_t bytes) {
  constexpr int64_t kLine = 64;
  const int64_t pair = 2 * kLanes * element_bytes(dtype);
  const bool lines =
      (reinterpret_cast<uintptr_t>(first) | static_cast<uint64_t>(row_stride)) % kLine == 0 &&
      pair % kLine == 0;
  return lines && bytes >= kPastCaches;
}

// The value that a number has after it was stored in `dtype`.
ENCDEC_INLINE Float rounded_to(Format dtype, Float v) {
  return dtype == Format::kFloat32    ? v
         : dtype == Format::kBfloat16 ? from_bf16(to_bf16(v))
                                      : from_f16(to_f16(v));
}

ENCDEC_INLINE int lanes_left(int64_t position, int64_t size) {
  return size - position < kLanes ? static_cast<int>(size - position) : kLanes;
}

// Where number k of a row lies in its staged form.
template <Format format>
ENCDEC_INLINE char* staged_at(char* row, int64_t k) {
  if constexpr (format == Format::kInt8) return row + k;
  if constexpr (format == Format::kBfloat16) return row + 2 * k;
  return row + 4 * k;
}

// As bf16, for a product alone. The hardware's conversion makes zeros of denormals, and so does its
// product of what to_bf16 gives.
ENCDEC_INLINE Half to_product_bf16(Float v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  return to_bf16(v);
#endif
}

// kLanes numbers into a staged row. int8: `inverse` is 1/scale, the zero point 128.
template <Format format>
ENCDEC_INLINE void stage_vector(char* p, Float v, float inverse = 1.0f) {
  if constexpr (format == Format::kInt8) {
    // |v| * inverse is 127 at most. NaN becomes any number: the row's scale speaks for it.
    store_u8(reinterpret_cast<uint8_t*>(p), iadd(to_int(mul(v, set1(inverse))), iset1(128)));
  } else if constexpr (format == Format::kBfloat16) {
    store_half(p, to_product_bf16(v));
  } else {
    store(reinterpret_cast<float*>(p), v);
  }
}

// `stage_row` of numbers of one dtype, known when the loops are compiled: of int8 branches in them
// cost as much as the arithmetic.
template <Format format, Format dtype>
inline float stage_row_of(const char* src, int64_t k, char* dst) {
  constexpr int kBytes = element_bytes(dtype);
  const auto each_vector = [&](const auto& visit) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) visit(i, load_as(dtype, src + i * kBytes));
    if (i < k) visit(i, load_as(dtype, src + i * kBytes, static_cast<int>(k - i)));
  };
  float scale = 1.0f, inverse = 1.0f;
  if constexpr (format == Format::kInt8) {
    // Magnitudes are in the order of their bits, infinity and NaN behind all others.
    Int largest = izero();
    each_vector([&](int64_t, Float v)
                    __attribute__((always_inline)) { largest = imax(largest, bits(abs(v))); });
    const Float top = from_bits(largest);
    const bool bad = any_not_le(top, set1(std::numeric_limits<float>::max()));
    const float m = reduce_max(top);
    scale = bad ? std::numeric_limits<float>::quiet_NaN() : m / 127.0f;
    inverse = bad || m < 1e-30f ? 0.0f : 127.0f / m;
  }
  each_vector([&](int64_t i, Float v) __attribute__((always_inline)) {
    stage_vector<format>(staged_at<format>(dst, i), v, inverse);
  });
  return scale;
}

// One row of k numbers to its staged form; the bytes up to the next multiple of kLanes numbers are
// written too (a staged row has room for them). Returns the row's scale: 1, but for int8 the
// largest magnitude / 127, and NaN for a row with a NaN or infinity in it, which so stays in its
// row.
template <Format format>
inline float stage_row(const char* src, Format dtype, int64_t k, char* dst) {
  if (format == Format::kBfloat16 && dtype == format) {
    const int bytes = element_bytes(dtype);
    std::memcpy(dst, src, static_cast<size_t>(k * bytes));
    std::memset(dst + k * bytes, 0, static_cast<size_t>((round_up(k, kLanes) - k) * bytes));
    return 1.0f;
  }
  float scale = 1.0f;
  with_dtype(dtype,
             [&](auto from) { scale = stage_row_of<format, decltype(from)::value>(src, k, dst); });
  return scale;
}

// Columns to staged rows of bf16: pair(i), for i below kLanes, are kLanes words of two rows each
// (pair_halves), which become word i of kLanes staged rows.
template <class Pair>
ENCDEC_INLINE void stage_columns(const Pair& pair, char* to, int64_t row_bytes) {
  Float words[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) words[i] = from_bits(pair(i));
  transpose(words);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(to + i * row_bytes), words[i]);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
