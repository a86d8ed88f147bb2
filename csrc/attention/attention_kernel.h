// Attention, a tile of queries of one head at a time: all its scores, softmax, the weighted values.
//
// A tile's scores for all keys stay in the member's own caches (rows * S floats), so that softmax
// is exact, weights cost only their writing, and nothing of size (Tq, S) is held. With many queries
// keys and values are packed once per head for the matrix product, some heads at a time; with few
// they are read as they lie.
#pragma once

#include "attention/attention.h"
#include "attention/tiles.h"
#include "attention/units.h"
#include "core/gemm.h"
#include "core/team.h"

namespace encdec::attention {
namespace ENCDEC_ISA_NAMESPACE {

constexpr int kPanelVectors = 2;
constexpr int64_t kPanelColumns = kPanelVectors * kLanes;

constexpr int64_t panel_count(int64_t columns) {
  return (columns + kPanelColumns - 1) / kPanelColumns;
}

// Whether weights must be staged for the product: float rows are what it reads.
template <Format format>
constexpr bool kStaged = format == Format::kBfloat16;

struct AttentionPlaces {
  int64_t head_keys, head_bytes;  // of a packed head: its values; all of it
  int64_t member, member_bytes;
  // Of a member: staged queries, float scores, weights staged where the product takes no floats,
  // and without packing some keys as floats.
  int64_t q, scores, p, keys;
  int64_t inverse;                   // float: one over each row's sum
  int64_t q_row, scores_row, p_row;  // bytes
  int64_t bytes;
};

template <Format format>
inline AttentionPlaces attention_places(const Attention& f) {
  AttentionPlaces p{};
  const int64_t keys = round_up(f.S, kPanelColumns);
  p.head_keys = panel_count(f.S) * packed_panel_bytes(format, f.D, kPanelVectors);
  p.head_bytes = p.head_keys + panel_count(f.V) * packed_panel_bytes(format, keys, kPanelVectors);
  p.member = f.packed ? f.round_heads * p.head_bytes : 0;
  p.q_row = staged_row_bytes(f.packed ? format : Format::kFloat32, f.D);
  p.scores_row = staged_row_bytes(Format::kFloat32, keys);
  p.p_row = staged_row_bytes(format, keys);
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t here = at;
    at += round_up(bytes, 64);
    return here;
  };
  const int64_t rows = round_up(f.query_rows, kTileQueries);
  p.q = take(rows * p.q_row);
  p.scores = take(rows * p.scores_row);
  p.p = take(f.packed && kStaged<format> ? rows * p.p_row : 0);
  p.inverse = take(rows * 4);
  p.keys = take(f.packed ? 0 : kLanes * p.q_row);
  p.member_bytes = at;
  p.bytes = p.member + f.threads * p.member_bytes;
  return p;
}

// Some rows of queries that share their keys: consecutive ones of one head, or, where each head of
// a group has few, all of the group.
struct QueryTile {
  int64_t b, g;         // sentence and key head
  int64_t first, rows;  // among the group's heads * Tq rows, head by head
};

template <Format format>
class AttentionRun {
 public:
  AttentionRun(const Attention& call, int rank)
      : call_(call),
        places_(attention_places<format>(call)),
        own_(call.workspace + places_.member + rank * places_.member_bytes),
        esize_(element_bytes(call.dtype)) {}

  // Keys and values of a head into place `slot`; only the keys that count are read.
  void pack(int64_t b, int64_t g, int64_t slot) const {
    const int64_t n = call_.keys_of(b);
    char* const to = head(slot);
    constexpr int64_t kVector = kLanes * weight_group_bytes(format);
    for (int64_t i = 0; i < panel_count(n) * kPanelVectors; ++i) {
      const int64_t s = i * kLanes;
      const ColumnSource columns{call_.key.at(b, g, s), call_.dtype, call_.key.row_stride / esize_,
                                 1, s < n ? lanes_left(s, n) : 0};
      pack_columns<format>(columns, call_.D,
                           to + i / kPanelVectors * key_panel() + i % kPanelVectors * kVector,
                           kPanelVectors * kVector, nullptr, nullptr);
    }
    for (int64_t i = 0; i < panel_count(call_.V) * kPanelVectors; ++i) {
      const int64_t v = i * kLanes;
      const ColumnSource columns{call_.value.at(b, g, 0) + v * esize_, call_.dtype, 1,
                                 call_.value.row_stride / esize_,
                                 v < call_.V ? lanes_left(v, call_.V) : 0};
      pack_columns<format>(
          columns, n,
          to + places_.head_keys + i / kPanelVectors * value_panel() + i % kPanelVectors * kVector,
          kPanelVectors * kVector, nullptr, nullptr);
    }
  }

