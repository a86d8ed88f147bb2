#include "attention/attention.h"

#include <algorithm>

#include "core/amx.h"

namespace encdec::attention {
namespace {

constexpr int64_t kPackedRows = 12;                 // queries of a key head from which packing pays
constexpr int64_t kScoreBytes = int64_t{96} << 10;  // of a tile: they stay in L2
constexpr int64_t kMostRows = 140;
constexpr int64_t kBackwardBytes = int64_t{512} << 10;  // of a tile's weights and their gradients
constexpr int64_t kMostBackwardRows = 112;
constexpr int64_t kRoundBytes = int64_t{4} << 20;  // of keys and values packed at a time
constexpr int64_t kApartUnits = 16;  // per member, from which they end together whatever they take
constexpr double kTeamProducts = 200e3;  // from which a team pays

double products(const Attention& call) {
  return double(call.B) * double(call.H) * double(call.Tq) * double(call.S) *
         double(call.D + call.V);
}

// Queries whose scores are `scores` together, at most `most`: whole ones of the product's tallest
// tiles.
int64_t query_rows(const Attention& call, int64_t scores, int64_t most, int64_t queries) {
  const int64_t tile = amx_chosen && call.dtype == Format::kBfloat16 ? amx_rows(2) : 14;
  const int64_t fitting = std::min(most, scores / std::max<int64_t>(1, call.S));
  return std::max<int64_t>(1, std::min(std::max(fitting / tile, int64_t{1}) * tile, queries));
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
  call.query_rows = query_rows(call, kScoreBytes / 4, kMostRows, rows);
  const int64_t head = call.S * (call.D + call.V) * element_bytes(call.dtype);
  const int64_t most = call.packed ? kRoundBytes / std::max<int64_t>(1, head) : heads;
  const int64_t together = call.average ? std::max<int64_t>(1, call.G) : 1;
  const int64_t units = heads / together;
  const bool alike = !call.lengths && !call.key.starts && units % call.threads == 0;
  call.apart = call.packed && (alike || units >= kApartUnits * call.threads);
  if (call.apart) {
    call.round_heads = call.threads * together;
    return;
  }
  // Enough heads at a time that the team's members end together.
  call.round_heads =
      std::max<int64_t>(1, std::min(heads, std::max<int64_t>(most, 2 * call.threads)));
  call.round_heads = round_up(call.round_heads, together);
}

void plan_backward(Attention& call, int available) {
  const int64_t heads = std::max<int64_t>(1, call.B * call.G);
  const bool team = products(call) > kTeamProducts;
  call.threads = team ? static_cast<int>(std::min<int64_t>(std::max(1, available), heads)) : 1;
  call.query_rows = query_rows(call, kBackwardBytes / 8, kMostBackwardRows, call.Tq);
}

}  // namespace encdec::attention
