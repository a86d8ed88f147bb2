// One step of a Transformer decoder, from tokens to scores: the whole stack inside one team.
//
// Members own columns of products, then rows (norms, staging), then heads of rows (attention), with
// a barrier between. What stores a product's results has its pointers by value: a store might
// change others, for all that the compiler knows. Keys and values of earlier positions stay where
// the step that made them wrote them; a row finds its own through `ancestors`, so that reordering
// beams moves none of them.
#pragma once

#include "generation/transformer_memory.h"

namespace encdec::generation {
namespace ENCDEC_ISA_NAMESPACE {

struct TransformerPlaces {
  int64_t x, q, a, f;  // rows of floats: the stream, queries, attention's results, feed-forward
  int64_t staged, scales, scans;
  int64_t member;  // of each: a query's heads, scores, pointers to keys, groups
  int64_t query, scores, keys, groups, member_bytes;
  int64_t staged_stride, score_stride;
  int64_t bytes;
};

constexpr int64_t kTile = kLanes;  // keys that a tile of sums may ask for

inline TransformerPlaces transformer_places(const TransformerStep& s) {
  TransformerPlaces p{};
  Layout all, member;
  const int64_t width = s.heads * s.head_size;
  const int64_t largest = std::max(std::max(s.D, s.F), width);
  p.x = all.take(s.rows * row_floats(s.D) * 4);
  p.q = all.take(s.rows * row_floats(width) * 4);
  p.a = all.take(s.rows * row_floats(width) * 4);
  p.f = all.take(s.rows * row_floats(std::max(s.D, s.F)) * 4);
  p.staged_stride = staged_row_bytes(s.format, largest);
  p.staged = all.take(s.rows * p.staged_stride);
  p.scales = all.take(s.rows * 4);
  p.scans = all.take(s.threads * score_bytes(s.rows));
  p.member = all.end();
  const int64_t keys = std::max(round_up(s.position + 1, kTile), panels_of(s.S) * kPanel);
  p.score_stride = row_floats(keys);
  p.query = member.take(s.rows * row_floats(s.head_size) * 4);
  p.scores = member.take(s.rows * p.score_stride * 4);
  p.keys = member.take(round_up(s.position + 1, kTile) * 8);
  p.groups = member.take((s.rows + 1) * 4);
  p.member_bytes = member.end();
  p.bytes = p.member + s.threads * p.member_bytes;
  return p;
}

template <Format format>
class TransformerRun {
  static constexpr Format kKept = kept_format(format);
  static constexpr int64_t kKeptBytes = element_bytes(kKept);

 public:
  TransformerRun(const TransformerStep& step, Barrier& barrier, int rank, int members)
      : s_(step),
        team_(barrier, rank, members),
        places_(transformer_places(step)),
        width_(step.heads * step.head_size),
        whole_heads_(step.head_size % kLanes == 0),
        x_(rows_at(places_.x, step.D)),
        q_(rows_at(places_.q, width_)),
        a_(rows_at(places_.a, width_)),
        f_(rows_at(places_.f, std::max(step.D, step.F))),
        staged_{step.workspace + places_.staged, places_.staged_stride,
                reinterpret_cast<float*>(step.workspace + places_.scales)},
        own_(step.workspace + places_.member + rank * places_.member_bytes) {}

  void run() {
    find_groups();
    team_.each(s_.rows, [&](int64_t r) { embed(r); });
    for (int64_t l = 0; l < s_.layer_count; ++l) layer(l);
    team_.each(s_.rows, [&](int64_t r) {
      normalise(s_.final_norm, x_.at(r), s_.D, x_.at(r));
      if (s_.output_scale != 1.0f) {
        for (int64_t c = 0; c < s_.D; c += kLanes) {
          store(x_.at(r) + c, mul(load(x_.at(r) + c), set1(s_.output_scale)));
        }
      }
      team_.stage(x_.at(r), s_.D, staged_, r);
    });
    team_.wait();
    team_.score(s_.output, staged_, s_.rows, s_.scores, s_.workspace + places_.scans,
                [](const Panels&, const auto&) {});
  }

 private:
  FloatRows rows_at(int64_t place, int64_t size) const {
    return {reinterpret_cast<float*>(s_.workspace + place), row_floats(size)};
  }
  template <class T>
  T* own(int64_t place) const {
    return reinterpret_cast<T*>(own_ + place);
  }

