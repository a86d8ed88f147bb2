// The tiles of the matrix product of one instruction set: this file is compiled once for each.
#include <cstring>
#include <type_traits>

#include "core/gemm.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {
namespace {

static_assert(kSumGroups % kWideGroups == 0 && kWideGroups % kLanes == 0);

// `count` words of a row in two parts, side by side: kWideGroups words each.
template <class D>
ENCDEC_INLINE void widen_row(const char* words, int64_t count, char* wide) {
  int64_t g = 0;
  for (; g + kLanes <= count; g += kLanes) {
    D::widen(iload(words + g * 4), wide + g * 4, wide + (kWideGroups + g) * 4);
  }
  if (g == count) return;
  alignas(64) char rest[kLanes * 4] = {};
  std::memcpy(rest, words + g * 4, static_cast<size_t>(count - g) * 4);
  D::widen(iload(rest), wide + g * 4, wide + (kWideGroups + g) * 4);
}

template <Format format, int MR, int NV, bool ahead>
__attribute__((noinline)) void multiply_tile(const PackedView& w, int64_t panel, const RowsView& x,
                                             float* out, int64_t out_stride, bool onto,
                                             Ahead tile) {
  using D = Dot<format>;
  constexpr int kSplit = split_sums(MR * NV);
  constexpr int kStep = NV * kLanes * weight_group_bytes(format);
  const char* p = w.data + panel * w.panel_bytes;
  // The first tile of a panel would wait for weights that come from memory. So each tile asks for
  // its part of the next panel, a line or less in each of its steps: all at once they would wait
  // for each other.
  const char* ask = nullptr;
  int64_t ask_bytes = 0;
  if constexpr (ahead) {
    ask = p + w.panel_bytes * tile.distance + w.panel_bytes * tile.tile / tile.tiles;
    ask_bytes = (kStep + tile.tiles - 1) / tile.tiles;
  }
  // Four rows share a base pointer: the offsets 1, 2 and 3 strides need two registers.
  const char* base[(MR + 3) / 4];
#pragma GCC unroll 8
  for (int b = 0; b < (MR + 3) / 4; ++b) base[b] = x.data + 4 * b * x.stride;

  alignas(64) char wide[D::kWide ? MR * 2 * kWideGroups * 4 : 64];

  for (int64_t done = 0; done < w.groups || done == 0;) {
    const int64_t groups = sum_run(format, w.groups - done);
    const float* const bias = done == 0 ? bias_of<NV>(w, panel) : kNoBias;
    typename D::Acc acc[kSplit][MR][NV];
#pragma GCC unroll 8
    for (int s = 0; s < kSplit; ++s) {
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          if constexpr (format == Format::kInt8) {
            acc[s][r][v] = s == 0 ? D::first(w.start + (panel * NV + v) * kLanes) : D::start();
          } else {
            acc[s][r][v] = D::start();
          }
        }
      }
    }
    // The products of one group's words, or of one part of them, with what weights<part> gives.
    const auto products = [&](auto part, int s, const auto& row_at) __attribute__((always_inline)) {
      decltype(D::template weights<part>(p)) weight[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        weight[v] = D::template weights<part>(p + v * kLanes * weight_group_bytes(format));
        // In a register: of two or three rows GCC would load floats again for each.
        if constexpr ((MR == 2 || MR == 3) && format != Format::kInt8) asm("" : "+v"(weight[v]));
      }
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const auto word = D::word(row_at(r));
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[s][r][v] = D::step(acc[s][r][v], word, weight[v]);
      }
    };
    constexpr std::integral_constant<int, 0> kFirst;
    constexpr std::integral_constant<int, 1> kSecond;
    const char* wide_at = wide;
    const auto step = [&](int s) __attribute__((always_inline)) {
      if constexpr (ahead) {
        __builtin_prefetch(ask, 0, 2);
        ask += ask_bytes;
      }
      if constexpr (!D::kWide) {
        products(kFirst, s, [&](int r) { return base[r / 4] + (r % 4) * x.stride; });
#pragma GCC unroll 8
        for (int b = 0; b < (MR + 3) / 4; ++b) base[b] += x.step;
      } else {
        products(kFirst, s, [&](int r) { return wide_at + 2 * r * kWideGroups * 4; });
        if constexpr (D::kParts == 2) {
          products(kSecond, s, [&](int r) { return wide_at + (2 * r + 1) * kWideGroups * 4; });
        }
        wide_at += 4;
      }
      p += kStep;
    };
    const int64_t at_a_time = D::kWide ? kWideGroups : groups;
    for (int64_t first = 0; first < groups; first += at_a_time) {
      int64_t g = groups - first < at_a_time ? groups - first : at_a_time;
      if constexpr (D::kWide) {
        for (int r = 0; r < MR; ++r) {
          const char* const words = x.data + r * x.stride + (done + first) * 4;
          widen_row<D>(words, g, wide + 2 * r * kWideGroups * 4);
        }
        wide_at = wide;
      }
      for (; g >= kSplit; g -= kSplit) {
#pragma GCC unroll 8
        for (int s = 0; s < kSplit; ++s) step(s);
      }
      for (; g > 0; --g) step(0);
    }

    // Not what GCC can compute before the loop: it would hold the rows' addresses in registers that
    // the sums need.
    float* row = out;
    asm("" : "+r"(row));
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r, row += out_stride) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        typename D::Acc sum = acc[0][r][v];
#pragma GCC unroll 8
        for (int s = 1; s < kSplit; ++s) sum = D::sum(sum, acc[s][r][v]);
        if constexpr (format != Format::kInt8) sum = add(sum, load(bias + v * kLanes));
        float* const to = row + v * kLanes;
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

