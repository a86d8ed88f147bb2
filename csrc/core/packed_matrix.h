// A weight matrix packed once, in the order in which the matrix product reads it.
//
// Columns (output features) come in vectors of kLanes; `vectors` of them side by side make a panel.
// A panel holds, for each group of k (see format.h), its vectors one behind the other:
//
//     panel 0: | k-group 0: v0 v1 | k-group 1: v0 v1 | ... | panel 1: ...
//
// so that a register tile reads its weights as one stream. int8 weights have one scale per column
// and, because rows are stored with the zero point 128, sums that start at -128 * (column sum).
#pragma once

#include <cstring>

#include "core/cpu_features.h"
#include "core/format.h"
#include "core/rows.h"
#include "core/simd.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {

// The instruction set that this is compiled for: a packed matrix is read by no other.
#if defined(__AVX512BF16__)
constexpr Isa kIsa = Isa::kAvx512Bf16;
#elif defined(__AVX512F__)
constexpr Isa kIsa = Isa::kAvx512;
#else
constexpr Isa kIsa = Isa::kAvx2;
#endif

struct PackedView {
  const char* data = nullptr;
  int64_t groups = 0;  // k groups
  int64_t panel_bytes = 0;
  const int32_t* start = nullptr;  // int8: what each column's sum starts from
  const float* bias = nullptr;     // the others: what is added to each column's sum; null: nothing
  const float* scale = nullptr;    // int8: each column's scale
};

constexpr int64_t packed_panel_bytes(Format f, int64_t k, int vectors) {
  const int64_t groups = round_up(k, group_size(f)) / group_size(f);
  return round_up(groups * vectors * kLanes * weight_group_bytes(f), 64);
}

// Room for a matrix of `panels` panels from byte `at` of a block on; *end receives where it ends.
inline MatrixPlace place_matrix(int64_t at, Format format, int64_t k, int64_t panels, int vectors,
                                int64_t* end) {
  MatrixPlace m{at, 0, 0};
  *end = at + panels * packed_panel_bytes(format, k, vectors);
  if (format == Format::kInt8) {
    const int64_t columns = panels * vectors * kLanes;
    m.scale = *end;
    m.start = m.scale + columns * 4;
    *end = round_up(m.start + columns * 4, 64);
  }
  return m;
}

inline PackedView view(const char* block, const MatrixPlace& m, Format format, int64_t k,
                       int vectors) {
  PackedView v;
  v.data = block + m.data;
  v.groups = round_up(k, group_size(format)) / group_size(format);
  v.panel_bytes = packed_panel_bytes(format, k, vectors);
  if (format == Format::kInt8) {
    v.scale = reinterpret_cast<const float*>(block + m.scale);
    v.start = reinterpret_cast<const int32_t*>(block + m.start);
  }
  return v;
}

// kLanes columns of a matrix in memory: number (column l, k) is at src + (l * lane_stride + k *
// k_stride) * element_bytes(dtype). One of the strides is 1. Only `lanes` columns exist; the others
// are packed as zeros.
struct ColumnSource {
  const char* src;
  Format dtype;
  int64_t lane_stride;
  int64_t k_stride;
  int lanes;
};

constexpr int kPackDepth = 32;

// A block of kLanes columns by `count` <= kPackDepth k, as vectors of floats: put(k, vector)
// receives them one after the other.
template <class Put>
inline void read_columns(const ColumnSource& c, int64_t k0, int count, const Put& put) {
  const int64_t bytes = element_bytes(c.dtype);
  if (c.lane_stride == 1) {
    for (int k = 0; k < count; ++k) {
      put(k, load_as(c.dtype, c.src + (k0 + k) * c.k_stride * bytes, c.lanes));
    }
    return;
  }
  const int64_t stride = c.lane_stride * bytes;
  for (int k = 0; k < count; k += kLanes) {
    const int depth = count - k < kLanes ? count - k : kLanes;
    const char* const first = c.src + (k0 + k) * bytes;
    Float square[kLanes];
    if (c.lanes == kLanes && depth == kLanes) {
      with_dtype(c.dtype, [&](auto dtype) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) {
          square[l] = load_as(decltype(dtype)::value, first + l * stride);
        }
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) put(k + i, square[i]);
      });
      continue;
    }
    for (int l = 0; l < kLanes; ++l) {
      square[l] = l < c.lanes ? load_as(c.dtype, first + l * stride, depth) : zero();
    }
    transpose(square);
    for (int i = 0; i < depth; ++i) put(k + i, square[i]);
  }
}