  void run_packed(const QueryTile& t, int64_t slot) {
    const int64_t n = keys_seen(t);
    for (int64_t r = 0; r < t.rows; ++r) {
      stage_row<format>(query_row(t, r), call_.dtype, call_.D,
                        own_ + places_.q + r * places_.q_row);
    }
    constexpr int kRows = max_tile_rows(kPanelVectors);
    alignas(64) float tile[kRows * kPanelColumns];
    const RowTiles tiles(t.rows, kRows);
    PackedView keys = packed(head(slot), call_.D, key_panel());
    for (int64_t p = 0; p < panel_count(n); ++p) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i);
        multiply_rows<format, kPanelVectors>(
            static_cast<int>(tiles.begin(i + 1) - row), keys, p,
            {own_ + places_.q + row * places_.q_row, places_.q_row},
            scores(row) + p * kPanelColumns, places_.scores_row / 4);
      }
    }
    for (int64_t r = 0; r < t.rows; ++r) finish_row(t, r, n);
    RowsView weights{reinterpret_cast<const char*>(scores(0)), places_.scores_row};
    if constexpr (kStaged<format>) {
      weights = {own_ + places_.p, places_.p_row};
      for (int64_t r = 0; r < t.rows; ++r) {
        stage_row<format>(reinterpret_cast<const char*>(scores(r)), Format::kFloat32, n,
                          own_ + places_.p + r * places_.p_row);
      }
    }
    PackedView values = packed(head(slot) + places_.head_keys, n, value_panel());
    for (int64_t p = 0; p < panel_count(call_.V); ++p) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i), end = tiles.begin(i + 1);
        multiply_rows<format, kPanelVectors>(static_cast<int>(end - row), values, p,
                                             weights.from(row), tile, kPanelColumns);
        for (int64_t r = row; r < end; ++r) {
          for (int v = 0; v < kPanelVectors; ++v) {
            const int64_t column = p * kPanelColumns + v * kLanes;
            if (column >= call_.V) break;
            put(t, r, column, load(tile + (r - row) * kPanelColumns + v * kLanes),
                lanes_left(column, call_.V));
          }
        }
      }
    }
  }

  void run_direct(const QueryTile& t) {
    const int64_t n = keys_seen(t), stride = places_.q_row / 4, size = round_up(call_.D, kLanes);
    float* const q = reinterpret_cast<float*>(own_ + places_.q);
    float* const k = reinterpret_cast<float*>(own_ + places_.keys);
    const int64_t whole = round_up(t.rows, kTileQueries);
    for (int64_t r = 0; r < whole; ++r)
      float_row(r < t.rows ? query_row(t, r) : nullptr, call_.dtype, call_.D, q + r * stride);
    for (int64_t s = 0; s < n; s += kLanes) {
      const int64_t count = n - s < kLanes ? n - s : kLanes;
      const auto sums = [&](const auto& key_at) {
        all_sums(q, stride, t.rows, count, size, scores(0) + s, places_.scores_row / 4, key_at,
                 [](Float sum, Float x, Float y, int64_t)
                     __attribute__((always_inline)) { return fma(x, y, sum); });
      };
      if (call_.D % kLanes == 0 && count == kLanes) {  // whole vectors, read as they lie
        const char* const first = call_.key.at(t.b, t.g, s);
        const int64_t row = call_.key.row_stride;
        with_dtype(call_.dtype, [&](auto dtype) {
          constexpr Format d = decltype(dtype)::value;
          sums([&](int64_t j, int64_t a) __attribute__((always_inline)) {
            return load_as(d, first + j * row + a * element_bytes(d));
          });
        });
        continue;
      }
      for (int64_t i = 0; i < kLanes; ++i) {
        float_row(i < count ? call_.key.at(t.b, t.g, s + i) : nullptr, call_.dtype, call_.D,
                  k + i * stride);
      }
      sums(FloatKeys{k, stride});
    }
    for (int64_t r = 0; r < t.rows; ++r) finish_row(t, r, n);
    const auto run = [&](auto constant) {
      weigh<decltype(constant)::value>(
          t.rows, scores(0), places_.scores_row / 4, 1, n, call_.value.at(t.b, t.g, 0),
          call_.value.row_stride, call_.V,
          [&](int64_t r, int64_t column, Float sum, int lanes) { put(t, r, column, sum, lanes); });
    };
    with_dtype(call_.dtype, run);
  }

  char* head(int64_t slot) const { return call_.workspace + slot * places_.head_bytes; }

 private:
  int64_t key_panel() const { return packed_panel_bytes(format, call_.D, kPanelVectors); }
  int64_t value_panel() const {
    return packed_panel_bytes(format, round_up(call_.S, kPanelColumns), kPanelVectors);
  }
  static PackedView packed(const char* data, int64_t k, int64_t panel_bytes) {
    PackedView v;
    v.data = data;
    v.groups = round_up(k, group_size(format)) / group_size(format);
    v.panel_bytes = panel_bytes;
    return v;
  }
  float* scores(int64_t row) const {
    return reinterpret_cast<float*>(own_ + places_.scores + row * places_.scores_row);
  }
  int64_t head_of(const QueryTile& t, int64_t r) const {
    return t.g * (call_.H / call_.G) + (t.first + r) / call_.Tq;
  }
  int64_t query_of(const QueryTile& t, int64_t r) const { return (t.first + r) % call_.Tq; }
  const char* query_row(const QueryTile& t, int64_t r) const {
    return call_.query.at(t.b, head_of(t, r), query_of(t, r));
  }
  void put(const QueryTile& t, int64_t r, int64_t column, Float sum, int lanes) const {
    store_as(call_.dtype, call_.output.at(t.b, head_of(t, r), query_of(t, r)) + column * esize_,
             mul(sum, set1(inverse()[r])), lanes);
  }

  // The keys that some query of the tile sees.
  int64_t keys_seen(const QueryTile& t) const {
    const int64_t n = call_.keys_of(t.b);
    if (!call_.causal) return n;
    int64_t last = 0;
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t own = query_of(t, r) + 1;
      last = own > last ? own : last;
    }
    return last < n ? last : n;
  }

  float* inverse() const { return reinterpret_cast<float*>(own_ + places_.inverse); }

  // Scores become weights but for a factor, which inverse() receives: scale, bias, masks, softmax.
  // A row without any key has zeros.
  void finish_row(const QueryTile& t, int64_t r, int64_t n) const {
    float* const row = scores(r);
    const int64_t h = head_of(t, r), query = query_of(t, r);
    const int64_t own = call_.causal && query + 1 < n ? query + 1 : n;
    const bool adjusted = call_.bias.data || call_.mask.data;
    const bool any = own > 0 && (!adjusted || adjust(row, t.b, h, query, own));
    inverse()[r] = any ? 1.0f / exp_row(row, own, adjusted ? 1.0f : call_.scale) : 0.0f;
    const int64_t kept = any ? own : 0;
    std::memset(row + kept, 0, static_cast<size_t>((round_up(n, kPanelColumns) - kept) * 4));
    if (!call_.weights) return;
    float* const to = call_.weights + ((t.b * call_.H + h) * call_.Tq + query) * call_.S;
    const int64_t vectors = kept / kLanes * kLanes;
    scale_row(row, vectors, inverse()[r], to);
    for (int64_t s = vectors; s < kept; ++s) to[s] = row[s] * inverse()[r];
    std::memset(to + kept, 0, static_cast<size_t>((call_.S - kept) * 4));
  }

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
  const AttentionPlaces places_;
  char* const own_;
  const int esize_;
};