template <Format format, int MR, int NV, bool ahead>
ENCDEC_INLINE void multiply_up_to(int rows, const PackedView& w, int64_t panel, const RowsView& x,
                                  float* out, int64_t out_stride, bool onto, Ahead tile) {
  if constexpr (MR > 0) {
    if (rows == MR) {
      multiply_tile<format, MR, NV, ahead>(w, panel, x, out, out_stride, onto, tile);
    } else {
      multiply_up_to<format, MR - 1, NV, ahead>(rows, w, panel, x, out, out_stride, onto, tile);
    }
  }
}

// With fewer rows most of what a tile could multiply would be idle.
constexpr int kLeastAmxRows = 4;

// The same tile on the matrix unit, of which the sums come through memory.
template <Format format, int NV>
__attribute__((noinline)) void multiply_on_amx(int rows, const PackedView& w, int64_t panel,
                                               const RowsView& x, float* out, int64_t out_stride,
                                               bool onto, Ahead ahead) {
  constexpr bool int8 = format == Format::kInt8;
  alignas(64) float sums[amx_rows(NV) * NV * kLanes];
  AmxProduct p{int8, rows, NV, 0, x.data, x.stride, w.data + panel * w.panel_bytes, nullptr, 0};
  if (ahead.tiles > 0) {
    constexpr int64_t kLines = NV * kAmxStepGroups;
    p.ahead_first = static_cast<int>(kLines * ahead.tile / ahead.tiles);
    p.ahead_end = static_cast<int>(kLines * (ahead.tile + 1) / ahead.tiles);
  }
  for (int64_t done = 0; done < w.groups || done == 0; done += p.groups) {
    p.groups = sum_run(format, w.groups - done);
    const float* const bias = done == 0 ? bias_of<NV>(w, panel) : kNoBias;
    const bool first = done == 0 && !onto;  // nothing stands in `out` that counts
    const bool direct = !int8 && first && !w.bias;
    p.out = reinterpret_cast<char*>(direct ? out : sums);
    p.out_stride = (direct ? out_stride : NV * kLanes) * 4;
    p.ahead = p.weights + w.panel_bytes * ahead.distance;
    amx_multiply(p);
    for (int r = 0; r < rows && !direct; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const float* const sum = sums + (r * NV + v) * kLanes;
        float* const to = out + r * out_stride + v * kLanes;
        if constexpr (int8) {
          store(to, to_float(iadd(iload(sum), iload(w.start + (panel * NV + v) * kLanes))));
        } else {
          const Float own = add(load(sum), load(bias + v * kLanes));
          store(to, first ? own : add(load(to), own));
        }
      }
    }
    if (p.groups == 0) return;
    p.x += p.groups * 4;
    p.weights += p.groups * NV * kLanes * 4;
  }
}

}  // namespace

template <Format format, int NV>
void multiply_rows(int rows, const PackedView& w, int64_t panel, const RowsView& x, float* out,
                   int64_t out_stride, bool onto, Ahead ahead) {
  if constexpr (has_amx(format, NV)) {
    if (amx_chosen && rows >= kLeastAmxRows) {
      multiply_on_amx<format, NV>(rows, w, panel, x, out, out_stride, onto, ahead);
      return;
    }
  }
  constexpr int kRows = max_tile_rows(NV);
  if constexpr (NV == 2) {  // with three it costs more than it gains
    if (ahead.tiles > 1) {
      multiply_up_to<format, kRows, NV, true>(rows, w, panel, x, out, out_stride, onto, ahead);
      return;
    }
  }
  multiply_up_to<format, kRows, NV, false>(rows, w, panel, x, out, out_stride, onto, ahead);
}

// Every kind of tile that a kernel uses.
using Multiply = void(int rows, const PackedView&, int64_t panel, const RowsView&, float*, int64_t,
                      bool, Ahead);
template Multiply multiply_rows<Format::kFloat32, 2>;
template Multiply multiply_rows<Format::kFloat32, 3>;
template Multiply multiply_rows<Format::kBfloat16, 2>;
template Multiply multiply_rows<Format::kBfloat16, 3>;
template Multiply multiply_rows<Format::kFloat16, 2>;
template Multiply multiply_rows<Format::kFloat16, 3>;
template Multiply multiply_rows<Format::kInt8, 2>;
template Multiply multiply_rows<Format::kInt8, 3>;

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
