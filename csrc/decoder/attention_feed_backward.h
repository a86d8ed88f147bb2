// The gradients of what attention_feed.h does, before each step of the recurrent kernels' backward:
// from the context's to the query's, and through W_q to the state's. With g the gradients of the
// scores and r as in attention/additive_factors.h:
//
//     g = w (dW - sum(w dW)),    dW = d_context values' + grad_weights
//     d_query = 4 v sum_s g (r - r^2)  or  scale g keys,    dh += d_query W_q
//
// The gradients of W_q, keys, values and v are sums over all steps: W_q's is one product at the
// end, and the others are those of attention over the whole sequence, whose gradients of the
// contexts are left in grad_context.
#pragma once

#include "core/team.h"
#include "core/weight_grad.h"
#include "decoder/memory_rows.h"
#include "rnn/rnn_weights.h"

namespace encdec::decoder {
namespace ENCDEC_ISA_NAMESPACE {

using attention::ENCDEC_ISA_NAMESPACE::all_sums;
using rnn::Cell;
using Plain = rnn::ENCDEC_ISA_NAMESPACE::PlainBlocking;
static_assert(Plain::kVectors == kVectors, "the recurrent kernels pack for this product");

struct FeedBackwardPlaces {
  MemoryPlaces memory;
  int64_t values, value_stride;  // float [B][padded S][stride]
  int64_t feed_weight;           // packed, k over the gates
  int64_t fed_grads, fed_row;    // float [B][row]: of what was fed into the step after
  int64_t fed_rows, fed_sums;    // pointers to f_{t-1}; float (gates H, M)
  int64_t query_weight;          // packed W_q, k over A
  int64_t d_query, d_query_row;  // staged rows [T][B]
  int64_t rows, products, sums;  // W_q's gradient: pointers to h_t, WeightGrad's, float (A, H)
  int64_t member;                // of each: a context's gradient, a query's factors, g, 2k
  int64_t d_context, factors, grads, keys, member_bytes;
  int64_t bytes;
};

template <Cell cell, Format format>
inline FeedBackwardPlaces feed_backward_places(const Backward& f) {
  FeedBackwardPlaces p{};
  Layout all, member;
  const Memory& m = f.memory;
  const rnn::Shape& s = f.rnn.shape;
  p.memory = memory_places(m, s.B, all);
  p.value_stride = row_floats(m.M);
  p.values = all.take(s.B * p.memory.padded * p.value_stride * 4);
  p.d_query_row = staged_row_bytes(format, m.A);
  const int64_t gates = rnn::gate_count(cell);
  const int64_t padded = round_up(s.H, Plain::kUnits);
  p.feed_weight =
      all.take(Plain::blocks(m.M) * packed_panel_bytes(format, gates * padded, kVectors));
  p.fed_row = round_up(m.M, kPanel);
  p.fed_grads = all.take(s.B * p.fed_row * 4);
  p.fed_rows = all.take(f.rnn.chunk_rows * static_cast<int64_t>(sizeof(char*)));
  p.fed_sums = all.take(f.rnn.dtype == Format::kFloat32 ? 0 : gates * s.H * m.M * 4);
  if (m.query_weight) {
    p.query_weight = all.take(panels_of(s.H) * packed_panel_bytes(format, m.A, kVectors));
    p.d_query = all.take(s.T * s.B * p.d_query_row);
    p.rows = all.take(s.T * s.B * static_cast<int64_t>(sizeof(char*)));
    p.products = all.take(WeightGrad<format>::bytes(s.T * s.B, s.H, p.d_query_row, f.rnn.threads));
    p.sums = all.take(f.rnn.dtype == Format::kFloat32 ? 0 : m.A * s.H * 4);
  }
  p.member = all.end();
  p.d_context = member.take(kTileQueries * p.value_stride * 4);
  p.factors = member.take(p.memory.stride * 4);
  p.grads = member.take(row_floats(p.memory.padded) * 4);
  p.keys = member.take(kKeyBlock * p.memory.stride * 4);
  p.member_bytes = member.end();
  p.bytes = p.member + f.rnn.threads * p.member_bytes;
  return p;
}

template <Cell cell, Format format>
class AttentionFeedBackward {
 public:
  static constexpr bool kActive = true;

  AttentionFeedBackward(const Backward& call, Barrier& barrier, int rank, int members)
      : call_(call),
        m_(call.memory),
        s_(call.rnn.shape),
        dtype_(call.rnn.dtype),
        esize_(element_bytes(call.rnn.dtype)),
        barrier_(barrier),
        rank_(rank),
        members_(members),
        places_(feed_backward_places<cell, format>(call)),
        memory_(m_, dtype_, call.workspace, places_.memory),
        own_(call.workspace + places_.member + rank * places_.member_bytes) {}

