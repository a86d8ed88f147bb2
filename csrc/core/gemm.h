// The one matrix product: staged rows times a packed matrix, a register tile at a time.
//
// A tile is up to kMaxRows rows by one panel (NV vectors of columns); its sums stay in registers
// over the whole of k. Each step of k loads NV vectors of weights and broadcasts one word per row.
// Tiles of few rows split k over independent sums, so that the latency of the multiply-add is
// hidden. The result is a small block of floats that stays in L1, where the caller's epilogue takes
// it from.
#pragma once

#include "core/dot.h"
#include "core/packed_matrix.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {

// The tallest tile whose sums, NV weights and one broadcast fit in the registers.
constexpr int max_tile_rows(int vectors) { return (kRegisters - 1 - vectors) / vectors; }

// The left side: word g of row r is at data + r * stride + g * step (bytes). Staged rows have their
// words side by side; a matrix that is stored by columns is read as it lies.
struct RowsView {
  const char* data;
  int64_t stride;
  int64_t step = 4;

  RowsView from(int64_t row) const { return {data + row * stride, stride, step}; }
};

// Sums of floats are carried on for this many groups of k, then added to the result: their error
// grows with the length of one run.
constexpr int64_t kSumGroups = 512;

// With `onto`, the result is added to what stands in `out` (not for int8). With `ahead`, the panel
// behind this one is asked for meanwhile: for whom weights come from memory and rows are few.
template <Format format, int MR, int NV, bool ahead = false>
__attribute__((noinline)) void multiply_tile(const PackedView& w, int64_t panel, RowsView x,
                                             float* out, int64_t out_stride, bool onto = false) {
  using D = Dot<format>;
  constexpr int kSplit = MR * NV >= 8 ? 1 : (7 + MR * NV) / (MR * NV);
  constexpr int kStep = NV * kLanes * weight_group_bytes(format);
  const char* p = w.data + panel * w.panel_bytes;
  // Four rows share a base pointer: the offsets 1, 2 and 3 strides need two registers.
  const char* base[(MR + 3) / 4];
#pragma GCC unroll 8
  for (int b = 0; b < (MR + 3) / 4; ++b) base[b] = x.data + 4 * b * x.stride;

  for (int64_t done = 0; done < w.groups || done == 0;) {
    const int64_t left = w.groups - done;
    const int64_t groups = format == Format::kInt8 || left < kSumGroups ? left : kSumGroups;
    typename D::Acc acc[kSplit][MR][NV];
#pragma GCC unroll 8
    for (int s = 0; s < kSplit; ++s) {
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          if constexpr (format == Format::kInt8) {
            acc[s][r][v] = s == 0 ? iload(w.start + (panel * NV + v) * kLanes) : D::start();
          } else {
            acc[s][r][v] = D::start();
          }
        }
      }
    }
    const auto step = [&](int s) __attribute__((always_inline)) {
      decltype(D::weights(p)) weight[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        weight[v] = D::weights(p + v * kLanes * weight_group_bytes(format));
        if constexpr (ahead) __builtin_prefetch(p + w.panel_bytes + v * 64, 0, 2);
      }
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const auto word = D::word(base[r / 4] + (r % 4) * x.stride);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[s][r][v] = D::step(acc[s][r][v], word, weight[v]);
      }
      p += kStep;
#pragma GCC unroll 8
      for (int b = 0; b < (MR + 3) / 4; ++b) base[b] += x.step;
    };
    int64_t g = groups;
    for (; g >= kSplit; g -= kSplit) {
#pragma GCC unroll 8
      for (int s = 0; s < kSplit; ++s) step(s);
    }
    for (; g > 0; --g) step(0);

#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        typename D::Acc sum = acc[0][r][v];
#pragma GCC unroll 8
        for (int s = 1; s < kSplit; ++s) sum = D::sum(sum, acc[s][r][v]);
        float* to = out + r * out_stride + v * kLanes;
        if (done == 0 && !onto) {
          D::put(to, sum);
        } else if constexpr (format != Format::kInt8) {
          store(to, add(load(to), sum));
        }
      }
    }
    done += groups > 0 ? groups : 1;
  }
}

template <Format format, int NV, bool ahead = false, int MR = max_tile_rows(NV)>
ENCDEC_INLINE void multiply_rows(int rows, const PackedView& w, int64_t panel, RowsView x,
                                 float* out, int64_t out_stride, bool onto = false) {
  if constexpr (MR > 0) {
    if (rows == MR) {
      multiply_tile<format, MR, NV, ahead>(w, panel, x, out, out_stride, onto);
    } else {
      multiply_rows<format, NV, ahead, MR - 1>(rows, w, panel, x, out, out_stride, onto);
    }
  }
}

// Cuts `rows` into the fewest tiles, of sizes that differ by at most one.
struct RowTiles {
  int64_t rows;
  int64_t count;
  RowTiles(int64_t rows, int max_rows)
      : rows(rows), count(rows == 0 ? 0 : (rows + max_rows - 1) / max_rows) {}
  int64_t begin(int64_t i) const { return rows * i / count; }
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
