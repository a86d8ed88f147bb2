// Attention, a tile of queries of one head at a time: all its scores, softmax, the weighted values.
//
// A tile's scores for all keys stay in the member's own caches (rows * S floats), so that softmax
// is exact, weights cost only their writing, and nothing of size (Tq, S) is held. With many queries
// keys and values are packed once per head for the matrix product, some heads at a time; with few
// they are read as they lie, with one for several heads at a time where these lie side by side.
#pragma once

#include <algorithm>

#include "attention/attention_scores.h"
#include "attention/heads.h"
#include "attention/units.h"
#include "core/team.h"

namespace encdec::attention {
namespace ENCDEC_ISA_NAMESPACE {

constexpr int64_t kNearRow = 2048;  // bytes from a row of queries to the next, to be read in place

// How many heads a unit takes with their one query, 1 for any other call.
inline int64_t heads_of_unit(const Attention& f) {
  const int64_t size = f.D * element_bytes(f.dtype);
  const bool alike =
      f.D == f.V && f.G == f.H && f.key.head_stride == size && f.value.head_stride == size;
  int64_t heads = 1;
  if (f.Tq == 1 && !f.packed && !f.query.starts && !f.average && alike) {
    with_head_vectors(f.D, [&](auto vectors) { heads = heads_together(vectors); });
  }
  return f.H % heads == 0 ? heads : 1;
}

struct AttentionPlaces {
  int64_t head_keys, head_bytes;  // of a packed head: its values; all of it
  int64_t member, member_bytes;
  // Of a member: staged queries, float scores, weights staged where the product takes no floats,
  // and without packing some keys as floats.
  int64_t q, scores, p, keys;
  int64_t inverse;                   // float: one over each row's sum
  int64_t output;                    // char*: each row's place in the output
  int64_t q_row, scores_row, p_row;  // bytes
  int64_t bytes;
};

template <Format format>
inline AttentionPlaces attention_places(const Attention& f) {
  AttentionPlaces p{};
  const int64_t keys = round_up(f.S, kPanel);
  p.head_keys = panels_bytes(format, f.D, f.S);
  p.head_bytes = p.head_keys + panels_bytes(format, keys, f.V);
  p.member = f.packed ? f.round_heads * p.head_bytes : 0;
  p.q_row = staged_row_bytes(f.packed ? format : Format::kFloat32, f.D);
  p.scores_row = staged_row_bytes(Format::kFloat32, keys);
  p.p_row = staged_row_bytes(format, keys);
  Layout member;
  const int64_t rows = round_up(std::max(f.query_rows, heads_of_unit(f)), kTileQueries);
  p.q = member.take(rows * p.q_row);
  p.scores = member.take(rows * p.scores_row);
  p.p = member.take(f.packed && kStaged<format> ? rows * p.p_row : 0);
  p.inverse = member.take(rows * 4);
  p.output = member.take(rows * static_cast<int64_t>(sizeof(char*)));
  p.keys = member.take(f.packed ? 0 : kLanes * p.q_row);
  p.member_bytes = member.end();
  p.bytes = p.member + f.threads * p.member_bytes;
  return p;
}

template <Format format>
class AttentionRun : private Scores {
 public:
  AttentionRun(const Attention& call, int rank)
      : Scores(call),
        call_(call),
        places_(attention_places<format>(call)),
        own_(call.workspace + places_.member + rank * places_.member_bytes),
        esize_(element_bytes(call.dtype)),
        past_caches_(worth_past_caches(
            call.dtype, call.output.data,
            call.output.batch_stride | call.output.head_stride | call.output.row_stride,
            call.B * call.H * call.Tq * call.V * esize_)) {}

  // Keys and values of a head into place `slot`; only the keys that count are read.
  void pack(int64_t b, int64_t g, int64_t slot) const {
    const int64_t n = call_.keys_of(b);
    keys(slot).pack_as_columns(call_.key.at(b, g, 0), call_.dtype, call_.key.row_stride, n,
                               call_.D);
    values(slot).pack_as_rows(call_.value.at(b, g, 0), call_.dtype, call_.value.row_stride, n,
                              call_.V);
  }

  // The key head that this member takes after `unit`; none: -1.
  void foresee(int64_t unit, int64_t next) {
    const int64_t group = call_.H / call_.G;
    ahead_.start(next < 0 ? 0 : call_.queries_of(unit / call_.G) * group);
    if (next < 0) return;
    const int64_t b = next / call_.G, g = next % call_.G, n = call_.keys_of(b);
    ahead_.add(call_.key, b, g, n, call_.D * esize_);
    ahead_.add(call_.value, b, g, n, call_.V * esize_);
    ahead_.add(call_.query, b, g * group, call_.queries_of(b), call_.D * esize_);
  }

