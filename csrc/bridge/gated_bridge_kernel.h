// Three products per panel of features, of the staged states and contexts, while their tile stays
// in L1; the gate is their epilogue. The work is cut as in csrc/linear: with many rows each member
// of the team has its own, with few its own panels.
#pragma once

#include "bridge/gated_bridge.h"
#include "core/gemm.h"
#include "core/math.h"
#include "core/panels.h"
#include "core/team.h"

namespace encdec::bridge {
namespace ENCDEC_ISA_NAMESPACE {

using namespace encdec::ENCDEC_ISA_NAMESPACE;

inline PackedHeader layout(int64_t H, int64_t C, Format format) {
  PackedHeader h{};
  h.magic = PackedHeader::kMagic;
  h.isa = kIsa;
  h.format = format;
  h.H = H;
  h.C = C;
  h.bytes = sizeof(PackedHeader);
  h.state_gate = place_weight(format, H, H, &h.bytes);
  h.context_gate = place_weight(format, H, C, &h.bytes);
  h.candidate = place_weight(format, H, C, &h.bytes);
  return h;
}

template <Format format>
inline void pack(const Weight& gate, const Weight& candidate, int threads, char* packed) {
  const int64_t H = gate.N, C = candidate.K;
  const PackedHeader h = layout(H, C, format);
  Weight of_state = gate, of_context = gate;
  of_state.K = H;
  of_context.K = C;
  of_context.data += H * element_bytes(gate.dtype);
  auto body = [&](int rank, int size) {
    pack_weight<format>(of_state, rank, size, packed, h.state_gate);
    pack_weight<format>(of_context, rank, size, packed, h.context_gate);
    pack_weight<format>(candidate, rank, size, packed, h.candidate);
  };
  run_team(threads, body);
  *reinterpret_cast<PackedHeader*>(packed) = h;
}

// Byte offsets in a member's part of the workspace: its staged rows and their scales.
struct Places {
  int64_t state_row, context_row;  // bytes of one
  int64_t contexts, state_scales, context_scales;
  int64_t member_bytes;
};

template <Format format>
inline Places places(const GatedBridge& f) {
  Places p{};
  const int64_t rows = f.plan.chunk_rows;
  p.state_row = staged_row_bytes(format, f.H);
  p.context_row = staged_row_bytes(format, f.C);
  p.contexts = rows * p.state_row;
  p.state_scales = p.contexts + rows * p.context_row;
  p.context_scales = p.state_scales + round_up(rows * 4, 64);
  p.member_bytes = p.context_scales + round_up(rows * 4, 64);
  return p;
}

template <Format format>
class BridgeRun {
 public:
  BridgeRun(const GatedBridge& call, int rank, int members)
      : call_(call),
        rank_(rank),
        members_(members),
        places_(places<format>(call)),
        own_(call.workspace + rank * places_.member_bytes),
        esize_(element_bytes(call.dtype)) {
    const PackedHeader& h = *reinterpret_cast<const PackedHeader*>(call.packed);
    state_gate_ = view(call.packed, h.state_gate, format, call.H, kVectors);
    context_gate_ = view(call.packed, h.context_gate, format, call.C, kVectors);
    candidate_ = view(call.packed, h.candidate, format, call.C, kVectors);
  }

  void run() {
    const bool split = call_.plan.split_rows;
    const int64_t begin = split ? part(call_.M, rank_) : 0;
    const int64_t end = split ? part(call_.M, rank_ + 1) : call_.M;
    for (int64_t first = begin; first < end; first += call_.plan.chunk_rows) {
      const int64_t left = end - first;
      const int64_t rows = left < call_.plan.chunk_rows ? left : call_.plan.chunk_rows;
      for (int64_t r = 0; r < rows; ++r) {
        scales(places_.state_scales)[r] =
            stage_row<format>(call_.state + (first + r) * call_.state_stride, call_.dtype, call_.H,
                              own_ + r * places_.state_row);
        scales(places_.context_scales)[r] =
            stage_row<format>(call_.context + (first + r) * call_.context_stride, call_.dtype,
                              call_.C, own_ + places_.contexts + r * places_.context_row);
      }
      products(first, rows);
    }
  }