// Asks for the block that is kAhead blocks further: its lines lie one per column or one per k, too
// far apart for the hardware to foresee. A prefetch beyond the end of the matrix does nothing.
ENCDEC_INLINE void prefetch_columns(const ColumnSource& c, int64_t k0, int count) {
  constexpr int64_t kAhead = 4 * kPackDepth;
  const int64_t bytes = element_bytes(c.dtype);
  const auto fetch = [&](int64_t column, int64_t k, int64_t length) __attribute__((always_inline)) {
    const char* p = c.src + (column * c.lane_stride + k * c.k_stride) * bytes;
    for (int64_t at = 0; at < length * bytes; at += 64) _mm_prefetch(p + at, _MM_HINT_T0);
  };
  if (c.lane_stride == 1) {
    for (int k = 0; k < count; ++k) fetch(0, k0 + kAhead + k, c.lanes);
  } else {
    for (int l = 0; l < c.lanes; ++l) fetch(l, k0 + kAhead, count);
  }
}

// pack_columns of bfloat16 from bfloat16: no number changes, and words of two k are moved as they
// lie. An odd last k has a zero beside it.
inline void pack_halves(const ColumnSource& c, int64_t k, char* dst, int64_t step) {
  const auto half_at = [&](int64_t k0) __attribute__((always_inline)) {
    const char* const p = c.src + k0 * c.k_stride * 2;
    return c.lanes == kLanes ? load_half(p) : load_half_partial(p, c.lanes);
  };
  for (int64_t k0 = 0; k0 < k; k0 += kPackDepth, dst += kPackDepth / 2 * step) {
    const int count = static_cast<int>(k - k0 < kPackDepth ? k - k0 : kPackDepth);
    prefetch_columns(c, k0, count);
    for (int i = 0; i < count; i += 2) {  // to be written: fetched meanwhile
      __builtin_prefetch(dst + (kPackDepth + i / 2) * step, 1);
    }
    if (c.lane_stride == 1) {
      for (int i = 0; i < count; i += 2) {
        const Half second = i + 1 < count ? half_at(k0 + i + 1) : to_bf16(zero());
        istore(dst + i / 2 * step, pair_halves(half_at(k0 + i), second));
      }
      continue;
    }
    for (int i = 0; i < count; i += 2 * kLanes) {
      const char* const first = c.src + (k0 + i) * 2;
      const int64_t stride = c.lane_stride * 2;
      Float words[kLanes];
      if (c.lanes == kLanes && count - i >= 2 * kLanes) {
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) {
          words[l] = load(reinterpret_cast<const float*>(first + l * stride));
        }
      } else {
        const size_t bytes =
            static_cast<size_t>(count - i < 2 * kLanes ? count - i : 2 * kLanes) * 2;
        for (int l = 0; l < kLanes; ++l) {
          alignas(64) char row[kLanes * 4] = {};
          if (l < c.lanes) std::memcpy(row, first + l * stride, bytes);
          words[l] = load(reinterpret_cast<const float*>(row));
        }
      }
      transpose(words);
      const int pairs = (count - i + 1) / 2;
      char* const to = dst + i / 2 * step;
      if (pairs >= kLanes) {
#pragma GCC unroll 16
        for (int g = 0; g < kLanes; ++g) store(reinterpret_cast<float*>(to + g * step), words[g]);
      } else {
        for (int g = 0; g < pairs; ++g) store(reinterpret_cast<float*>(to + g * step), words[g]);
      }
    }
  }
}