  // The one query of each of a unit's heads: row h of scores is the query of head first + h.
  void run_heads(int64_t b, int64_t first) {
    with_head_vectors(call_.D, [&](auto vectors) {
      constexpr int NV = decltype(vectors)::value, kHeads = heads_together(NV);
      const int64_t n = keys_seen({b, first, 0, 1, 1}), stride = places_.scores_row / 4;
      float* const q = reinterpret_cast<float*>(own_ + places_.q);
      for (int h = 0; h < kHeads; ++h) {
        float_row(call_.query.at(b, first + h, 0), call_.dtype, call_.D, q + h * call_.D);
      }
      head_scores<format, NV>(q, call_.D, {call_.key.at(b, first, 0), call_.key.row_stride}, n,
                              scores(0), stride);
      for (int h = 0; h < kHeads; ++h) {
        finish_row({b, first + h, -h, 1, 1}, h, n, InPlace{scores(h)});
      }
      weigh_heads<format, NV>(scores(0), stride,
                              {call_.value.at(b, first, 0), call_.value.row_stride}, n,
                              [&](int h, int v, Float sum) { put(h, v * kLanes, sum, kLanes); });
    });
  }

  void run(const QueryTile& t, int64_t slot) { call_.packed ? run_packed(t, slot) : run_direct(t); }

 private:
  PackedRows<format> keys(int64_t slot) const {
    return {call_.workspace + slot * places_.head_bytes, call_.D, call_.S};
  }
  PackedRows<format> values(int64_t slot) const {
    return {call_.workspace + slot * places_.head_bytes + places_.head_keys,
            round_up(call_.S, kPanel), call_.V};
  }

  // A tile's queries for the product: staged, or as they lie where they are rows of one head that
  // the product reads to their end and no further. Rows that are 4 KB apart would all
  // meet in one set of L1.
  RowsView queries(const QueryTile& t) const {
    const char* const first = row_of(call_.query, t, 0);
    const int64_t stride = call_.query.row_stride;
    const bool words =
        (reinterpret_cast<uintptr_t>(first) | static_cast<uint64_t>(stride)) % 4 == 0;
    const bool whole = format == Format::kFloat32 ||
                       (format == Format::kBfloat16 && call_.D % (2 * kLanes) == 0 && words);
    if (whole && call_.dtype == format && stride <= kNearRow &&
        t.first / t.queries == (t.first + t.rows - 1) / t.queries) {
      return {first, stride};
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      stage_row<format>(row_of(call_.query, t, r), call_.dtype, call_.D,
                        own_ + places_.q + r * places_.q_row);
    }
    return {own_ + places_.q, places_.q_row};
  }

  void run_packed(const QueryTile& t, int64_t slot) {
    const int64_t n = keys_seen(t);
    keys(slot).multiply_into(queries(t), t.rows, call_.D, n, scores(0), places_.scores_row / 4);
    RowsView weights{reinterpret_cast<const char*>(scores(0)), places_.scores_row};
    if constexpr (kStaged<format>) weights = {own_ + places_.p, places_.p_row};
    for (int64_t r = 0; r < t.rows; ++r) {
      char* const staged = own_ + places_.p + r * places_.p_row;
      if (kStaged<format> && !drops() && !call_.weights) {
        finish_row(t, r, n, [&](int64_t s, Float e) __attribute__((always_inline)) {
          stage_vector<format>(staged_at<format>(staged, s), e);
        });
      } else {
        finish_row(t, r, n, InPlace{scores(r)});
        if (kStaged<format>) {
          stage_row<format>(reinterpret_cast<const char*>(scores(r)), Format::kFloat32, n, staged);
        }
      }
    }
    values(slot).multiply(weights, t.rows, n,
                          [&](int64_t p, int64_t row, int count, const float* tile) {
                            const int64_t column = p * kPanel;
                            const bool whole = column + kPanel <= call_.V;
                            for (int64_t r = row; r < row + count; ++r, tile += kPanel) {
                              if (whole) {
                                put_pair(r, column, load(tile), load(tile + kLanes));
                                continue;
                              }
                              for (int v = 0; v < kVectors && column + v * kLanes < call_.V; ++v) {
                                const int64_t c = column + v * kLanes;
                                put(r, c, load(tile + v * kLanes), lanes_left(c, call_.V));
                              }
                            }
                          });
  }

  void run_direct(const QueryTile& t) {
    const int64_t n = keys_seen(t), stride = places_.q_row / 4, size = round_up(call_.D, kLanes);
    float* const q = reinterpret_cast<float*>(own_ + places_.q);
    float* const k = reinterpret_cast<float*>(own_ + places_.keys);
    const int64_t whole = round_up(t.rows, kTileQueries);
    for (int64_t r = 0; r < whole; ++r)
      float_row(r < t.rows ? row_of(call_.query, t, r) : nullptr, call_.dtype, call_.D,
                q + r * stride);
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
    for (int64_t r = 0; r < t.rows; ++r) finish_row(t, r, n, InPlace{scores(r)});
    const auto run = [&](auto constant) {
      weigh<decltype(constant)::value>(
          t.rows, scores(0), places_.scores_row / 4, 1, n, call_.value.at(t.b, t.g, 0),
          call_.value.row_stride, call_.V,
          [&](int64_t r, int64_t column, Float sum, int lanes) { put(r, column, sum, lanes); });
    };
    with_dtype(call_.dtype, run);
  }

