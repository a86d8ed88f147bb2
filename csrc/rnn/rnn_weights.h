// The packed weights of one direction: which column goes where, and the block of memory around
// them.
#pragma once

#include "core/gemm.h"
#include "core/team.h"
#include "rnn/rnn.h"

namespace encdec::rnn {
namespace ENCDEC_ISA_NAMESPACE {

using namespace encdec::ENCDEC_ISA_NAMESPACE;

// A block is the columns of all gates of `units` hidden units, so that one thread has all that the
// gates' arithmetic needs: `panels` panels of `vectors` vectors. Vector v of a block holds gate
// gate(v) of the units from unit_offset(v) on.
template <Cell cell>
struct Blocking {
  static constexpr int kVectors = cell == Cell::kGru ? 3 : 2;
  static constexpr int kPanels = cell == Cell::kLstm ? 2 : 1;
  static constexpr int kWidth = kPanels * kVectors;  // vectors in a block
  static constexpr int kUnitVectors = kWidth / gate_count(cell);
  static constexpr int kUnits = kUnitVectors * kLanes;
  static constexpr int gate(int v) { return v / kUnitVectors; }
  static constexpr int unit_offset(int v) { return v % kUnitVectors * kLanes; }
  static constexpr int64_t blocks(int64_t units) { return (units + kUnits - 1) / kUnits; }
};

// A plain matrix (the projection, backward's products) is blocked like the gateless cell.
using PlainBlocking = Blocking<Cell::kTanh>;

// How gates are saved for backward: strides, in numbers, from row to row, from gate to gate and
// from one vector of units to the next. Floats of an LSTM lie as its input products do, block by
// block, so that forward may have these there; else a row's gates lie one behind the other.
struct SavedGates {
  int64_t row, gate, vector;
  bool as_products;
};

template <Cell cell>
inline SavedGates saved_layout(const Shape& s, Format dtype, int64_t rows) {
  using Bl = Blocking<cell>;
  static_assert(saved_gates(cell) == 0 || Bl::kUnits == kLanes);
  constexpr int64_t kRow = Bl::kWidth * kLanes;
  const bool whole = s.H % kLanes == 0;
  if (cell == Cell::kLstm && dtype == Format::kFloat32 && whole) {
    return {kRow, kLanes, rows * kRow, true};
  }
  return {4 * s.H, s.H, kLanes, false};
}

template <Cell cell>
inline PackedHeader layout(const Shape& s, Format format) {
  using Bl = Blocking<cell>;
  PackedHeader h{};
  h.magic = PackedHeader::kMagic;
  h.isa = kIsa;
  h.cell = cell;
  h.format = format;
  h.projected = s.projected;
  h.I = s.I;
  h.H = s.H;
  h.P = s.P;
  const int64_t blocks = Bl::blocks(s.H);
  int64_t end = round_up(sizeof(PackedHeader), 64);
  h.ih = place_matrix(end, format, s.I, blocks * Bl::kPanels, Bl::kVectors, &end);
  h.hh = place_matrix(end, format, s.P, blocks * Bl::kPanels, Bl::kVectors, &end);
  if (s.projected) {
    h.hr =
        place_matrix(end, format, s.H, PlainBlocking::blocks(s.P), PlainBlocking::kVectors, &end);
  }
  h.input_bias = end;
  h.recurrent_bias = end + blocks * Bl::kWidth * kLanes * 4;
  h.bytes = h.recurrent_bias + (cell == Cell::kGru ? round_up(blocks * Bl::kUnits * 4, 64) : 0);
  return h;
}

// The rows of a matrix of torch's, (gates * units, k), that vector i takes, blocked for `cell`.
template <Cell cell>
inline ColumnRange columns_of(int64_t units, int64_t i) {
  using Bl = Blocking<cell>;
  const int v = static_cast<int>(i % Bl::kWidth);
  const int64_t unit = i / Bl::kWidth * Bl::kUnits + Bl::unit_offset(v);
  return {Bl::gate(v) * units + unit, unit < units ? lanes_left(unit, units) : 0};
}

// Vectors [begin, end) of such a matrix.
template <Cell cell, Format format>
inline void pack_matrix(const char* src, Format dtype, int64_t row_stride, int64_t units, int64_t k,
                        char* packed, const MatrixPlace& m, int64_t begin, int64_t end) {
  using Bl = Blocking<cell>;
  pack_vectors<format, Bl::kVectors>(src, dtype, row_stride, k, packed, m, begin, end,
                                     [&](int64_t i) { return columns_of<cell>(units, i); });
}

// A block of such a matrix alone, from `packed` on. Not for int8.
template <Cell cell, Format format>
inline void pack_block(const char* src, Format dtype, int64_t row_stride, int64_t units, int64_t k,
                       char* packed, int64_t block) {
  using Bl = Blocking<cell>;
  pack_vectors<format, Bl::kVectors>(
      src, dtype, row_stride, k, packed, MatrixPlace{}, 0, Bl::kWidth,
      [&](int64_t i) { return columns_of<cell>(units, block * Bl::kWidth + i); });
}

template <Cell cell>
inline void pack_biases(const Shape& s, const Weights& w, char* packed, const PackedHeader& h) {
  using Bl = Blocking<cell>;
  const int bytes = element_bytes(w.dtype);
  float* input = reinterpret_cast<float*>(packed + h.input_bias);
  float* recurrent = reinterpret_cast<float*>(packed + h.recurrent_bias);
  for (int64_t i = 0; i < Bl::blocks(s.H) * Bl::kWidth; ++i) {
    const int v = static_cast<int>(i % Bl::kWidth);
    const int64_t unit = i / Bl::kWidth * Bl::kUnits + Bl::unit_offset(v);
    const int lanes = unit < s.H ? lanes_left(unit, s.H) : 0;
    const int64_t offset = (Bl::gate(v) * s.H + unit) * bytes;
    Float b_ih = zero(), b_hh = zero();
    if (w.b_ih && lanes > 0) {
      b_ih = load_as(w.dtype, w.b_ih + offset, lanes);
      b_hh = load_as(w.dtype, w.b_hh + offset, lanes);
    }
    const bool separate = cell == Cell::kGru && Bl::gate(v) == 2;
    store(input + i * kLanes, separate ? b_ih : add(b_ih, b_hh));
    if (separate) store(recurrent + i / Bl::kWidth * kLanes, b_hh);
  }
}

template <Cell cell, Format format>
inline void pack(const Shape& s, const Weights& w, int threads, bool matrices, char* packed) {
  using Bl = Blocking<cell>;
  const PackedHeader h = layout<cell>(s, format);
  const int64_t vectors = Bl::blocks(s.H) * Bl::kWidth;
  const int64_t plain = s.projected ? PlainBlocking::blocks(s.P) * PlainBlocking::kWidth : 0;
  auto body = [&](int rank, int size) {
    const auto part = [&](int64_t n, int i) { return n * i / size; };
    if (matrices) {
      pack_matrix<cell, format>(w.ih, w.dtype, w.ih_stride, s.H, s.I, packed, h.ih,
                                part(vectors, rank), part(vectors, rank + 1));
      pack_matrix<cell, format>(w.hh, w.dtype, w.hh_stride, s.H, s.P, packed, h.hh,
                                part(vectors, rank), part(vectors, rank + 1));
    }
    if (s.projected) {
      pack_matrix<Cell::kTanh, format>(w.hr, w.dtype, w.hr_stride, s.P, s.H, packed, h.hr,
                                       part(plain, rank), part(plain, rank + 1));
    }
    if (rank == 0) pack_biases<cell>(s, w, packed, h);
  };
  run_team(threads, body);
  *reinterpret_cast<PackedHeader*>(packed) = h;
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::rnn
