// Linear weights packed in panels of two vectors, as the kernels of single layers read them.
#pragma once

#include <type_traits>

#include "core/packed_matrix.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {

constexpr int kVectors = 2;  // of a panel
constexpr int kPanel = kVectors * kLanes;

constexpr int64_t panels_of(int64_t N) { return (N + kPanel - 1) / kPanel; }

// Room for a weight of N output and K input features from byte *end of a block on; *end moves on.
inline MatrixPlace place_weight(Format format, int64_t N, int64_t K, int64_t* end) {
  return place_matrix(round_up(*end, 64), format, K, panels_of(N), kVectors, end);
}

// The part of member `rank` of a team of `size`.
template <Format format>
inline void pack_weight(const Weight& w, int rank, int size, char* block, const MatrixPlace& m) {
  const int64_t vectors = panels_of(w.N) * kVectors;
  pack_vectors<format, kVectors>(w.data, w.dtype, w.row_stride, w.K, block, m,
                                 vectors * rank / size, vectors * (rank + 1) / size,
                                 [&](int64_t i) {
                                   const int64_t first = i * kLanes;
                                   const int lanes = first < w.N ? lanes_left(first, w.N) : 0;
                                   return ColumnRange{first, lanes};
                                 });
}

// Calls visit with the format of the weights as a constant.
template <class Visit>
inline auto with_format(Format format, const Visit& visit) {
  switch (format) {
    case Format::kFloat32:
      return visit(std::integral_constant<Format, Format::kFloat32>{});
    case Format::kBfloat16:
      return visit(std::integral_constant<Format, Format::kBfloat16>{});
    case Format::kFloat16:
      return visit(std::integral_constant<Format, Format::kFloat16>{});
    default:
      return visit(std::integral_constant<Format, Format::kInt8>{});
  }
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