  // What was fed's columns of W_ih, packed with k over the gates.
  char* packed() const { return call_.workspace + places_.feed_weight; }

  // pack(matrix, row stride, columns) packs this member's part of a matrix there.
  template <class Pack>
  void prepare(const Pack& pack) {
    pack(m_.feed_weight, m_.feed_stride, m_.M);
    std::memset(own_, 0, static_cast<size_t>(places_.member_bytes));
    const int64_t padded = places_.memory.padded;
    for (int64_t b = part(s_.B, rank_); b < part(s_.B, rank_ + 1); ++b) {
      memory_.prepare(b);
      std::memset(fed_grads(b), 0, static_cast<size_t>(places_.fed_row * 4));
      for (int64_t s = 0; s < padded; ++s) {
        float_row(s < m_.keys_of(b) ? m_.values.at(b, s) : nullptr, dtype_, m_.M, value(b, s));
      }
    }
    if (!m_.query_weight) return;
    const int64_t panels = panels_of(s_.H);
    pack_rows<format, kVectors>(m_.query_weight, dtype_, m_.query_stride, m_.A, s_.H,
                                part(panels, rank_), part(panels, rank_ + 1),
                                call_.workspace + places_.query_weight,
                                packed_panel_bytes(format, m_.A, kVectors));
  }

