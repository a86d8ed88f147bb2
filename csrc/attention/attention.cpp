#include "attention/attention.h"

#include <algorithm>

namespace encdec::attention {
namespace {

constexpr int64_t kPackedRows = 12;  // queries of a key head from which packing pays
constexpr int64_t kScoreBytes = int64_t{256} << 10;  // of a tile: they stay in L2
constexpr int64_t kTileRows = 14;                    // of the product's tallest tile
constexpr int64_t kMostRows = 10 * kTileRows;
constexpr int64_t kBackwardBytes = int64_t{512} << 10;  // of a tile's weights and their gradients
constexpr int64_t kMostBackwardRows = 8 * kTileRows;
constexpr int64_t kRoundBytes = int64_t{4} << 20;  // of keys and values packed at a time
constexpr double kTeamProducts = 200e3;            // from which a team pays

double products(const Attention& call) {
  return double(call.B) * double(call.H) * double(call.Tq) * double(call.S) *
         double(call.D + call.V);
}

// Whole tiles of queries whose S scores each are `scores` together, at most `most`.
int64_t tile_rows(int64_t scores, int64_t most, int64_t queries, int64_t S) {
  const int64_t fitting = scores / std::max<int64_t>(1, S) / kTileRows * kTileRows;
  const int64_t rows = std::min(most, std::max(fitting, kTileRows));
  return std::max<int64_t>(1, std::min(rows, queries));
}

}  // namespace

const AttentionKernels& attention_kernels(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return avx2::kAttentionKernels;
    case Isa::kAvx512:
      return avx512::kAttentionKernels;
    default:
      return avx512_bf16::kAttentionKernels;
  }
}

void plan(Attention& call, int available) {
  const int64_t heads = call.B * call.G;
  const int64_t group = call.average ? 1 : call.H / std::max<int64_t>(1, call.G);
  const int64_t rows = call.Tq * group;
  call.threads = products(call) > kTeamProducts ? std::max(1, available) : 1;
  call.packed = rows >= kPackedRows;
  call.query_rows = tile_rows(kScoreBytes / 4, kMostRows, rows, call.S);
  const int64_t head = call.S * (call.D + call.V) * element_bytes(call.dtype);
  const int64_t most = call.packed ? kRoundBytes / std::max<int64_t>(1, head) : heads;
  // Enough heads at a time that the team's members end together.
  call.round_heads =
      std::max<int64_t>(1, std::min(heads, std::max<int64_t>(most, 2 * call.threads)));
  if (call.average) call.round_heads = round_up(call.round_heads, std::max<int64_t>(1, call.G));
}

void plan_backward(Attention& call, int available) {
  const int64_t heads = std::max<int64_t>(1, call.B * call.G);
  const bool team = products(call) > kTeamProducts;
  call.threads = team ? static_cast<int>(std::min<int64_t>(std::max(1, available), heads)) : 1;
  call.query_rows = tile_rows(kBackwardBytes / 8, kMostBackwardRows, call.Tq, call.S);
}

}  // namespace encdec::attention
