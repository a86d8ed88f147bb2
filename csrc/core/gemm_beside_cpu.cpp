// Products of one row and of a tile at once (gemm.h), of one instruction set: this file is compiled
// once for each.
#include <cstdlib>

#include "core/gemm.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {

template <Format format, int NV>
void multiply_beside(const PackedView& w, int64_t panel, const char* row, float* out,
                     const BesideTile& tile) {
  if constexpr (has_beside<format>) {
    using D = Dot<format>;
    using Acc = typename D::Acc;
    constexpr int MR = kBesideRows<NV>, kPanels = kBesidePanels<NV>;
    constexpr int64_t kVector = kLanes * weight_group_bytes(format), kStep = NV * kVector;
    // The tile: its sums, how many groups they still take before they are handed over, and how many
    // come after those.
    const char* tile_p = tile.w.data + tile.panel * tile.w.panel_bytes;
    const char* base[2] = {tile.rows.data, tile.rows.data + 4 * tile.rows.stride};
    Acc tile_acc[MR][NV];
    const auto start_tile = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          if constexpr (format == Format::kInt8) {
            tile_acc[r][v] = iload(tile.w.start + (tile.panel * NV + v) * kLanes);
          } else {
            tile_acc[r][v] = D::start();
          }
        }
      }
    };
    start_tile();
    bool handed_over = false;
    int64_t tile_run = sum_run(format, tile.w.groups), tile_left = tile.w.groups - tile_run;
    const auto tile_step = [&]() __attribute__((always_inline)) {
      decltype(D::weights(tile_p)) weight[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) weight[v] = D::weights(tile_p + v * kVector);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const auto word = D::word(base[r / 4] + (r % 4) * tile.rows.stride);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) tile_acc[r][v] = D::step(tile_acc[r][v], word, weight[v]);
      }
      base[0] += 4;
      base[1] += 4;
      tile_p += kStep;
    };
    const float* const tile_bias = bias_of<NV>(tile.w, tile.panel);
    const auto hand_over = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          float* const to = tile.out + r * tile.out_stride + v * kLanes;
          if constexpr (format == Format::kInt8) {
            if (!handed_over) D::put(to, tile_acc[r][v]);
          } else {
            store(to, add(load(handed_over ? to : tile_bias + v * kLanes), tile_acc[r][v]));
          }
        }
      }
      handed_over = true;
      tile_run = sum_run(format, tile_left);
      tile_left -= tile_run;
      start_tile();
    };

    if (tile_run == 0) hand_over();  // rows of nothing

    const char* p = w.data + panel * w.panel_bytes;
    for (int i = 0; i < kPanels; ++i) {
      const char* x = row;
      for (int64_t done = 0; done < w.groups || done == 0;) {
        const int64_t groups = sum_run(format, w.groups - done);
        const float* const bias = done == 0 ? bias_of<NV>(w, panel + i) : kNoBias;
        Acc acc[kPanels][NV];
#pragma GCC unroll 4
        for (int s = 0; s < kPanels; ++s) {
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            if constexpr (format == Format::kInt8) {
              acc[s][v] = s == 0 ? iload(w.start + ((panel + i) * NV + v) * kLanes) : D::start();
            } else {
              acc[s][v] = D::start();
            }
          }
        }
        const auto step = [&](int s) __attribute__((always_inline)) {
          const auto word = D::word(x);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            acc[s][v] = D::step(acc[s][v], word, D::weights(p + v * kVector));
          }
          x += 4;
          p += kStep;
        };
        int64_t g = groups;
        while (g >= kPanels && tile_run > 0) {
          const int64_t both = g / kPanels < tile_run ? g / kPanels : tile_run;
          for (int64_t n = both; n > 0; --n) {
            tile_step();
#pragma GCC unroll 4
            for (int s = 0; s < kPanels; ++s) step(s);
          }
          g -= both * kPanels;
          tile_run -= both;
          if (tile_run == 0) hand_over();
        }
        for (; g >= kPanels; g -= kPanels) {
#pragma GCC unroll 4
          for (int s = 0; s < kPanels; ++s) step(s);
        }
        for (; g > 0; --g) step(0);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          Acc sum = acc[0][v];
#pragma GCC unroll 4
          for (int s = 1; s < kPanels; ++s) sum = D::sum(sum, acc[s][v]);
          if constexpr (format != Format::kInt8) sum = add(sum, load(bias + v * kLanes));
          float* const to = out + (i * NV + v) * kLanes;
          if (done == 0) {
            D::put(to, sum);
          } else if constexpr (format != Format::kInt8) {
            store(to, add(load(to), sum));
          }
        }
        done += groups > 0 ? groups : 1;
      }
      p = w.data + (panel + i + 1) * w.panel_bytes;
    }
    while (tile_run > 0) {  // the tile's rows are the longer ones
      for (; tile_run > 0; --tile_run) tile_step();
      hand_over();
    }
  } else {
    std::abort();  // nobody may ask for what has_beside denies
  }
}

using Beside = void(const PackedView&, int64_t panel, const char* row, float*, const BesideTile&);
template Beside multiply_beside<Format::kFloat32, 2>;
template Beside multiply_beside<Format::kFloat32, 3>;
template Beside multiply_beside<Format::kBfloat16, 2>;
template Beside multiply_beside<Format::kBfloat16, 3>;
template Beside multiply_beside<Format::kFloat16, 2>;
template Beside multiply_beside<Format::kFloat16, 3>;
template Beside multiply_beside<Format::kInt8, 2>;
template Beside multiply_beside<Format::kInt8, 3>;

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
