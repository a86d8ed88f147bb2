#include "core/product_plan.h"

#include <algorithm>

#include "core/amx.h"
#include "core/cpu_features.h"

namespace encdec {
namespace {

constexpr int64_t kStagedBytes = int64_t{384} << 10;  // a member's rows: they stay in L2
constexpr int64_t kLeastRows = 56;                    // that a panel is read for
constexpr int64_t kOwnRows = 42;                      // of a thread, to split rows
constexpr int64_t kAmxLeastRows = 64;                 // both, where the matrix unit multiplies

// Rough speeds of one core and the cost of a team; only their orders of magnitude matter here.
constexpr double kWordsPerMicrosecond = 100e3;  // products of 32-bit words
constexpr double kBytesPerMicrosecond = 100e3;  // of weights
constexpr double kTeamMicroseconds = 3.0;

}  // namespace

ProductPlan plan_product(Format format, int64_t M, int64_t N, int64_t K, int64_t row_bytes,
                         int available) {
  ProductPlan plan;
  const double words = double(N) * double(K) / group_size(format);
  const double alone = std::max(words * weight_group_bytes(format) / kBytesPerMicrosecond,
                                words * double(M) / kWordsPerMicrosecond);
  const bool worth = alone > 2 * kTeamMicroseconds;
  // With many rows each thread stages its own only; with few, each reads its part of the weights.
  // The matrix unit is so fast that what is read decides: all weights, or all rows of floats.
  const bool amx = amx_multiplies(format);
  const bool few_weights = N * element_bytes(format) < M * element_bytes(Format::kFloat32);
  plan.split_rows =
      worth && M >= (amx ? kAmxLeastRows : kOwnRows) * available && (!amx || few_weights);
  const int64_t most = plan.split_rows ? M : (N + 31) / 32;
  plan.threads = worth ? static_cast<int>(std::min<int64_t>(available, most)) : 1;
  const int64_t own = plan.split_rows ? (M + plan.threads - 1) / plan.threads : M;
  const int64_t tile = amx ? amx_rows(2) : 1;
  const int64_t fitting = within_l2(kStagedBytes) / row_bytes / tile * tile;
  const int64_t least = amx ? kAmxLeastRows : within_l2(kLeastRows);
  plan.chunk_rows = std::max<int64_t>(1, std::min(own, std::max(fitting, least)));
  return plan;
}

}  // namespace encdec
