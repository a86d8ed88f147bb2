// grad W += dG' X over the rows of a chunk: the product whose common dimension is the rows.
//
// X (rows of inputs or of previous states, wherever they lie) is packed by columns with k = row. dG
// has its rows along k already, so that the product reads floats as they lie, by columns; of bf16,
// two rows make a word, and their words are transposed into staged rows. Tiles of few rows use a
// small part of each line of dG that they read: with AVX2 a tile's columns are copied first.
#pragma once

#include "core/gemm.h"
#include "core/panels.h"
#include "core/team.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {

template <Format format>
struct WeightGrad {
  static constexpr int NV = kVectors;
  static constexpr int kStripTiles = 4;  // tiles of gate units that pass over a panel together
  static constexpr int kGroup = group_size(format);
  static constexpr bool kPaired = format == Format::kBfloat16;
  static constexpr bool kCopied = !kPaired && kIsa == Isa::kAvx2;
  static constexpr int64_t kCopiedBytes = kLanes * 4;  // of one k: a tile's columns and some more

  Format dtype;       // of X
  const char* grads;  // dG: staged rows
  int64_t row_bytes;
  int64_t rows;
  int64_t padded, units;  // units per segment of dG, and how many of them are real
  char* buffer;           // bytes(chunk_rows, widest, row_bytes, members)
  int64_t chunk_rows, widest;
  bool last;  // no chunk follows whose gradients are added
  int rank, members;
  Barrier& barrier;

  static int64_t packed_bytes(int64_t chunk_rows, int64_t width) {
    return panels_of(width) * packed_panel_bytes(format, chunk_rows, NV);
  }
  static int64_t copy_bytes(int64_t chunk_rows) { return kStripTiles * chunk_rows * kCopiedBytes; }
  static int64_t bytes(int64_t chunk_rows, int64_t widest, int64_t row_bytes, int members) {
    const int64_t staged = row_bytes / 2 * staged_row_bytes(format, chunk_rows);
    const int64_t copies = kCopied ? members * copy_bytes(chunk_rows) : 0;
    return packed_bytes(chunk_rows, widest) + (kPaired ? staged : copies);
  }

  // Before add(), by all members; add() has the barrier that completes it.
  void prepare() const {
    if constexpr (kPaired) {
      const int64_t squares = (rows + 2 * kLanes - 1) / (2 * kLanes);  // of kLanes pairs of rows
      for (int64_t i = part(squares, rank); i < part(squares, rank + 1); ++i) {
        for (int64_t c = 0; c + kLanes <= row_bytes / 2; c += kLanes) transpose_square(i, c);
      }
    }
  }

  // target (gates * units, width) += or, if `overwrite`, = dG' X for the gates whose gradients are
  // segments [first, first + gates) of dG. All members call it; it ends with a barrier.
  template <class GateOf>
  void add(const char* const* x_rows, int64_t width, int first, int gates, GateOf gate_of,
           float* target, bool overwrite) const {
    const int64_t panel = packed_panel_bytes(format, chunk_rows, NV);
    const int64_t blocks = panels_of(width);
    for (int64_t b = part(blocks, rank); b < part(blocks, rank + 1); ++b) {
      pack_block(x_rows, width, b * kPanel, buffer + b * panel);
    }
    barrier.wait(members);

    PackedView x;
    x.data = buffer;
    x.groups = round_up(rows, kGroup) / kGroup;
    x.panel_bytes = panel;
    const RowTiles strips(units, kStripTiles * tile_rows(format, NV), amx_multiplies(format));
    const int64_t all = gates * strips.count;
    for (int64_t s = part(all, rank); s < part(all, rank + 1); ++s) {
      const int gate = static_cast<int>(s / strips.count);
      const int64_t unit = strips.begin(s % strips.count);
      const int64_t count = strips.begin(s % strips.count + 1) - unit;
      const int64_t column = (first + gate) * padded + unit;
      if constexpr (kCopied) copy_strip(column, count);
      const RowsView columns = kPaired ? RowsView{staged(column), staged_bytes()}
                                       : RowsView{grads + column * 4, 4, row_bytes};
      multiply_strip(x, columns, count, width, target + (gate_of(gate) * units + unit) * width,
                     overwrite);
    }
    barrier.wait(members);
  }