  void embed(int64_t r) const {
    float* const x = x_.at(r);
    copy_row(s_.embedding, s_.tokens[r], s_.D, s_.embedding_scale, x);
    if (s_.positions.data) {
      float* const place = f_.at(r);
      copy_row(s_.positions, s_.position + s_.position_offset, s_.D, 1.0f, place);
      for (int64_t c = 0; c < s_.D; c += kLanes) store(x + c, add(load(x + c), load(place + c)));
    }
    normalise(s_.embedding_norm, x, s_.D, x);
  }

  void layer(int64_t l) const {
    const TransformerLayer& w = s_.layers[l];
    before(w.self_norm);
    project_self(w, l);
    team_.wait();
    int64_t found = -1;
    team_.each(s_.rows * s_.heads, [&](int64_t u) {
      const int64_t r = u / s_.heads;
      if (r != found) find_keys(l, r);
      found = r;
      if (whole_heads_) {
        attend_self<true>(r, u % s_.heads);
      } else {
        attend_self<false>(r, u % s_.heads);
      }
    });
    add_product(w.self_out, a_, width_);
    between(w.self_norm, w.cross_norm);
    team_.multiply(w.cross_query, staged_, s_.rows,
                   [q = q_](int64_t r, int64_t c, Float y, int lanes)
                       __attribute__((always_inline)) { store_lanes(q.at(r) + c, y, lanes); });
    team_.wait();
    attend_memory(w, l + 1 == s_.layer_count);
    add_product(w.cross_out, a_, width_);
    between(w.cross_norm, w.feed_norm);
    feed_forward(w);
    add_product(w.down, f_, s_.F);
    if (!s_.norm_first) {
      team_.each(s_.rows, [&](int64_t r) { normalise(w.feed_norm, x_.at(r), s_.D, x_.at(r)); });
    }
  }

  // Stages the stream for the products of a block, norm(x) where the norm comes first.
  void before(const NormWeights& norm) const {
    team_.each(s_.rows, [&](int64_t r) {
      const float* row = x_.at(r);
      if (s_.norm_first) {
        normalise(norm, row, s_.D, f_.at(r));
        row = f_.at(r);
      }
      team_.stage(row, s_.D, staged_, r);
    });
    team_.wait();
  }

  // From one block to the next: the norm that ends the one, or that begins the other.
  void between(const NormWeights& last, const NormWeights& next) const {
    if (!s_.norm_first) {
      team_.each(s_.rows, [&](int64_t r) { normalise(last, x_.at(r), s_.D, x_.at(r)); });
    }
    before(next);
  }

  // x += from W' + b. Comes after work that other members read, and leaves x complete.
  void add_product(const Projection& p, const FloatRows& from, int64_t size) const {
    team_.wait();
    team_.each(s_.rows, [&](int64_t r) { team_.stage(from.at(r), size, staged_, r); });
    team_.wait();
    team_.multiply(p, staged_, s_.rows,
                   [rows = x_](int64_t r, int64_t c, Float y, int lanes)
                       __attribute__((always_inline)) {
                         float* const x = rows.at(r) + c;
                         store_lanes(x, add(load(x), y), lanes);
                       });
    team_.wait();
  }

  char* cached(int64_t position, int64_t l, int part, int64_t row) const {
    return s_.cache[position] + ((l * 2 + part) * s_.cache_rows + row) * width_ * kKeptBytes;
  }

  void project_self(const TransformerLayer& w, int64_t l) const {
    const auto put = [&](int part) {
      char* const to = cached(s_.position, l, part, 0);
      return [to, row_bytes = width_ * kKeptBytes](int64_t r, int64_t c, Float y, int lanes)
                 __attribute__((always_inline)) {
                   store_as(kKept, to + r * row_bytes + c * kKeptBytes, y, lanes);
                 };
    };
    team_.multiply(w.self_query, staged_, s_.rows,
                   [q = q_](int64_t r, int64_t c, Float y, int lanes)
                       __attribute__((always_inline)) { store_lanes(q.at(r) + c, y, lanes); });
    team_.multiply(w.self_key, staged_, s_.rows, put(0));
    team_.multiply(w.self_value, staged_, s_.rows, put(1));
  }

  // Row r's query of a head, scaled, with zeros up to whole vectors: as floats, or staged.
  ENCDEC_INLINE Float query_vector(int64_t r, int64_t head, int64_t c) const {
    const Float q = load_lanes(q_.at(r) + head * s_.head_size + c, lanes_left(c, s_.head_size));
    return mul(q, set1(s_.attention_scale));
  }
  void copy_query(int64_t r, int64_t head, float* to) const {
    for (int64_t c = 0; c < s_.head_size; c += kLanes) store(to + c, query_vector(r, head, c));
  }
  void stage_query(int64_t r, int64_t head, char* to) const {
    for (int64_t c = 0; c < s_.head_size; c += kLanes) {
      stage_vector<kKept>(staged_at<kKept>(to, c), query_vector(r, head, c));
    }
  }

