#include "attention/attention.h"

#include <algorithm>

namespace encdec::attention {
namespace {

constexpr int64_t kPackedRows = 12;  // queries of a key head from which packing pays
constexpr int64_t kScoreBytes = int64_t{256} << 10;  // of a tile: they stay in L2
constexpr int64_t kTileRows = 14;                    // of the product's tallest tile
constexpr int64_t kMostRows = 10 * kTileRows;
constexpr int64_t kRoundBytes = int64_t{4} << 20;  // of keys and values packed at a time
constexpr double kTeamProducts = 200e3;            // from which a team pays

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
  const int64_t rows = call.Tq * (call.H / std::max<int64_t>(1, call.G));
  const double products = double(heads) * double(rows) * double(call.S) * double(call.D + call.V);
  call.threads = products > kTeamProducts ? std::max(1, available) : 1;
  call.packed = rows >= kPackedRows;
  const int64_t fitting = kScoreBytes / (4 * std::max<int64_t>(1, call.S));
  call.query_rows = std::min(kMostRows, std::max(fitting / kTileRows, int64_t{1}) * kTileRows);
  call.query_rows = std::max<int64_t>(1, std::min(call.query_rows, rows));
  const int64_t head = call.S * (call.D + call.V) * element_bytes(call.dtype);
  const int64_t most = call.packed ? kRoundBytes / std::max<int64_t>(1, head) : heads;
  // Enough heads at a time that the team's members end together.
  call.round_heads =
      std::max<int64_t>(1, std::min(heads, std::max<int64_t>(most, 2 * call.threads)));
}

}  // namespace encdec::attention