  float* scores(int64_t row) const {
    return reinterpret_cast<float*>(own_ + places_.scores + row * places_.scores_row);
  }
  float* inverse() const { return reinterpret_cast<float*>(own_ + places_.inverse); }
  char** output() const { return reinterpret_cast<char**>(own_ + places_.output); }

  void put(int64_t r, int64_t column, Float sum, int lanes) const {
    store_as(call_.dtype, output()[r] + column * esize_, mul(sum, set1(inverse()[r])), lanes);
  }

  void put_pair(int64_t r, int64_t column, Float first, Float second) const {
    const Float by = set1(inverse()[r]);
    char* const to = output()[r] + column * esize_;
    store_pair_as(call_.dtype, to, mul(first, by), mul(second, by), past_caches_);
  }

  // Scores become weights but for a factor, which inverse() receives; the weights are shown.
  template <class Put>
  void finish_row(const QueryTile& t, int64_t r, int64_t n, const Put& weights) {
    ahead_.ask();
    const QueryRow at = row_at(t, r);
    float* const row = scores(r);
    output()[r] = call_.output.at(t.b, at.head, at.query);
    inverse()[r] = soften(t, at, row, n, weights);
    if (drops()) drop(t, at, row, n);
    if (call_.weights) show(row, n, inverse()[r], at, call_.weights + weights_row(t, at));
  }

  void show(const float* row, int64_t n, float factor, QueryRow at, float* to) const {
    if (!call_.average || at.head == 0) {
      const float by = call_.average ? factor / static_cast<float>(call_.H) : factor;
      const int64_t vectors = n / kLanes * kLanes;
      scale_row(row, vectors, by, to);
      for (int64_t s = vectors; s < n; ++s) to[s] = row[s] * by;
      std::memset(to + n, 0, static_cast<size_t>((call_.S - n) * 4));
      return;
    }
    const Float by = set1(factor / static_cast<float>(call_.H));  // heads follow one another
    for (int64_t s = 0; s < n; s += kLanes) {
      const int lanes = lanes_left(s, n);
      const Float sum = fma(by, load(row + s), load_as(Format::kFloat32, at_float(to + s), lanes));
      store_as(Format::kFloat32, at_float(to + s), sum, lanes);
    }
  }
  static char* at_float(float* p) { return reinterpret_cast<char*>(p); }

  const Attention& call_;
  const AttentionPlaces places_;
  char* const own_;
  const int esize_;
  const bool past_caches_;
  RowsAhead ahead_;
};

// Units of a sentence: some rows of a key head's group of query heads, or, where the weights'
// mean over heads is wanted, some queries, all heads of which one member takes in turn.
template <Format format>
inline void run_unit(const Attention& f, AttentionRun<format>& own, int64_t pair, int64_t i,
                     int64_t slot) {
  const int64_t b = pair / f.G, queries = f.queries_of(b), group = f.H / f.G;
  const int64_t rows = f.average ? queries : queries * group;
  const int64_t tiles = (rows + f.query_rows - 1) / f.query_rows;
  if (i >= tiles) return;  // a shorter sentence
  const int64_t first = rows * i / tiles, count = rows * (i + 1) / tiles - first;
  if (!f.average) return own.run({b, pair % f.G, first, count, queries}, slot);
  for (int64_t h = 0; h < f.H; ++h) {
    own.run({b, h / group, h % group * queries + first, count, queries}, slot + h / group);
  }
}

// All of it, by the members of a team. Heads are packed some at a time, in rounds.
template <Format format>
inline void run_attention(const Attention& f) {
  const int64_t heads = f.B * f.G;
  const int64_t rows = f.average ? f.Tq : f.Tq * (f.H / f.G);
  const int64_t tiles = (rows + f.query_rows - 1) / f.query_rows;
  const int64_t rounds = (heads + f.round_heads - 1) / f.round_heads;
  const int64_t step = f.average ? f.G : 1;  // pairs that a unit takes
  const int64_t together = heads_of_unit(f);
  Units packing, work;
  Barrier barrier;
  auto body = [&](int rank, int size) {
    AttentionRun<format> own(f, rank);
    if (together > 1) {
      const int64_t units = f.H / together;
      for (int64_t u = work.take(f.B * units); u >= 0; u = work.take(f.B * units)) {
        own.run_heads(u / units, u % units * together);
      }
      return;
    }
    if (f.apart) {  // what is packed stays in the member's own caches
      const int64_t units = heads / step, slot = rank * step;
      for (int64_t u = work.take(units), next; u >= 0; u = next) {
        next = work.take(units);
        if (step == 1) own.foresee(u, next);
        for (int64_t i = 0; i < step; ++i) {
          own.pack((u * step + i) / f.G, (u * step + i) % f.G, slot + i);
        }
        for (int64_t i = 0; i < tiles; ++i) run_unit(f, own, u * step, i, slot);
      }
      return;
    }
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
      const int64_t units = count / step * tiles;
      for (int64_t u = work.take(units); u >= 0; u = work.take(units)) {
        const int64_t slot = u / tiles * step;
        run_unit(f, own, begin + slot, u % tiles, slot);
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
