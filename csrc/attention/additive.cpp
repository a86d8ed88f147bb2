#include "attention/additive.h"

#include <algorithm>

namespace encdec::attention {
namespace {

constexpr int64_t kMostQueryRows = 64;      // their factors stay in L2
constexpr int64_t kTeamElements = 1 << 17;  // of (B, Tq, S, A) from which a team pays
constexpr int64_t kUnitsPerThread = 2;      // at least: sentences differ in length

}  // namespace

const AdditiveKernels& additive_kernels(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return avx2::kAdditiveKernels;
    case Isa::kAvx512:
      return avx512::kAdditiveKernels;
    default:
      return avx512_bf16::kAdditiveKernels;
  }
}

void plan(Additive& call, int available) {
  const AdditiveShape& s = call.shape;
  const double elements = double(s.B) * double(s.Tq) * double(s.S) * double(s.A);
  call.threads = elements < double(kTeamElements) ? 1 : std::max(1, available);
  const int64_t units = kUnitsPerThread * call.threads;
  const int64_t tiles = call.threads == 1 || s.B == 0 ? 1 : (units + s.B - 1) / s.B;
  const int64_t rows = std::max<int64_t>(1, (s.Tq + tiles - 1) / tiles);
  call.query_rows = std::min(kMostQueryRows, (rows + 3) / 4 * 4);
}

}  // namespace encdec::attention