// pack_columns of floats from floats: whole vectors of them, as many k as make whole squares.
// Returns how many k that were. What it is called with goes into registers: a loop through a
// pointer to it took twice as long (docs/performance.md).
inline int64_t pack_floats(const ColumnSource& c, int64_t k, char* dst, int64_t step) {
  constexpr int64_t kAheadBytes = 512, kAheadRows = 64;  // of what is read; of what is written
  if (c.lanes < kLanes) return 0;
  const char* from = c.src;
  if (c.lane_stride == 1) {
    const int64_t stride = c.k_stride * 4;
    for (int64_t i = 0; i < k; ++i, from += stride, dst += step) {
      _mm_prefetch(from + kAheadRows * stride, _MM_HINT_T0);
      __builtin_prefetch(dst + kAheadRows * step, 1);
      store(reinterpret_cast<float*>(dst), load(reinterpret_cast<const float*>(from)));
    }
    return k;
  }
  const int64_t stride = c.lane_stride * 4, whole = k / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes, from += kLanes * 4, dst += kLanes * step) {
    Float square[kLanes];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      _mm_prefetch(from + l * stride + kAheadBytes, _MM_HINT_T0);
      square[l] = load(reinterpret_cast<const float*>(from + l * stride));
    }
    transpose(square);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      __builtin_prefetch(dst + (l + kAheadRows) * step, 1);
      store(reinterpret_cast<float*>(dst + l * step), square[l]);
    }
  }
  return whole;
}

// One vector of columns into its place in a panel: `dst` is the vector's first group, `step` the
// bytes from group to group. `scale` and `start` (int8 only) receive kLanes values each.
template <Format format>
inline void pack_columns(const ColumnSource& c, int64_t k, char* dst, int64_t step, float* scale,
                         int32_t* start) {
  if constexpr (format == Format::kBfloat16) {
    if (c.dtype == format) return pack_halves(c, k, dst, step);
  }
  int64_t done = 0;
  if constexpr (format == Format::kFloat32) {
    if (c.dtype == format) done = pack_floats(c, k, dst, step);
    dst += done * step;
  }
  alignas(64) float block[kPackDepth * kLanes];
  const auto to_block = [&](int i, Float v) { store(block + i * kLanes, v); };
  Float inverse = set1(1.0f);
  Int sums = izero();
  if constexpr (format == Format::kInt8) {
    Float largest = zero(), nan = zero();
    for (int64_t k0 = 0; k0 < k; k0 += kPackDepth) {
      const int count = static_cast<int>(k - k0 < kPackDepth ? k - k0 : kPackDepth);
      read_columns(c, k0, count, to_block);
      for (int i = 0; i < count; ++i) {
        const Float w = load(block + i * kLanes);
        largest = max(abs(w), largest);
        nan = fma(w, zero(), nan);  // NaN in a column with a NaN or an infinity, else 0
      }
    }
    // A column of zeros keeps the scale 0 and any inverse.
    store(scale, add(div(largest, set1(127.0f)), nan));
    inverse = div(set1(127.0f), max(set1(1e-30f), largest));
  }
  constexpr int kGroup = group_size(format);
  for (int64_t k0 = done; k0 < k; k0 += kPackDepth) {
    const int count = static_cast<int>(k - k0 < kPackDepth ? k - k0 : kPackDepth);
    prefetch_columns(c, k0, count);
    if constexpr (format == Format::kFloat32) {
      read_columns(c, k0, count, [&](int i, Float v) __attribute__((always_inline)) {
        store(reinterpret_cast<float*>(dst + i * step), v);
      });
      dst += count * step;
      continue;
    }
    read_columns(c, k0, count, to_block);
    const int whole = static_cast<int>(round_up(count, kGroup));
    for (int i = count; i < whole; ++i) store(block + i * kLanes, zero());
    for (int i = 0; i < whole; i += kGroup, dst += step) {
      const float* b = block + i * kLanes;
      __builtin_prefetch(dst + 2 * kPackDepth * step, 1);  // to be written: fetched meanwhile
      if constexpr (format == Format::kFloat16) {
        store_half(dst, to_f16(load(b)));
      } else if constexpr (format == Format::kBfloat16) {
        istore(dst, pair_halves(to_bf16(load(b)), to_bf16(load(b + kLanes))));
      } else {
        alignas(64) int32_t q[kLanes];
        for (int j = 0; j < kGroup; ++j) {
          const Float scaled = mul(load(b + j * kLanes), inverse);
          const Int rounded = to_int(max(min(scaled, set1(127.0f)), set1(-127.0f)));
          sums = iadd(sums, rounded);
          istore(q, rounded);
          for (int l = 0; l < kLanes; ++l) dst[l * kGroup + j] = static_cast<char>(q[l]);
        }
      }
    }
  }
  if constexpr (format == Format::kInt8) {
    alignas(64) int32_t s[kLanes];
    istore(s, sums);
    for (int l = 0; l < kLanes; ++l) start[l] = -128 * s[l];
  }
}