  // A head's vector at a; the last one may be short where heads are not `whole` vectors.
  template <bool whole>
  ENCDEC_INLINE Float head_vector(const char* head, int64_t a) const {
    return load_as(kKept, head + a * kKeptBytes, whole ? kLanes : lanes_left(a, s_.head_size));
  }

  static ENCDEC_INLINE Float dot(Float sum, Float q, Float k, int64_t) { return fma(q, k, sum); }

  // Where row r's keys of a layer lie, and as far behind them its values.
  void find_keys(int64_t l, int64_t r) const {
    const int64_t n = s_.position + 1;
    const char** const keys = own<const char*>(places_.keys);
    const int32_t* const ancestors = s_.ancestors + r * s_.ancestor_stride;
    for (int64_t t = 0; t < n; ++t) keys[t] = cached(t, l, 0, t + 1 == n ? r : ancestors[t]);
    for (int64_t t = n; t < round_up(n, kTile); ++t) keys[t] = keys[0];
  }
  int64_t to_values() const { return s_.cache_rows * width_ * kKeptBytes; }

  template <bool whole>
  void attend_self(int64_t r, int64_t head) const {
    const int64_t n = s_.position + 1, size = s_.head_size, at = head * size * kKeptBytes;
    const char* const* const keys = own<const char*>(places_.keys);
    if (head + 1 < s_.heads) {  // too short a piece of each row for the hardware to foresee
      for (int64_t t = 0; t < n; ++t) {
        const char* const next = keys[t] + at + size * kKeptBytes;
        for (int64_t i = 0; i < size * kKeptBytes; i += 64) {
          _mm_prefetch(next + i, _MM_HINT_T0);
          _mm_prefetch(next + to_values() + i, _MM_HINT_T0);
        }
      }
    }
    float* const query = own<float>(places_.query);
    float* const scores = own<float>(places_.scores);
    copy_query(r, head, query);
    all_sums(
        query, 0, 1, n, round_up(size, kLanes), scores, 0,
        [&](int64_t j, int64_t a)
            __attribute__((always_inline)) { return head_vector<whole>(keys[j] + at, a); },
        [](Float sum, Float q, Float k, int64_t a)
            __attribute__((always_inline)) { return dot(sum, q, k, a); });
    if (s_.position_bias) {
      const float* const bias = s_.position_bias + head * s_.bias_length;
      for (int64_t t = 0; t < n; ++t) scores[t] += bias[s_.position - t];
    }
    softmax_row(scores, n, 1.0f);
    float* const to = a_.at(r) + head * size;
    int64_t c = 0;
    for (; whole && c + 4 * kLanes <= size; c += 4 * kLanes)
      sum_values<4, whole>(n, at + to_values(), c, to);
    for (; c < size; c += kLanes) sum_values<1, whole>(n, at + to_values(), c, to);
  }

  // NV vectors of the sum of a head's values, which begin `from` bytes behind a row's keys, with
  // the weights in `scores`: from column c on.
  template <int NV, bool whole>
  void sum_values(int64_t n, int64_t from, int64_t c, float* to) const {
    const float* const scores = own<float>(places_.scores);
    const char* const* const keys = own<const char*>(places_.keys);
    Float sums[2][NV];  // two runs hide the latency of the multiply-add
    for (int v = 0; v < NV; ++v) sums[0][v] = sums[1][v] = zero();
    const auto add_one = [&](int64_t t, int run) __attribute__((always_inline)) {
      const Float weight = set1(scores[t]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const Float x = head_vector<whole>(keys[t] + from, c + v * kLanes);
        sums[run][v] = fma(weight, x, sums[run][v]);
      }
    };
    int64_t t = 0;
    for (; t + 2 <= n; t += 2) {
      add_one(t, 0);
      add_one(t + 1, 1);
    }
    if (t < n) add_one(t, 0);
    for (int v = 0; v < NV; ++v) {
      const int64_t at = c + v * kLanes;
      store_lanes(to + at, add(sums[0][v], sums[1][v]), lanes_left(at, s_.head_size));
    }
  }

