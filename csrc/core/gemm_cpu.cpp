// The tiles of the matrix product of one instruction set: this file is compiled once for each.
#include "core/gemm.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {
namespace {

// Sums of floats are carried on for this many groups of k, then added to the result: their error
// grows with the length of one run.
constexpr int64_t kSumGroups = 512;

template <Format format, int MR, int NV, bool ahead>
__attribute__((noinline)) void multiply_tile(const PackedView& w, int64_t panel, RowsView x,
                                             float* out, int64_t out_stride, bool onto) {
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

template <Format format, int MR, int NV, bool ahead>
ENCDEC_INLINE void multiply_up_to(int rows, const PackedView& w, int64_t panel, RowsView x,
                                  float* out, int64_t out_stride, bool onto) {
  if constexpr (MR > 0) {
    if (rows == MR) {
      multiply_tile<format, MR, NV, ahead>(w, panel, x, out, out_stride, onto);
    } else {
      multiply_up_to<format, MR - 1, NV, ahead>(rows, w, panel, x, out, out_stride, onto);
    }
  }
}

// With fewer rows most of what a tile could multiply would be idle.
constexpr int kLeastAmxRows = 4;

// The same tile on the matrix unit, of which the sums come through memory.
template <Format format, int NV>
__attribute__((noinline)) void multiply_on_amx(int rows, const PackedView& w, int64_t panel,
                                               RowsView x, float* out, int64_t out_stride,
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
    const int64_t left = w.groups - done;
    p.groups = int8 || left < kSumGroups ? left : kSumGroups;
    const bool direct = !int8 && done == 0 && !onto;
    p.out = reinterpret_cast<char*>(direct ? out : sums);
    p.out_stride = (direct ? out_stride : NV * kLanes) * 4;
    p.ahead = p.weights + w.panel_bytes;
    amx_multiply(p);
    for (int r = 0; r < rows && !direct; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const float* const sum = sums + (r * NV + v) * kLanes;
        float* const to = out + r * out_stride + v * kLanes;
        if constexpr (int8) {
          store(to, to_float(iadd(iload(sum), iload(w.start + (panel * NV + v) * kLanes))));
        } else {
          store(to, add(load(to), load(sum)));
        }
      }
    }
    if (p.groups == 0) return;
    p.x += p.groups * 4;
    p.weights += p.groups * NV * kLanes * 4;
  }
}

}  // namespace

// The first tile of a panel waits for its weights, so the second asks for the next panel's. With
// many tiles that wait is a small part, and asking costs more.
constexpr int64_t kFewTiles = 4;

template <Format format, int NV>
void multiply_rows(int rows, const PackedView& w, int64_t panel, RowsView x, float* out,
                   int64_t out_stride, bool onto, Ahead ahead) {
  if constexpr (has_amx(format, NV)) {
    if (amx_chosen && rows >= kLeastAmxRows) {
      multiply_on_amx<format, NV>(rows, w, panel, x, out, out_stride, onto, ahead);
      return;
    }
  }
  constexpr int kRows = max_tile_rows(NV);
  if constexpr (NV == 2) {
    if (ahead.tile == 1 && ahead.tiles <= kFewTiles) {
      multiply_up_to<format, kRows, NV, true>(rows, w, panel, x, out, out_stride, onto);
      return;
    }
  }
  multiply_up_to<format, kRows, NV, false>(rows, w, panel, x, out, out_stride, onto);
}

// Every kind of tile that a kernel uses.
using Multiply = void(int rows, const PackedView&, int64_t panel, RowsView, float*, int64_t, bool,
                      Ahead);
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
