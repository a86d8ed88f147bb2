// What attention's forward and backward share: tiles of queries, packed heads, and the way from a
// tile's scores to its weights (scale, bias, masks, softmax, dropout).
#pragma once

#include "attention/attention.h"
#include "attention/tiles.h"
#include "core/gemm.h"
#include "core/layout.h"
#include "core/panels.h"
#include "core/random.h"

namespace encdec::attention {
namespace ENCDEC_ISA_NAMESPACE {

constexpr int64_t panels_bytes(Format format, int64_t k, int64_t columns) {
  return panels_of(columns) * packed_panel_bytes(format, k, kVectors);
}

// Whether weights must be staged for the product: float rows are what it reads.
template <Format format>
constexpr bool kStaged = format == Format::kBfloat16;

// A matrix for the right side of a product, `size` numbers in each of its rows. It has room for
// `most` of k, so that every panel starts at a fixed place.
template <Format format>
class PackedRows {
 public:
  PackedRows(char* data, int64_t most, int64_t columns)
      : data_(data),
        panel_bytes_(packed_panel_bytes(format, most, kVectors)),
        panels_(panels_of(columns)) {}

  // Rows become columns: k runs along a row. `rows` of them are read.
  void pack_as_columns(const char* first, Format dtype, int64_t stride, int64_t rows,
                       int64_t size) {
    constexpr int64_t kVector = kLanes * weight_group_bytes(format);
    panels_ = panels_of(rows);
    k_ = size;
    for (int64_t i = 0; i < panels_ * kVectors; ++i) {
      const int64_t column = i * kLanes;
      const ColumnSource source{first + column * stride, dtype, stride / element_bytes(dtype), 1,
                                column < rows ? lanes_left(column, rows) : 0};
      pack_columns<format>(source, size,
                           data_ + i / kVectors * panel_bytes_ + i % kVectors * kVector,
                           kVectors * kVector, nullptr, nullptr);
    }
  }
  // Rows stay rows: k runs over them.
  void pack_as_rows(const char* first, Format dtype, int64_t stride, int64_t rows, int64_t size) {
    panels_ = panels_of(size);
    k_ = rows;
    pack_rows<format, kVectors>(first, dtype, stride / element_bytes(dtype), rows, size, 0, panels_,
                                data_, panel_bytes_);
  }

  // The product of `rows` rows with the first `k` of the packed ones; put(panel, row, n, tile)
  // receives n rows of a panel, kPanel floats each.
  template <class Put>
  void multiply(RowsView x, int64_t rows, int64_t k, const Put& put) const {
    alignas(64) float tile[kRows * kPanel];
    each(x, rows, k, [&](const PackedView& w, int64_t p, int64_t row, int n, RowsView own) {
      multiply_rows<format, kVectors>(n, w, p, own, tile, kPanel);
      put(p, row, n, tile);
    });
  }
  // The same into rows of floats: columns [0, whole panels over `columns`).
  void multiply_into(RowsView x, int64_t rows, int64_t k, int64_t columns, float* out,
                     int64_t out_stride, bool onto = false) const {
    each(
        x, rows, k,
        [&](const PackedView& w, int64_t p, int64_t row, int n, RowsView own) {
          multiply_rows<format, kVectors>(n, w, p, own, out + row * out_stride + p * kPanel,
                                          out_stride, onto);
        },
        panels_of(columns));
  }

 private:
  static constexpr int kRows = tile_room(format, kVectors);

  template <class Run>
  void each(RowsView x, int64_t rows, int64_t k, const Run& run, int64_t panels = -1) const {
    PackedView w;
    w.data = data_;
    w.groups = round_up(k, group_size(format)) / group_size(format);
    w.panel_bytes = panel_bytes_;
    const RowTiles tiles(rows, format, kVectors);
    for (int64_t p = 0; p < (panels < 0 ? panels_ : panels); ++p) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i);
        run(w, p, row, static_cast<int>(tiles.begin(i + 1) - row), x.from(row));
      }
    }
  }

  char* data_;
  int64_t panel_bytes_, panels_, k_ = 0;
};

// Rows of heads that are needed soon, asked for a part at a time during other work.
class RowsAhead {
 public:
  // Forgets all rows; those that are added now are asked for in `parts` parts.
  void start(int64_t parts) {
    parts_ = parts;
    part_ = count_ = 0;
  }
  void add(const Heads& x, int64_t b, int64_t head, int64_t rows, int64_t row_bytes) {
    if (x.data) rows_[count_++] = {x.at(b, head, 0), x.row_stride, rows, row_bytes};
  }
  void ask() {
    if (part_ >= parts_) return;
    for (int i = 0; i < count_; ++i) {
      const Rows& x = rows_[i];
      const int64_t end = x.rows * (part_ + 1) / parts_;
      for (int64_t r = x.rows * part_ / parts_; r < end; ++r) {
        ask_for_row(x.first + r * x.stride, x.row_bytes);
      }
    }
    ++part_;
  }

 private:
  struct Rows {
    const char* first;
    int64_t stride, rows, row_bytes;
  };
  Rows rows_[4];
  int count_ = 0;
  int64_t parts_ = 0, part_ = 0;
};