 private:
  // The products of a tile of rows with a panel of each matrix.
  struct Tile {
    static constexpr int kRows = tile_room(format, kVectors);
    alignas(64) float state_gate[kRows * kPanel];
    alignas(64) float context_gate[kRows * kPanel];
    alignas(64) float candidate[kRows * kPanel];
  };

  int64_t part(int64_t n, int i) const { return n * i / members_; }
  float* scales(int64_t at) const { return reinterpret_cast<float*>(own_ + at); }

  void products(int64_t first, int64_t rows) {
    const RowTiles tiles(rows, format, kVectors);
    const RowsView states{own_, places_.state_row};
    const RowsView contexts{own_ + places_.contexts, places_.context_row};
    const int64_t panels = panels_of(call_.H);
    const int64_t begin = call_.plan.split_rows ? 0 : part(panels, rank_);
    const int64_t end = call_.plan.split_rows ? panels : part(panels, rank_ + 1);
    Tile tile;
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i);
        const int n = static_cast<int>(tiles.begin(i + 1) - row);
        const RowsView s = states.from(row), c = contexts.from(row);
        multiply_rows<format, kVectors>(n, state_gate_, p, s, tile.state_gate, kPanel);
        multiply_rows<format, kVectors>(n, context_gate_, p, c, tile.context_gate, kPanel);
        multiply_rows<format, kVectors>(n, candidate_, p, c, tile.candidate, kPanel);
        for (int v = 0; v < kVectors && p * kPanel + v * kLanes < call_.H; ++v) {
          finish(first, row, n, p * kPanel + v * kLanes, tile, v * kLanes);
        }
      }
    }
  }

  // A product as a number: int8 sums have the scales of their column and of their row.
  ENCDEC_INLINE Float scaled(const float* sums, const PackedView& weight, int64_t column,
                             float row_scale) const {
    const Float x = load(sums);
    if constexpr (format != Format::kInt8) return x;
    return mul(x, mul(load(weight.scale + column), set1(row_scale)));
  }

  // The gate, for n rows and one vector of features; `at` is the vector's place in a row of a tile.
  ENCDEC_INLINE void finish(int64_t first, int64_t row, int n, int64_t column, const Tile& tile,
                            int64_t at) const {
    const int lanes = lanes_left(column, call_.H);
    const int64_t offset = column * esize_;
    const Float bias = call_.bias ? load_as(call_.dtype, call_.bias + offset, lanes) : zero();
    for (int64_t r = row; r < row + n; ++r, at += kPanel) {
      const float of_state = scales(places_.state_scales)[r];
      const float of_context = scales(places_.context_scales)[r];
      const Float logit = add(scaled(tile.state_gate + at, state_gate_, column, of_state),
                              scaled(tile.context_gate + at, context_gate_, column, of_context));
      const Float g = sigmoid(add(logit, bias));
      const Float u = tanh(scaled(tile.candidate + at, candidate_, column, of_context));
      const Float s =
          load_as(call_.dtype, call_.state + (first + r) * call_.state_stride + offset, lanes);
      const int64_t to = (first + r) * call_.output_stride + offset;
      store_as(call_.dtype, call_.output + to, fma(g, s, mul(sub(set1(1.0f), g), u)), lanes);
      if (call_.gate) {
        store_as(call_.dtype, call_.gate + to, g, lanes);
        store_as(call_.dtype, call_.candidate + to, u, lanes);
      }
    }
  }

  const GatedBridge& call_;
  const int rank_, members_;
  const Places places_;
  char* const own_;
  const int esize_;
  PackedView state_gate_, context_gate_, candidate_;
};

template <Format format>
inline void run_bridge(const GatedBridge& f) {
  auto body = [&](int rank, int size) { BridgeRun<format>(f, rank, size).run(); };
  run_team(f.plan.threads, body);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::bridge
