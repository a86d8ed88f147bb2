// The one matrix product: staged rows times a packed matrix, a tile at a time. This says what a
// tile is; gemm_cpu.cpp computes it, so that what all kernels share is compiled once.
//
// A tile of vector instructions is up to max_tile_rows rows by one panel (NV vectors of columns);
// its sums stay in registers over the whole of k. Each step of k loads NV vectors of weights and
// broadcasts one word per row. Tiles of few rows split k over independent sums, so that the latency
// of the multiply-add is hidden. The result is a small block of floats that stays in L1, where the
// caller's epilogue takes it from.
#pragma once

#include "core/amx.h"
#include "core/dot.h"
#include "core/packed_matrix.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {

// The tallest tile whose sums, NV weights and one broadcast fit in the registers.
constexpr int max_tile_rows(int vectors) { return (kRegisters - 1 - vectors) / vectors; }

// Sums of floats are carried on for this many groups of k, then added to the result: their error
// grows with the length of one run. int8 sums are exact.
constexpr int64_t kSumGroups = 512;
constexpr int64_t sum_run(Format format, int64_t left) {
  return format == Format::kInt8 || left < kSumGroups ? left : kSumGroups;
}

// A tile of fewer sums than the multiply-add's latency takes splits k over so many of each: where
// two products of bfloat16 begin in a cycle and take six, twelve are needed. A single row waits for
// its weights, and with half of the registers there is no room for more than eight.
constexpr int kEnoughSums = kRegisters == 32 ? 12 : 8;
constexpr int split_sums(int sums) {
  const int wanted = sums <= 3 ? 8 : kEnoughSums;
  return sums >= wanted ? 1 : (wanted - 1 + sums) / sums;
}

// Whether the matrix unit can take products of weights in this format.
constexpr bool has_amx(Format format, int vectors) {
  return kIsa == Isa::kAvx512Bf16 && (format == Format::kBfloat16 || format == Format::kInt8) &&
         (vectors == 2 || vectors == 3);
}

// Room for the rows of a tile, and how many it really has with the chosen instruction set.
constexpr int tile_room(Format format, int vectors) {
  return has_amx(format, vectors) ? amx_rows(vectors) : max_tile_rows(vectors);
}
inline int tile_rows(Format format, int vectors) {
  return amx_chosen ? tile_room(format, vectors) : max_tile_rows(vectors);
}

// What is added to the sums of a panel of floats.
alignas(64) inline constexpr float kNoBias[3 * kLanes] = {};
template <int NV>
inline const float* bias_of(const PackedView& w, int64_t panel) {
  static_assert(NV <= 3);
  return w.bias ? w.bias + panel * NV * kLanes : kNoBias;
}

// The left side: word g of row r is at data + r * stride + g * step (bytes). Staged rows have their
// words side by side; a matrix of floats that is stored by columns is read as it lies, and so are
// rows of floats or of pairs of bfloat16 that need no padding.
struct RowsView {
  const char* data;
  int64_t stride;
  int64_t step = 4;

  RowsView from(int64_t row) const { return {data + row * stride, stride, step}; }
};

// Which of how many tiles that all read one panel a tile is. Together they ask for the panel that
// comes next, so many panels further on: for weights that come from memory, or from a cache that
// cores share. Without tiles they do not, nor does a single one of vector instructions, for its
// weights are read in order anyway.
struct Ahead {
  int64_t tile = 0, tiles = 0, distance = 1;
};

// One tile: up to tile_rows(format, NV) rows by one panel. With `onto`, the result is added to what
// stands in `out` (not for int8). gemm_cpu.cpp has it for NV 2 and 3.
// The rows go by reference: GCC hands a view over by value as one load across two fresh stores,
// which waits until everything stored before them has left (docs/performance.md).
template <Format format, int NV>
__attribute__((visibility("default"))) void multiply_rows(int rows, const PackedView& w,
                                                          int64_t panel, const RowsView& x,
                                                          float* out, int64_t out_stride,
                                                          bool onto = false, Ahead ahead = {});

// Two products at once. The weights of one row come from L2 or beyond, and most of what could be
// multiplied meanwhile would not be; so a tile of kBesideRows rows, by one panel of another matrix,
// is multiplied beside it: one of its groups of k for every kBesidePanels of the row's, whose
// panels go as far. Sums are in the order of multiply_rows: results are the same to the last bit.
template <int NV>
constexpr int kBesideRows = NV == 2 ? 8 : 6;
template <int NV>
constexpr int kBesidePanels = split_sums(NV);

// Whether there are registers for both, and words need not be widened (dot.h).
template <Format format>
constexpr bool has_beside = kRegisters == 32 && !Dot<format>::kWide;

// The tile's side: kBesideRows<NV> staged rows by one panel. The other is one staged row by panels
// [panel, panel + kBesidePanels<NV>) of w, whose results come side by side.
struct BesideTile {
  const PackedView& w;
  int64_t panel;
  RowsView rows;
  float* out;
  int64_t out_stride;
};
template <Format format, int NV>
__attribute__((visibility("default"))) void multiply_beside(const PackedView& w, int64_t panel,
                                                            const char* row, float* out,
                                                            const BesideTile& tile);

// Cuts `rows` into the fewest tiles. The matrix unit is configured for a number of rows: where it
// multiplies, all tiles but the last have one size. Else they differ by one row at most, for a tile
// of very few rows adds up in another order than the others (gemm_cpu.cpp): a row's result would
// depend on where a chunk or a thread's part happens to end.
struct RowTiles {
  int64_t rows, count;
  int64_t size, longer;  // of a tile, and how many tiles have one row more
  RowTiles(int64_t rows, int max_rows, bool one_size)
      : rows(rows),
        count((rows + max_rows - 1) / max_rows),
        size(count == 0 ? 0
             : one_size ? (rows + count - 1) / count
                        : rows / count),
        longer(count == 0 || one_size ? 0 : rows % count) {}
  // As multiply_rows takes them.
  RowTiles(int64_t rows, Format format, int vectors)
      : RowTiles(rows, tile_rows(format, vectors), amx_multiplies(format)) {}
  int64_t begin(int64_t i) const {
    const int64_t first = i * size + (i < longer ? i : longer);
    return first < rows ? first : rows;
  }
};

// As many rows, in whole tiles, as stay in L2 beside a panel while all panels pass over them.
inline int64_t rows_in_l2(int tile, int64_t row_bytes) {
  return tile * (1 + within_l2(256 * 1024) / (tile * row_bytes));
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