  // state_grads: the gradients of [h_t; f_t] by the steps after t, a row for each sentence. Those
  // of f_t go over into those of h_t.
  void before_step(int64_t t, float* state_grads, int64_t stride) {
    for (int64_t b = part(s_.B, rank_); b < part(s_.B, rank_ + 1); ++b) {
      sentence(t, b, state_grads + b * stride);
    }
    if (!m_.query_weight) return;
    barrier_.wait(members_);
    constexpr int kRows = tile_room(format, kVectors);
    alignas(64) float tile[kRows * kPanel];
    PackedView w;
    w.data = call_.workspace + places_.query_weight;
    w.groups = round_up(m_.A, group_size(format)) / group_size(format);
    w.panel_bytes = packed_panel_bytes(format, m_.A, kVectors);
    const RowTiles tiles(s_.B, tile_rows(format, kVectors));
    for (int64_t p = part(panels_of(s_.H), rank_); p < part(panels_of(s_.H), rank_ + 1); ++p) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i), end = tiles.begin(i + 1);
        multiply_rows<format, kVectors>(static_cast<int>(end - row), w, p,
                                        {d_query(t, row), places_.d_query_row}, tile, kPanel);
        for (int64_t b = row; b < end; ++b) {
          for (int v = 0; v < kVectors && p * kPanel + v * kLanes < s_.H; ++v) {
            const int64_t h = p * kPanel + v * kLanes;
            const Float sum = load(tile + (b - row) * kPanel + v * kLanes);
            float* const to = state_grads + b * stride + h;
            store(to, add(load(to), first_lanes(sum, lanes_left(h, s_.H))));
          }
        }
      }
    }
  }

  // The gradients of f_{t-1} from those of step t's gates.
  void after_step(const PackedView& w, RowsView gate_grads) {
    const RowTiles tiles(s_.B, tile_rows(format, kVectors));
    for (int64_t p = part(panels_of(m_.M), rank_); p < part(panels_of(m_.M), rank_ + 1); ++p) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i);
        multiply_rows<format, kVectors>(static_cast<int>(tiles.begin(i + 1) - row), w, p,
                                        gate_grads.from(row), fed_grads(row) + p * kPanel,
                                        places_.fed_row);
      }
    }
  }

  // The gradient of what was fed's columns of W_ih, of the chunk of `rows` rows from step `begin`
  // on. add(rows, width, sums) adds their product with the gates' gradients.
  template <class Add>
  void add_weight_gradient(int64_t begin, int64_t rows, bool last, const Add& add) {
    const char** const fed = reinterpret_cast<const char**>(call_.workspace + places_.fed_rows);
    for (int64_t i = part(rows, rank_); i < part(rows, rank_ + 1); ++i) {
      const int64_t t = begin + i / s_.B, b = i % s_.B;
      fed[i] = t > 0 ? output(t - 1, b) + s_.H * esize_ : m_.context0 + b * m_.M * esize_;
    }
    barrier_.wait(members_);
    const bool sums = dtype_ != Format::kFloat32;
    float* const target = reinterpret_cast<float*>(sums ? call_.workspace + places_.fed_sums
                                                        : call_.grad_feed_weight);
    add(fed, m_.M, target);
    if (last && sums)
      round_sums(target, rnn::gate_count(cell) * s_.H, m_.M, call_.grad_feed_weight);
  }

  // The first context's gradient, and W_q's; all members call it.
  void finish() {
    for (int64_t b = part(s_.B, rank_); b < part(s_.B, rank_ + 1); ++b) {
      for (int64_t c = 0; c < m_.M; c += kLanes) {
        store_as(dtype_, call_.grad_context0 + (b * m_.M + c) * esize_, load(fed_grads(b) + c),
                 lanes_left(c, m_.M));
      }
    }
    if (!m_.query_weight) return;
    const int64_t rows = s_.T * s_.B;
    const char** const h = reinterpret_cast<const char**>(call_.workspace + places_.rows);
    for (int64_t i = part(rows, rank_); i < part(rows, rank_ + 1); ++i) {
      h[i] = output(i / s_.B, i % s_.B);
    }
    barrier_.wait(members_);
    const bool sums = dtype_ != Format::kFloat32;
    const WeightGrad<format> product{dtype_,
                                     d_query(0, 0),
                                     places_.d_query_row,
                                     rows,
                                     m_.A,
                                     m_.A,
                                     call_.workspace + places_.products,
                                     rows,
                                     s_.H,
                                     !sums,
                                     rank_,
                                     members_,
                                     barrier_};
    float* const target =
        reinterpret_cast<float*>(sums ? call_.workspace + places_.sums : call_.grad_query_weight);
    product.prepare();
    product.add(h, s_.H, 0, 1, [](int gate) { return gate; }, target, true);
    if (sums) round_sums(target, m_.A, s_.H, call_.grad_query_weight);
  }

 private:
  int64_t part(int64_t n, int i) const { return n * i / members_; }
  float* mine(int64_t place) const { return reinterpret_cast<float*>(own_ + place); }
  float* value(int64_t b, int64_t s) const {
    return reinterpret_cast<float*>(call_.workspace + places_.values) +
           (b * places_.memory.padded + s) * places_.value_stride;
  }
  char* d_query(int64_t t, int64_t b) const {
    return call_.workspace + places_.d_query + (t * s_.B + b) * places_.d_query_row;
  }

  float* fed_grads(int64_t b) const {
    return reinterpret_cast<float*>(call_.workspace + places_.fed_grads) + b * places_.fed_row;
  }
  const char* output(int64_t t, int64_t b) const {
    return call_.rnn.direction[0].output.at(call_.rnn.sequences, t, b);
  }

  // This member's rows of sums into a matrix of the call's dtype.
  void round_sums(const float* sums, int64_t rows, int64_t width, char* to) const {
    for (int64_t i = part(rows, rank_); i < part(rows, rank_ + 1); ++i) {
      for (int64_t c = 0; c < width; c += kLanes) {
        const int n = lanes_left(c, width);
        const char* from = reinterpret_cast<const char*>(sums + i * width + c);
        store_as(dtype_, to + (i * width + c) * esize_, load_as(Format::kFloat32, from, n), n);
      }
    }
  }

  // The gradients of one sentence's context, scores and query.
  void sentence(int64_t t, int64_t b, float* state_grads) const {
    const int64_t n = m_.keys_of(b);
    const rnn::StepTensor& given = call_.rnn.direction[0].grad_output;
    const char* const own = given.data ? given.at(call_.rnn.sequences, t, b) : nullptr;
    float* const d_context = mine(places_.d_context);
    char* const shown = call_.grad_context + (b * s_.T + t) * m_.M * esize_;
    for (int64_t c = 0; c < m_.M; c += kLanes) {
      const int lanes = lanes_left(c, m_.M);
      Float d = load(fed_grads(b) + c);
      if (own) d = add(d, load_as(dtype_, own + (s_.H + c) * esize_, lanes));
      d = first_lanes(d, lanes);
      store(d_context + c, d);
      store_as(dtype_, shown + c * esize_, d, lanes);
    }
    float* const g = mine(places_.grads);
    if (n > 0) score_gradients(t, b, n, d_context, g);
    // The query's gradient, staged for its products, or straight into the state's.
    const auto put = [&](int64_t a, Float x, int lanes) {
      if (m_.query_weight) {
        stage_vector<format>(staged_at<format>(d_query(t, b), a), first_lanes(x, lanes));
      } else {
        float* const to = state_grads + a;
        store(to, add(load(to), first_lanes(x, lanes)));
      }
    };
    if (n == 0) {
      for (int64_t a = 0; a < m_.A; a += kLanes) put(a, zero(), lanes_left(a, m_.A));
    } else if (m_.score == Score::kDot) {
      each_vector([&](int64_t a, int64_t vectors) { dots(b, n, a, vectors, g, put); });
    } else {
      const char* query = call_.queries + (b * s_.T + t) * m_.A * esize_;
      float* const q = mine(places_.factors);
      const bool direct =
          memory_.direct(b) || !factor_row<false>(dtype_, query, m_.A, nullptr, nullptr, q);
      if (direct) factor_row<true>(dtype_, query, m_.A, nullptr, nullptr, q);
      direct ? additive<true>(b, n, q, g, put) : additive<false>(b, n, q, g, put);
    }
  }

  void score_gradients(int64_t t, int64_t b, int64_t n, const float* d_context, float* g) const {
    all_sums(d_context, places_.value_stride, 1, n, round_up(m_.M, kLanes), g, 0,
             FloatKeys{value(b, 0), places_.value_stride},
             [](Float sum, Float x, Float y, int64_t)
                 __attribute__((always_inline)) { return fma(x, y, sum); });
    const int64_t row = (b * s_.T + t) * m_.S;
    const float* const w = call_.weights + row;
    const float* const extra = call_.grad_weights ? call_.grad_weights + row : nullptr;
    float mean = 0.0f;
    for (int64_t s = 0; s < n; ++s) {
      if (extra) g[s] += extra[s];
      mean += w[s] * g[s];
    }
    for (int64_t s = 0; s < n; ++s) g[s] = w[s] * (g[s] - mean);
  }

  // Vectors of the attention size, some at a time: a line of each key row is read once.
  template <class Run>
  void each_vector(const Run& run) const {
    constexpr int64_t kTogether = 4;
    const int64_t vectors = round_up(m_.A, kLanes) / kLanes;
    for (int64_t i = 0; i < vectors; i += kTogether) {
      run(i * kLanes, vectors - i < kTogether ? vectors - i : kTogether);
    }
  }

  template <class Put>
  void dots(int64_t b, int64_t n, int64_t a, int64_t vectors, const float* g,
            const Put& put) const {
    Float sums[4] = {zero(), zero(), zero(), zero()};
    for (int64_t s = 0; s < n; ++s) {
      const float* const key = memory_.key(b, s) + a;
      const Float weight = set1(g[s]);
      for (int64_t v = 0; v < vectors; ++v) sums[v] = fma(weight, load(key + v * kLanes), sums[v]);
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = a + v * kLanes;
      put(at, mul(set1(m_.scale), sums[v]), lanes_left(at, m_.A));
    }
  }

  template <bool direct, class Put>
  void additive(int64_t b, int64_t n, const float* q, const float* g, const Put& put) const {
    const bool again = direct && !memory_.direct(b);  // the sentence's keys are factors
    const float* const v_row = memory_.v();
    each_vector([&](int64_t a, int64_t vectors) {
      Float sums[4] = {zero(), zero(), zero(), zero()}, own[4];
      for (int64_t v = 0; v < vectors; ++v) own[v] = load(q + a + v * kLanes);
      for (int64_t first = 0; first < n; first += kKeyBlock) {
        const int64_t count = n - first < kKeyBlock ? n - first : kKeyBlock;
        if (again) memory_.direct_keys(b, first, count, mine(places_.keys));
        const float* key = (again ? mine(places_.keys) : memory_.key(b, first)) + a;
        for (int64_t s = 0; s < count; ++s, key += memory_.stride()) {
          const Float weight = set1(g[first + s]);
          for (int64_t v = 0; v < vectors; ++v) {
            const Float r = reciprocal_of<direct>(own[v], load(key + v * kLanes));
            sums[v] = fma(weight, fnma(r, r, r), sums[v]);
          }
        }
      }
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = a + v * kLanes;
        put(at, mul(mul(set1(4.0f), load(v_row + at)), sums[v]), lanes_left(at, m_.A));
      }
    });
  }

  const Backward& call_;
  const Memory& m_;
  const rnn::Shape& s_;
  const Format dtype_;
  const int esize_;
  Barrier& barrier_;
  const int rank_, members_;
  const FeedBackwardPlaces places_;
  const MemoryRows memory_;
  char* const own_;
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::decoder
