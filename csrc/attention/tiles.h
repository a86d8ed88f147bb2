// Small products over rows that lie in cache: sums for a tile of queries and keys, softmax of a
// row, and sums of rows with weights.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/math.h"
#include "core/rows.h"

namespace encdec::attention {
namespace ENCDEC_ISA_NAMESPACE {

using namespace encdec::ENCDEC_ISA_NAMESPACE;

// The most queries of a tile of sums. A tile has kLanes sums: queries times keys.
constexpr int kTileQueries = kLanes / 4;

// Asks for a row that is read soon. Rows that lie apart, or end a page, the hardware does not see
// coming.
ENCDEC_INLINE void ask_for_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// Two vectors, one behind the other.
struct Pair {
  Float first, second;
};
constexpr int kPairFloats = 2 * kLanes;

template <class Numbers>
ENCDEC_INLINE Numbers numbers_at(const float* p) {
  if constexpr (std::is_same_v<Numbers, Pair>) {
    return {load(p), load(p + kLanes)};
  } else {
    return load(p);
  }
}

// out[i * (kLanes / queries) + j]: the sum over all numbers of term(query i's, key j's), where
// term(sum, q, k, a) adds the part of the vector, or the Pair, at a. A row of queries has `size`
// floats, a multiple of that, and is q_stride floats from the next; key_at(j, a) is what key j has
// at a.
template <int queries, class KeyAt, class Term>
inline void tile_sums(const float* q, int64_t q_stride, int64_t size, float* out,
                      const KeyAt& key_at, const Term& term) {
  using Numbers = decltype(key_at(0, 0));
  constexpr int keys = kLanes / queries, kStep = sizeof(Numbers) / sizeof(float);
  Float sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = zero();
  if constexpr (queries == 1) {  // key by key, in the order in which they lie
    constexpr int kTogether = 4;
#pragma GCC unroll 16
    for (int j = 0; j < keys; j += kTogether) {
      for (int64_t a = 0; a < size; a += kStep) {
        const Numbers own = numbers_at<Numbers>(q + a);
#pragma GCC unroll 16
        for (int i = j; i < j + kTogether; ++i) sums[i] = term(sums[i], own, key_at(i, a), a);
      }
    }
    store(out, sums_of(sums));
    return;
  }
  for (int64_t a = 0; a < size; a += kStep) {
    Numbers own[queries];
#pragma GCC unroll 4
    for (int i = 0; i < queries; ++i) own[i] = numbers_at<Numbers>(q + i * q_stride + a);
#pragma GCC unroll 16
    for (int j = 0; j < keys; ++j) {
      const Numbers key = key_at(j, a);
#pragma GCC unroll 4
      for (int i = 0; i < queries; ++i) {
        sums[i * keys + j] = term(sums[i * keys + j], own[i], key, a);
      }
    }
  }
  store(out, sums_of(sums));
}

// sums[t][s] for all queries t < rows and keys s < count, by tiles. Queries have rows of zeros
// behind them up to a whole tile, keys may be asked for up to one, and a row of sums has room for
// one.
template <class KeyAt, class Term>
inline void all_sums(const float* q, int64_t q_stride, int64_t rows, int64_t count, int64_t size,
                     float* sums, int64_t sums_stride, const KeyAt& key_at, const Term& term) {
  alignas(64) float tile[kLanes];
  const auto tiles = [&](auto constant, int64_t t) {
    constexpr int queries = decltype(constant)::value, keys = kLanes / queries;
    for (int64_t s = 0; s < count; s += keys) {
      const auto own_key = [&](int j, int64_t a)
                               __attribute__((always_inline)) { return key_at(s + j, a); };
      tile_sums<queries>(q + t * q_stride, q_stride, size, tile, own_key, term);
      for (int i = 0; i < queries && t + i < rows; ++i) {
        std::memcpy(sums + (t + i) * sums_stride + s, tile + i * keys, sizeof(float) * keys);
      }
    }
  };
  for (int64_t t = 0; t < rows; t += kTileQueries) {
    if (rows - t == 1) {
      tiles(std::integral_constant<int, 1>{}, t);
    } else if (rows - t == 2) {
      tiles(std::integral_constant<int, 2>{}, t);
    } else {
      tiles(std::integral_constant<int, kTileQueries>{}, t);
    }
  }
}

// A row of a tensor as floats, in whole vectors; null: zeros.
inline void float_row(const char* row, Format dtype, int64_t size, float* to) {
  if (row) {
    stage_row<Format::kFloat32>(row, dtype, size, reinterpret_cast<char*>(to));
  } else {
    std::memset(to, 0, static_cast<size_t>(round_up(size, kLanes) * 4));
  }
}

// Keys that lie as floats, `stride` floats from one to the next.
struct FloatKeys {
  const float* data;
  int64_t stride;
  ENCDEC_INLINE Float operator()(int64_t j, int64_t a) const { return load(data + j * stride + a); }
};
struct PairKeys {
  const float* data;
  int64_t stride;
  ENCDEC_INLINE Pair operator()(int64_t j, int64_t a) const {
    return numbers_at<Pair>(data + j * stride + a);
  }
};

// Exponentials to where their arguments stood.
struct InPlace {
  float* row;
  ENCDEC_INLINE void operator()(int64_t s, Float e) const { store(row + s, e); }
};

// e^(scale * row - the largest of them) over the first n > 0 numbers of a row, which has room for
// whole vectors: put(s, e) receives them a vector at a time, zeros in the lanes past n. Returns
// their sum. NaN and +infinity make it NaN, as in torch; a row of -infinity becomes zeros, and
// their sum 0.
template <class Put>
inline float exp_row(float* row, int64_t n, float scale, const Put& put) {
  const int64_t whole = round_up(n, kLanes);
  for (int64_t s = n; s < whole; ++s) row[s] = row[0];
  // The largest product is that of the largest number, or with a negative scale of the smallest.
  const Int sign = bits(set1(scale < 0.0f ? -0.0f : 0.0f));
  const auto signed_at = [&](int64_t s) { return from_bits(ixor(bits(load(row + s)), sign)); };
  Float largest = signed_at(0);
  for (int64_t s = kLanes; s < whole; s += kLanes) largest = max(largest, signed_at(s));
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float by = std::fabs(scale) * 1.44269504088896341f;  // e^x = 2^(x log2 e)
  const float top = reduce_max(largest) * by;
  if (top == -kInfinity) {
    float total = 0.0f;
    for (int64_t s = 0; s < n; ++s) total += row[s] != row[s] ? row[s] : 0.0f;
    for (int64_t s = 0; s < n; s += kLanes) put(s, first_lanes(set1(total), lanes_left(s, n)));
    return total;
  }
  const Float shift = set1(top == kInfinity ? std::numeric_limits<float>::quiet_NaN() : -top);
  const auto power = [&](int64_t s) { return exp2(fma(set1(by), signed_at(s), shift)); };
  Float sum = zero();
  int64_t s = 0;
  for (; s + kLanes <= n; s += kLanes) {
    const Float e = power(s);
    put(s, e);
    sum = add(sum, e);
  }
  if (s < n) {
    const Float e = first_lanes(power(s), lanes_left(s, n));
    put(s, e);
    sum = add(sum, e);
  }
  return reduce_add(sum);
}

// to = by * row, n numbers, whole vectors of them read and written.
inline void scale_row(const float* row, int64_t n, float by, float* to) {
  for (int64_t s = 0; s < n; s += kLanes) store(to + s, mul(set1(by), load(row + s)));
}

// row = softmax(scale * row), as exp_row.
inline void softmax_row(float* row, int64_t n, float scale) {
  const float sum = exp_row(row, n, scale, InPlace{row});
  scale_row(row, n, 1.0f / sum, row);
}

// Row r's sum over i < count of weight(r, i) times row i of x: columns [column, column + lanes),
// at most NV vectors of them. Weight (r, i) is w[r * w_row + i * w_step]. The sums go to
// out[r * NV * kLanes].
template <Format dtype, int R, int NV>
inline void weigh_tile(const float* w, int64_t w_row, int64_t w_step, int64_t count, const char* x,
                       int64_t x_stride, int64_t lanes, float* out) {
  constexpr int bytes = element_bytes(dtype);
  // Few sums go on in two runs, so that the latency of the multiply-add is hidden.
  constexpr int kSplit = R * NV >= 8 ? 1 : 2;
  Float sums[kSplit][R][NV];
#pragma GCC unroll 2
  for (int s = 0; s < kSplit; ++s) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sums[s][r][v] = zero();
    }
  }
  const auto step = [&](auto whole, int s) __attribute__((always_inline)) {
    Float row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const int n = whole ? kLanes : lanes_left(v * kLanes, lanes);
      row[v] = n > 0 ? load_as(dtype, x + v * kLanes * bytes, n) : zero();
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Float weight = set1(w[r * w_row]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sums[s][r][v] = fma(weight, row[v], sums[s][r][v]);
    }
    x += x_stride;
    w += w_step;
  };
  const auto sum_up = [&](auto whole) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kSplit <= count; i += kSplit) {
#pragma GCC unroll 2
      for (int s = 0; s < kSplit; ++s) step(whole, s);
    }
    for (; i < count; ++i) step(whole, 0);
  };
  if (lanes >= NV * kLanes) {
    sum_up(std::true_type{});
  } else {
    sum_up(std::false_type{});
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      Float sum = sums[0][r][v];
      if constexpr (kSplit == 2) sum = add(sum, sums[1][r][v]);
      store(out + (r * NV + v) * kLanes, sum);
    }
  }
}