 private:
  int64_t part(int64_t n, int i) const { return n * i / members; }
  // bf16: a column of dG as a row.
  int64_t staged_bytes() const { return staged_row_bytes(format, chunk_rows); }
  char* staged(int64_t column) const {
    return buffer + packed_bytes(chunk_rows, widest) + column * staged_bytes();
  }

  // This member's copy of tile i of a strip, by columns.
  char* copied(int64_t i) const {
    return buffer + packed_bytes(chunk_rows, widest) + rank * copy_bytes(chunk_rows) +
           i * chunk_rows * kCopiedBytes;
  }

  void copy_strip(int64_t column, int64_t count) const {
    const RowTiles tiles(count, format, NV);
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t first = column + tiles.begin(i), end = column + tiles.begin(i + 1);
      const bool inside = (first + kLanes) * 4 <= row_bytes;  // a whole vector, of which n are used
      const float* from = reinterpret_cast<const float*>(grads) + first;
      for (int64_t k = 0; k < rows; ++k, from += row_bytes / 4) {
        store(reinterpret_cast<float*>(copied(i) + k * kCopiedBytes),
              inside ? load(from) : load_partial(from, static_cast<int>(end - first)));
      }
    }
  }

  // Rows [2 kLanes square, ...) of kLanes columns, with zeros past the last row.
  void transpose_square(int64_t square, int64_t column) const {
    const auto half = [&](int64_t row) {
      return row < rows ? load_half(grads + row * row_bytes + 2 * column) : to_bf16(zero());
    };
    const auto pair = [&](int i) {
      const int64_t row = 2 * (square * kLanes + i);
      return pair_halves(half(row), half(row + 1));
    };
    stage_columns(pair, staged(column) + square * kLanes * 4, staged_bytes());
  }

  void multiply_strip(const PackedView& x, RowsView strip, int64_t count, int64_t width, float* out,
                      bool overwrite) const {
    alignas(64) float products[tile_room(format, NV) * kPanel];
    const RowTiles tiles(count, format, NV);
    const bool past_caches = overwrite && last && width % kLanes == 0 &&
                             reinterpret_cast<uintptr_t>(out) % (kLanes * sizeof(float)) == 0;
    for (int64_t b = 0; b < panels_of(width); ++b) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i);
        const int n = static_cast<int>(tiles.begin(i + 1) - row);
        const RowsView columns = kCopied ? RowsView{copied(i), 4, kCopiedBytes} : strip.from(row);
        multiply_rows<format, NV>(n, x, b, columns, products, kPanel);
        for (int j = 0; j < n; ++j) {
          for (int v = 0; v < NV && b * kPanel + v * kLanes < width; ++v) {
            const int64_t column = b * kPanel + v * kLanes;
            const int lanes = lanes_left(column, width);
            char* to = reinterpret_cast<char*>(out + (row + j) * width + column);
            const Float product = load(products + j * kPanel + v * kLanes);
            if (past_caches) {
              store_past_caches(reinterpret_cast<float*>(to), product);
              continue;
            }
            const Float before = overwrite ? zero() : load_as(Format::kFloat32, to, lanes);
            store_as(Format::kFloat32, to, encdec::ENCDEC_ISA_NAMESPACE::add(before, product),
                     lanes);
          }
        }
      }
    }
  }

  // One panel: kUnits columns of X from `column` on, all rows.
  void pack_block(const char* const* x_rows, int64_t width, int64_t column, char* dst) const {
    const int bytes = element_bytes(dtype);
    for (int64_t k = 0; k < round_up(rows, kGroup); k += kGroup) {
      for (int v = 0; v < NV; ++v, dst += kLanes * 4) {
        const int64_t at = column + v * kLanes;
        const int lanes = at < width ? lanes_left(at, width) : 0;
        const auto read = [&](int64_t row) {
          if (row >= rows || lanes == 0) return zero();
          return load_as(dtype, x_rows[row] + at * bytes, lanes);
        };
        if constexpr (kPaired) {
          istore(dst, pair_halves(to_product_bf16(read(k)), to_product_bf16(read(k + 1))));
        } else {
          store(reinterpret_cast<float*>(dst), read(k));
        }
      }
    }
  }
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