// All of it, by the members of a team. Heads are packed some at a time, in rounds.
template <Format format>
inline void run_attention(const Attention& f) {
  const int64_t heads = f.B * f.G, group = f.H / f.G;
  const int64_t rows = f.Tq * group;
  const int64_t tiles = (rows + f.query_rows - 1) / f.query_rows;
  const int64_t rounds = (heads + f.round_heads - 1) / f.round_heads;
  Units packing, work;
  Barrier barrier;
  auto body = [&](int rank, int size) {
    AttentionRun<format> own(f, rank);
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t begin = round * f.round_heads;
      const int64_t count = heads - begin < f.round_heads ? heads - begin : f.round_heads;
      if (f.packed) {
        for (int64_t u = packing.take(count); u >= 0; u = packing.take(count)) {
          own.pack((begin + u) / f.G, (begin + u) % f.G, u);
        }
        barrier.wait(size);
        if (rank == 0) packing.reset();
      }
      for (int64_t u = work.take(count * tiles); u >= 0; u = work.take(count * tiles)) {
        const int64_t pair = begin + u / tiles, i = u % tiles, first = rows * i / tiles;
        const QueryTile t{pair / f.G, pair % f.G, first, rows * (i + 1) / tiles - first};
        f.packed ? own.run_packed(t, u / tiles) : own.run_direct(t);
      }
      if (round + 1 == rounds) break;
      barrier.wait(size);
      if (rank == 0) work.reset();
    }
  };
  run_team(f.threads, body);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::attention
