// How the product of rows with a packed matrix is cut over a team.
#pragma once

#include <cstdint>

#include "core/format.h"

namespace encdec {

struct ProductPlan {
  int threads = 1;
  bool split_rows = false;  // each thread has rows of its own, else output features of its own
  int64_t chunk_rows = 1;   // rows that are staged at a time
};

// M rows; N output features of K weights each; row_bytes: of a staged row. `available` threads may
// be had.
ProductPlan plan_product(Format format, int64_t M, int64_t N, int64_t K, int64_t row_bytes,
                         int available);

}  // namespace encdec