  // Rows of one sentence lie one behind the other and share its memory: a group.
  void find_groups() {
    int32_t* const starts = own<int32_t>(places_.groups);
    groups_ = 0;
    for (int64_t r = 0; r < s_.rows; ++r) {
      if (r == 0 || s_.sentences[r] != s_.sentences[r - 1]) {
        starts[groups_++] = static_cast<int32_t>(r);
      }
    }
    starts[groups_] = static_cast<int32_t>(s_.rows);
  }

  void attend_memory(const TransformerLayer& w, bool last) const {
    const int32_t* const starts = own<int32_t>(places_.groups);
    float* const weights = last ? s_.scores.attention : nullptr;
    const int64_t heads = weights ? 1 : s_.heads;  // who sums weights has all heads of a row
    team_.each(groups_ * heads, [&](int64_t u) {
      const int64_t first = starts[u / heads], rows = starts[u / heads + 1] - first;
      if (weights) std::memset(weights + first * s_.S, 0, static_cast<size_t>(rows * s_.S * 4));
      const int64_t head = u % heads, end = weights ? s_.heads : head + 1;
      for (int64_t h = head; h < end; ++h) {
        attend_group(w, first, rows, h, weights);
      }
    });
  }

  void attend_group(const TransformerLayer& w, int64_t first, int64_t rows, int64_t head,
                    float* weights) const {
    const int64_t sentence = s_.sentences[first], size = s_.head_size;
    const int64_t n = s_.memory_lengths[sentence], which = sentence * s_.heads + head;
    if (n == 0) {  // nothing to attend to
      for (int64_t r = first; r < first + rows; ++r) {
        std::memset(a_.at(r) + head * size, 0, static_cast<size_t>(size * 4));
      }
      return;
    }
    PackedView keys;
    keys.data = w.memory_keys + which * head_keys_bytes(kKept, size, s_.S);
    keys.groups = round_up(size, group_size(kKept)) / group_size(kKept);
    keys.panel_bytes = packed_panel_bytes(kKept, size, kVectors);
    char* const query = own<char>(places_.query);
    float* const scores = own<float>(places_.scores);
    const int64_t stride = staged_row_bytes(kKept, size);
    for (int64_t r = 0; r < rows; ++r) stage_query(first + r, head, query + r * stride);
    const RowTiles tiles(rows, kKept, kVectors);
    for (int64_t p = 0; p < panels_of(n); ++p) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i);
        multiply_rows<kKept, kVectors>(
            static_cast<int>(tiles.begin(i + 1) - row), keys, p, {query + row * stride, stride},
            scores + row * places_.score_stride + p * kPanel, places_.score_stride);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = scores + r * places_.score_stride;
      softmax_row(row, n, 1.0f);
      if (!weights) continue;
      float* const to = weights + (first + r) * s_.S;
      for (int64_t t = 0; t < n; ++t) to[t] += row[t] / static_cast<float>(s_.heads);
    }
    const int64_t value_bytes = size * kKeptBytes;
    weigh<kKept>(rows, scores, places_.score_stride, 1, n,
                 w.memory_values + which * s_.S * value_bytes, value_bytes, size,
                 [&](int64_t r, int64_t c, Float sum, int lanes) {
                   store_lanes(a_.at(first + r) + head * size + c, sum, lanes);
                 });
  }

  void feed_forward(const TransformerLayer& w) const {
    const bool gated = w.gate.N > 0;
    const Activation activation = s_.activation;
    if (gated) {
      team_.multiply(w.gate, staged_, s_.rows,
                     [f = f_, activation](int64_t r, int64_t c, Float y, int lanes)
                         __attribute__((always_inline)) {
                           store_lanes(f.at(r) + c, activated(activation, y), lanes);
                         });
    }
    team_.multiply(w.up, staged_, s_.rows,
                   [f = f_, activation, gated](int64_t r, int64_t c, Float y, int lanes)
                       __attribute__((always_inline)) {
                         float* const to = f.at(r) + c;
                         const Float z = gated ? mul(load(to), y) : activated(activation, y);
                         store_lanes(to, z, lanes);
                       });
  }

  const TransformerStep& s_;
  const StepTeam<format> team_;
  const TransformerPlaces places_;
  const int64_t width_;
  const bool whole_heads_;
  const FloatRows x_, q_, a_, f_;
  const StagedRows staged_;
  char* const own_;
  int64_t groups_ = 0;
};

template <Format format>
inline void run_transformer_step(const TransformerStep& s) {
  Barrier barrier;
  auto body = [&](int rank, int size) { TransformerRun<format>(s, barrier, rank, size).run(); };
  run_team(s.threads, body);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::generation
