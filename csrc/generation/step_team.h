// What steps of decoders share: rows staged for the matrix product by all members of a team, and
// products whose columns the members divide among themselves.
#pragma once

#include "attention/tiles.h"
#include "core/layout.h"
#include "generation/kernels.h"
#include "generation/scan.h"
#include "linear/linear_kernel.h"

namespace encdec::generation {
namespace ENCDEC_ISA_NAMESPACE {

using namespace encdec::ENCDEC_ISA_NAMESPACE;
using attention::ENCDEC_ISA_NAMESPACE::all_sums;
using attention::ENCDEC_ISA_NAMESPACE::softmax_row;
using attention::ENCDEC_ISA_NAMESPACE::weigh;
using linear::Activation;
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

ENCDEC_INLINE void add_lanes(float* to, Float x, int lanes) {
  store_lanes(to, add(load_lanes(to, lanes), x), lanes);
}

// Panels of a packed matrix.
struct Panels {
  int64_t first, end;
};

// Columns of scores that are computed, then scanned, while they are in cache.
constexpr int64_t kScoreBlock = 8 * kPanel;

// What a member of a team needs to find the best of so many rows of scores: a block of them, scans
// and their lists.
inline int64_t score_bytes(int64_t rows) {
  const int64_t scan = static_cast<int64_t>(sizeof(RowScan)) + kMostKept * 8;
  return round_up(rows * (kScoreBlock * 4 + scan), 64);
}

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

  // This member's panels of N columns.
  Panels own_panels(int64_t N) const {
    const int64_t panels = panels_of(N);
    return {panels * rank_ / members_, panels * (rank_ + 1) / members_};
  }

  // put(row, column, a vector of x W' + b, how many of its lanes count), for columns of some
  // panels.
  template <class Put>
  void multiply(const Projection& p, const StagedRows& x, int64_t rows, const Panels& panels,
                const Put& put) const {
    constexpr int kRows = tile_room(format, kVectors);
    alignas(64) float tile[kRows * kPanel];
    const auto& header = *reinterpret_cast<const linear::PackedHeader*>(p.packed);
    const PackedView weight = view(p.packed, header.weight, format, p.K, kVectors);
    const RowTiles tiles(rows, format, kVectors);
    for (int64_t panel = panels.first; panel < panels.end; ++panel) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t first = tiles.begin(i), end = tiles.begin(i + 1);
        const RowsView own{x.data + first * x.stride, x.stride};
        multiply_rows<format, kVectors>(static_cast<int>(end - first), weight, panel, own, tile,
                                        kPanel, false, {i, tiles.count});
        const int64_t column = panel * kPanel;
        if (column + kPanel <= p.N) {
          finish<true>(p, weight, x.scales, first, end, column, tile, put);
        } else {
          finish<false>(p, weight, x.scales, first, end, column, tile, put);
        }
      }
    }
  }
  template <class Put>
  void multiply(const Projection& p, const StagedRows& x, int64_t rows, const Put& put) const {
    multiply(p, x, rows, own_panels(p.N), put);
  }

  // Scores x W' + b, and what is to be found in them: in a block of columns while it is in cache,
  // then in what the members found. work: score_bytes for each member. more(panels, add): adds
  // what else scores of these columns consist of. Waits for all.
  template <class More>
  void score(const OutputLayer& layer, const StagedRows& x, int64_t rows, const StepScores& to,
             char* work, const More& more) const {
    const Projection& p = layer.projection;
    const auto block_of = [&](int member) {
      return reinterpret_cast<float*>(work + member * score_bytes(rows));
    };
    const auto scans_of = [&](int member) {
      return reinterpret_cast<RowScan*>(block_of(member) + rows * kScoreBlock);
    };
    RowScan* const own = scans_of(rank_);
    RowScans lists = to.scans;
    lists.numbers = reinterpret_cast<float*>(own + rows);
    lists.places = reinterpret_cast<int32_t*>(lists.numbers + rows * kMostKept);
    for (int64_t r = 0; r < rows; ++r) own[r] = row_scan(lists, r);
    const Panels mine = own_panels(p.N);
    for (int64_t first = mine.first; first < mine.end; first += kScoreBlock / kPanel) {
      const int64_t end = std::min(mine.end, first + kScoreBlock / kPanel);
      const int64_t column = first * kPanel;
      const int64_t count = std::min(end * kPanel, p.N) - column;
      // Scores of a shortlist are put in their places afterwards, and others if asked for.
      const int32_t* const tokens = layer.tokens ? layer.tokens + column : nullptr;
      const bool direct = !tokens && !to.few;
      float* const block = direct ? to.logits + column : block_of(rank_);
      const int64_t stride = direct ? to.stride : kScoreBlock;
      const int32_t* const few_end = to.few_tokens + to.few_count;
      const int32_t* const few = std::lower_bound(to.few_tokens, few_end, column);
      multiply(p, x, rows, {first, end},
               [=](int64_t r, int64_t c, Float y, int lanes) __attribute__((always_inline)) {
                 store_lanes(block + r * stride + c - column, y, lanes);
               });
      more(Panels{first, end},
           [=](int64_t r, int64_t c, Float y, int lanes) __attribute__((always_inline)) {
             add_lanes(block + r * stride + c - column, y, lanes);
           });
      for (int64_t r = 0; r < rows; ++r) {
        const float* const found = block + r * stride;
        own[r].take(found, count, column, tokens);
        float* const row = to.logits + r * to.stride;
        if (tokens) {
          for (int64_t i = 0; i < count; ++i) row[tokens[i]] = found[i];
        } else if (to.few) {
          for (auto t = few; t < few_end && *t < column + count; ++t) row[*t] = found[*t - column];
        }
      }
    }
    wait();
    each(rows, [&](int64_t r) {
      RowScan all = row_scan(to.scans, r);
      for (int member = 0; member < members_; ++member) all.join(scans_of(member)[r]);
      all.put(r, to.scans);
    });
  }

 private:
  // What follows the product of some rows with a panel; whole: all of its columns are there.
  template <bool whole, class Put>
  static ENCDEC_INLINE void finish(const Projection& p, const PackedView& weight,
                                   const float* scales, int64_t first, int64_t end, int64_t column,
                                   const float* tile, const Put& put) {
    const int vectors = whole || column + kLanes < p.N ? kVectors : 1;
    Float bias[kVectors], scale[kVectors];
    for (int v = 0; v < vectors; ++v) {
      bias[v] = p.bias ? load(p.bias + column + v * kLanes) : zero();
      scale[v] = format == Format::kInt8 ? load(weight.scale + column + v * kLanes) : zero();
    }
    for (int64_t r = first; r < end; ++r, tile += kPanel) {
      for (int v = 0; v < vectors; ++v) {
        const int64_t c = column + v * kLanes;
        Float y = load(tile + v * kLanes);
        if constexpr (format == Format::kInt8) y = mul(y, mul(scale[v], set1(scales[r])));
        put(r, c, add(y, bias[v]), whole ? kLanes : lanes_left(c, p.N));
      }
    }
  }

  Barrier& barrier_;
  const int rank_, members_;
};

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
