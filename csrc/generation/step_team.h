// What steps of decoders share: rows staged for the matrix product by all members of a team, and
// products whose columns the members divide among themselves.
#pragma once

#include "attention/tiles.h"
#include "core/layout.h"
#include "generation/kernels.h"
#include "linear/linear_kernel.h"

namespace encdec::generation {
namespace ENCDEC_ISA_NAMESPACE {

using namespace encdec::ENCDEC_ISA_NAMESPACE;
using attention::ENCDEC_ISA_NAMESPACE::all_sums;
using attention::ENCDEC_ISA_NAMESPACE::softmax_row;
using attention::ENCDEC_ISA_NAMESPACE::weigh;
using linear::Norm;
using linear::ENCDEC_ISA_NAMESPACE::activated;
using linear::ENCDEC_ISA_NAMESPACE::row_norm;
using linear::ENCDEC_ISA_NAMESPACE::RowNorm;

// Floats from one row of a buffer to the next.
constexpr int64_t row_floats(int64_t size) { return staged_row_bytes(Format::kFloat32, size) / 4; }

// Rows of floats in a workspace, one for each row of the step.
struct FloatRows {
  float* data = nullptr;
  int64_t stride = 0;

  float* at(int64_t r) const { return data + r * stride; }
};

// Rows in the form that the matrix product reads.
struct StagedRows {
  char* data = nullptr;
  int64_t stride = 0;
  float* scales = nullptr;
};

template <Format format>
class StepTeam {
 public:
  StepTeam(Barrier& barrier, int rank, int members)
      : barrier_(barrier), rank_(rank), members_(members) {}

  void wait() const { barrier_.wait(members_); }
  int rank() const { return rank_; }
  // Calls visit(i) for this member's part of 0 .. n.
  template <class Visit>
  ENCDEC_INLINE void each(int64_t n, const Visit& visit) const {
    for (int64_t i = n * rank_ / members_; i < n * (rank_ + 1) / members_; ++i) visit(i);
  }

  static void stage(const float* row, int64_t size, const StagedRows& to, int64_t r) {
    to.scales[r] = stage_row<format>(reinterpret_cast<const char*>(row), Format::kFloat32, size,
                                     to.data + r * to.stride);
  }

  // put(row, column, a vector of x W' + b, how many of its lanes count), for this member's columns.
  template <class Put>
  void multiply(const Projection& p, const StagedRows& x, int64_t rows, const Put& put) const {
    constexpr int kRows = max_tile_rows(kVectors);
    alignas(64) float tile[kRows * kPanel];
    const auto& header = *reinterpret_cast<const linear::PackedHeader*>(p.packed);
    const PackedView weight = view(p.packed, header.weight, format, p.K, kVectors);
    const RowTiles tiles(rows, kRows);
    each(panels_of(p.N), [&](int64_t panel) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t first = tiles.begin(i), end = tiles.begin(i + 1);
        multiply_rows<format, kVectors>(static_cast<int>(end - first), weight, panel,
                                        {x.data + first * x.stride, x.stride}, tile, kPanel);
        for (int v = 0; v < kVectors && panel * kPanel + v * kLanes < p.N; ++v) {
          const int64_t column = panel * kPanel + v * kLanes;
          const int lanes = lanes_left(column, p.N);
          const Float bias = p.bias ? load(p.bias + column) : zero();
          for (int64_t r = first; r < end; ++r) {
            Float y = load(tile + (r - first) * kPanel + v * kLanes);
            if constexpr (format == Format::kInt8) {
              y = mul(y, mul(load(weight.scale + column), set1(x.scales[r])));
            }
            put(r, column, add(y, bias), lanes);
          }
        }
      }
    });
  }

 private:
  Barrier& barrier_;
  const int rank_, members_;
};

ENCDEC_INLINE Float load_lanes(const float* from, int lanes) {
  return lanes == kLanes ? load(from) : load_partial(from, lanes);
}

ENCDEC_INLINE void store_lanes(float* to, Float x, int lanes) {
  if (lanes == kLanes) {
    store(to, x);
  } else {
    store_partial(to, x, lanes);
  }
}

// to = norm(x), n numbers; whole vectors are read and written.
inline void normalise(const NormWeights& w, const float* x, int64_t n, float* to) {
  if (w.kind == Norm::kNone) {
    if (to != x) std::memcpy(to, x, static_cast<size_t>(n * 4));
    return;
  }
  const RowNorm norm = row_norm(x, n, w.kind, w.eps);
  for (int64_t c = 0; c < n; c += kLanes) {
    const Float bias = w.bias ? load(w.bias + c) : zero();
    store(to + c, fma(norm.of(load(x + c)), load(w.weight + c), bias));
  }
}

// n numbers of row `index` of a table, times `scale`; whole vectors are written.
inline void copy_row(const Table& table, int64_t index, int64_t n, float scale, float* to) {
  const char* const from = table.data + index * table.row_stride;
  const int bytes = element_bytes(table.dtype);
  for (int64_t c = 0; c < n; c += kLanes) {
    store(to + c, mul(load_as(table.dtype, from + c * bytes, lanes_left(c, n)), set1(scale)));
  }
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::generation