// The tallest tile of sums that fits in the registers beside its NV row vectors and a weight.
constexpr int weigh_rows(int vectors) { return (kRegisters - 1 - vectors) / vectors; }
constexpr int kOneRowVectors = 4;  // a single row has more of its sums side by side
constexpr int kWeighVectors = 2;
constexpr int kWeighFloats = weigh_rows(kWeighVectors) * kWeighVectors * kLanes;

template <Format dtype, int R = weigh_rows(kWeighVectors)>
inline void weigh_rows_of(int rows, const float* w, int64_t w_row, int64_t w_step, int64_t count,
                          const char* x, int64_t x_stride, int64_t lanes, float* out) {
  if constexpr (R > 1) {
    if (rows == R) {
      weigh_tile<dtype, R, kWeighVectors>(w, w_row, w_step, count, x, x_stride, lanes, out);
    } else {
      weigh_rows_of<dtype, R - 1>(rows, w, w_row, w_step, count, x, x_stride, lanes, out);
    }
  }
}

// All of it: put(r, column, sums, lanes) receives each row's sums, a vector at a time.
template <Format dtype, class Put>
inline void weigh(int64_t rows, const float* w, int64_t w_row, int64_t w_step, int64_t count,
                  const char* x, int64_t x_stride, int64_t width, const Put& put) {
  constexpr int bytes = element_bytes(dtype), kMost = weigh_rows(kWeighVectors);
  static_assert(kOneRowVectors * kLanes <= kWeighFloats, "a tile of one row has room");
  alignas(64) float sums[kWeighFloats];
  const int64_t tiles = (rows + kMost - 1) / kMost;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = rows * i / tiles, n = rows * (i + 1) / tiles - first;
    const int vectors = n == 1 ? kOneRowVectors : kWeighVectors;
    for (int64_t column = 0; column < width; column += vectors * kLanes) {
      const float* own = w + first * w_row;
      const char* from = x + column * bytes;
      if (n == 1) {
        weigh_tile<dtype, 1, kOneRowVectors>(own, 0, w_step, count, from, x_stride, width - column,
                                             sums);
      } else {
        weigh_rows_of<dtype>(static_cast<int>(n), own, w_row, w_step, count, from, x_stride,
                             width - column, sums);
      }
      for (int64_t r = 0; r < n; ++r) {
        for (int v = 0; v < vectors && column + v * kLanes < width; ++v) {
          const int64_t at = column + v * kLanes;
          put(first + r, at, load(sums + (r * vectors + v) * kLanes), lanes_left(at, width));
        }
      }
    }
  }
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::attention