// `count` k of a panel of floats, from rows of floats.
template <int vectors>
inline void copy_panel(const char* from, int64_t stride, int64_t count, char* to) {
  constexpr int64_t kAheadRows = 32;
  for (int64_t k = 0; k < count; ++k, from += stride, to += vectors * kLanes * 4) {
    for (int v = 0; v < vectors; ++v) {
      _mm_prefetch(from + kAheadRows * stride + v * kLanes * 4, _MM_HINT_T0);
      store(reinterpret_cast<float*>(to) + v * kLanes,
            load(reinterpret_cast<const float*>(from) + v * kLanes));
    }
  }
}

// Panels [begin, end) of a matrix that is stored by its k: k rows of `columns` numbers, row_stride
// numbers apart. `data` is panel 0's place. Some rows at a time for all panels, so that they are
// read in the order in which they lie. Not for int8, whose scales need whole columns.
template <Format format, int vectors>
inline void pack_rows(const char* src, Format dtype, int64_t row_stride, int64_t k, int64_t columns,
                      int64_t begin, int64_t end, char* data, int64_t panel_bytes) {
  constexpr int64_t kVectorBytes = kLanes * weight_group_bytes(format);
  const int bytes = element_bytes(dtype);
  for (int64_t k0 = 0; k0 < k; k0 += kPackDepth) {
    const int64_t count = k - k0 < kPackDepth ? k - k0 : kPackDepth;
    int64_t done = begin;
    if (format == Format::kFloat32 && dtype == format) {
      for (; done < end && (done + 1) * vectors * kLanes <= columns; ++done) {
        copy_panel<vectors>(src + (k0 * row_stride + done * vectors * kLanes) * 4, row_stride * 4,
                            count, data + done * panel_bytes + k0 * vectors * kVectorBytes);
      }
    }
    for (int64_t i = done * vectors; i < end * vectors; ++i) {
      const int64_t first = i * kLanes;
      const ColumnSource source{src + (k0 * row_stride + first) * bytes, dtype, 1, row_stride,
                                first < columns ? lanes_left(first, columns) : 0};
      char* const to = data + i / vectors * panel_bytes +
                       (k0 / group_size(format) * vectors + i % vectors) * kVectorBytes;
      pack_columns<format>(source, count, to, vectors * kVectorBytes, nullptr, nullptr);
    }
  }
}

// Vectors [begin, end) of a matrix whose columns are rows of torch's, k contiguous numbers each, in
// panels of `vectors`. columns_of(i) says which rows vector i takes: the first of them, and how
// many there are.
struct ColumnRange {
  int64_t first;
  int lanes;
};

template <Format format, int vectors, class ColumnsOf>
inline void pack_vectors(const char* src, Format dtype, int64_t row_stride, int64_t k, char* block,
                         const MatrixPlace& m, int64_t begin, int64_t end,
                         const ColumnsOf& columns_of) {
  constexpr int64_t kVectorBytes = kLanes * weight_group_bytes(format);
  for (int64_t i = begin; i < end; ++i) {
    const ColumnRange c = columns_of(i);
    const ColumnSource columns{src + c.first * row_stride * element_bytes(dtype), dtype, row_stride,
                               1, c.lanes};
    char* dst = block + m.data + i / vectors * packed_panel_bytes(format, k, vectors) +
                i % vectors * kVectorBytes;
    pack_columns<format>(columns, k, dst, vectors * kVectorBytes,
                         reinterpret_cast<float*>(block + m.scale) + i * kLanes,
                         reinterpret_cast<int32_t*>(block + m.start) + i * kLanes);
  }
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