// Some rows of queries that share their keys: consecutive ones of one head, or of all the heads of
// a group, head by head.
struct QueryTile {
  int64_t b, g;         // sentence and key head
  int64_t first, rows;  // among the group's heads * queries rows
  int64_t queries;      // of the sentence
};

// A row of a tile among all heads and queries.
struct QueryRow {
  int64_t head, query;
};

// From a tile's scores to its weights.
class Scores {
 public:
  explicit Scores(const Attention& call)
      : call_(call),
        esize_(element_bytes(call.dtype)),
        group_(call.H / call.G),
        dropout_{call.seed, 0, 0.0f} {
    if (call.dropout > 0.0) {
      const bool all = call.dropout >= 1.0;
      dropout_.least = all ? 0xffffffffu : static_cast<uint32_t>(call.dropout * 4294967296.0);
      dropout_.scale = all ? 0.0f : static_cast<float>(1.0 / (1.0 - call.dropout));
    }
  }

  QueryRow row_at(const QueryTile& t, int64_t r) const {
    const int64_t i = t.first + r, head = t.g * group_;
    if (i < t.queries) return {head, i};  // no division: rows of few numbers would feel it
    return {head + i / t.queries, i % t.queries};
  }
  const char* row_of(const Heads& x, const QueryTile& t, int64_t r) const {
    const QueryRow at = row_at(t, r);
    return x.at(t.b, at.head, at.query);
  }

  // The keys that some query of the tile sees.
  int64_t keys_seen(const QueryTile& t) const {
    const int64_t n = call_.keys_of(t.b);
    if (!call_.causal) return n;
    int64_t last = 0;
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t own = row_at(t, r).query + 1;
      last = own > last ? own : last;
    }
    return last < n ? last : n;
  }

  // A row of n scores becomes weights but for a factor, which is returned: scale, bias, masks,
  // softmax. put(s, e) receives them a vector at a time, zeros behind them up to whole panels. A
  // row without any key has zeros.
  template <class Put>
  float soften(const QueryTile& t, QueryRow at, float* row, int64_t n, const Put& put) const {
    const int64_t own = call_.causal && at.query + 1 < n ? at.query + 1 : n;
    const bool adjusted = call_.bias.data || call_.mask.data;
    const bool any = own > 0 && (!adjusted || adjust(row, t.b, at.head, at.query, own));
    const float sum = any ? exp_row(row, own, adjusted ? 1.0f : call_.scale, put) : 0.0f;
    const int64_t whole = round_up(n, kPanel);
    for (int64_t s = any ? round_up(own, kLanes) : 0; s < whole; s += kLanes) put(s, zero());
    return sum == 0.0f ? 0.0f : 1.0f / sum;
  }

  bool drops() const { return dropout_.least > 0; }
  void drop(const QueryTile& t, QueryRow at, float* row, int64_t n) const {
    drop_row(dropout_, (t.b * call_.H + at.head) * call_.Tq + at.query, row, n);
  }

  // Where the weights of a row lie that are shown, or their gradient.
  int64_t weights_row(const QueryTile& t, QueryRow at) const {
    if (call_.average) return (t.b * call_.Tq + at.query) * call_.S;
    return ((t.b * call_.H + at.head) * call_.Tq + at.query) * call_.S;
  }

 private:
  // scale * score + bias, and -infinity where the mask is 0; whether anything is left.
  bool adjust(float* row, int64_t b, int64_t h, int64_t query, int64_t n) const {
    const Float nothing = set1(-std::numeric_limits<float>::infinity());
    const char* bias = call_.bias.data ? call_.bias.at(b, h, query) : nullptr;
    const char* mask = call_.mask.data ? call_.mask.at(b, h, query) : nullptr;
    Float largest = nothing;
    bool nan = false;
    for (int64_t s = 0; s < n; s += kLanes) {
      const int lanes = lanes_left(s, n);
      Float x = mul(set1(call_.scale), load(row + s));
      if (bias) x = add(x, bias_of(bias, s, lanes));
      if (mask || lanes < kLanes) x = masked(mask, s, lanes, x, nothing);
      store(row + s, x);
      nan = nan || any_not_le(x, set1(std::numeric_limits<float>::infinity()));
      largest = max(largest, x);
    }
    return nan || reduce_max(largest) > -std::numeric_limits<float>::infinity();
  }

  Float bias_of(const char* row, int64_t s, int lanes) const {
    const int64_t stride = call_.bias.key_stride;
    if (stride == esize_) return load_as(call_.dtype, row + s * esize_, lanes);
    alignas(64) float own[kLanes] = {};
    for (int l = 0; l < lanes; ++l) {
      own[l] = reduce_add(load_as(call_.dtype, row + (s + l) * stride, 1));
    }
    return load(own);
  }

  // x where the mask is not 0 and the lane is one of `lanes`.
  Float masked(const char* mask, int64_t s, int lanes, Float x, Float nothing) const {
    const int64_t stride = call_.mask.key_stride;
    if (mask && stride == 1 && lanes == kLanes) return where_bytes(mask + s, x, nothing);
    char own[kLanes] = {};
    for (int l = 0; l < lanes; ++l) own[l] = mask ? mask[(s + l) * stride] : 1;
    return where_bytes(own, x, nothing);
  }

  const Attention& call_;
  const int esize_;
  const int64_t group_;  // query heads that share a key head
  Dropout dropout_;
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::attention
