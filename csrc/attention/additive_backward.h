// Backward of additive attention, in three phases with a barrier between them. With g the gradient
// of the scores and r as in additive_factors.h:
//
//   1  per sentence and tile of queries: g = w * (dW - sum(w * dW)),
//      dW = grad_context values' + grad_weights
//      per sentence and tile of keys: grad_values = w' grad_context
//   2  per sentence and chunk of A: sums over all pairs (t, s) of g and u = r - r^2
//          grad_query = 4 v sum_s g u,    grad_keys = 4 v sum_t g u,    grad_v: -2 sum g r
//      (d tanh = 4 u; the sum of g alone is zero, because softmax does not see a shift)
//   3  grad_v summed over sentences, in their order
#pragma once

#include "attention/additive_factors.h"

namespace encdec::attention {
namespace ENCDEC_ISA_NAMESPACE {

constexpr int64_t kBackwardKeys = 16;                // keys of a tile of grad_values
constexpr int64_t kChunkBytes = int64_t{512} << 10;  // of a chunk's rows: they stay in L2

struct AdditiveBackwardPlaces {
  int64_t grads;   // float [B][Tq][padded S]: g
  int64_t grad_v;  // float [B][A]
  int64_t member, member_bytes;
  int64_t rows, keys;            // phase 1: float [query rows][stride], [kLanes][stride]
  int64_t q, k, grad_q, grad_k;  // phase 2: float [Tq][chunk], [S][chunk], ...
  int64_t stride, grads_stride, chunk;
  int64_t bytes;
};

inline AdditiveBackwardPlaces additive_backward_places(const AdditiveBackward& b) {
  const AdditiveShape& s = b.forward.shape;
  AdditiveBackwardPlaces p{};
  p.stride = row_floats(s.D);
  p.grads_stride = round_up(s.S, kLanes);
  const int64_t fitting = kChunkBytes / (8 * (s.Tq + s.S)) / kLanes * kLanes;
  const int64_t whole = round_up(s.A, kLanes);
  p.chunk = fitting < kLanes ? kLanes : fitting > whole ? whole : fitting;
  int64_t at = 0;
  const auto take = [&](int64_t floats) {
    const int64_t here = at;
    at += round_up(floats * 4, 64);
    return here;
  };
  p.grads = take(s.B * s.Tq * p.grads_stride);
  p.grad_v = take(s.B * whole);
  p.member = at;
  at = 0;
  p.rows = take(round_up(b.forward.query_rows, kTileQueries) * p.stride);
  p.keys = take(kLanes * p.stride);
  const int64_t first_phase = at;
  at = 0;
  p.q = take(s.Tq * p.chunk);
  p.k = take(s.S * p.chunk);
  p.grad_q = take(s.Tq * p.chunk);
  p.grad_k = take(s.S * p.chunk);
  p.member_bytes = at > first_phase ? at : first_phase;
  p.bytes = p.member + b.forward.threads * p.member_bytes;
  return p;
}

class AdditiveBackwardRun {
 public:
  AdditiveBackwardRun(const AdditiveBackward& call, int rank)
      : call_(call),
        f_(call.forward),
        s_(f_.shape),
        places_(additive_backward_places(call)),
        work_(call.workspace),
        own_(work_ + places_.member + rank * places_.member_bytes),
        esize_(element_bytes(f_.dtype)) {}

  // Phase 1: g of queries [first, first + rows) of sentence b.
  void score_gradients(int64_t b, int64_t first, int64_t rows) {
    const int64_t n = f_.keys_of(b), stride = places_.stride, whole = round_up(s_.D, kLanes);
    if (n == 0) return;
    float* const q = mine(places_.rows);
    float* const k = mine(places_.keys);
    for (int64_t t = 0; t < round_up(rows, kTileQueries); ++t) {
      float_row(t < rows && call_.grad_context.data ? call_.grad_context.at(b, first + t) : nullptr,
                f_.dtype, s_.D, q + t * stride);
    }
    for (int64_t s = 0; call_.grad_context.data && s < n; s += kLanes) {
      const int64_t count = n - s < kLanes ? n - s : kLanes;
      for (int64_t i = 0; i < kLanes; ++i) {
        float_row(i < count ? f_.values.at(b, s + i) : nullptr, f_.dtype, s_.D, k + i * stride);
      }
      all_sums(q, stride, rows, count, whole, grads(b, first) + s, places_.grads_stride,
               FloatKeys{k, stride},
               [](Float sum, Float x, Float y, int64_t)
                   __attribute__((always_inline)) { return fma(x, y, sum); });
    }
    for (int64_t t = first; t < first + rows; ++t) softmax_gradient(b, t, n);
  }

  // Phase 1: grad_values of keys [first, first + count) of sentence b.
  void value_gradients(int64_t b, int64_t first, int64_t count) {
    const int64_t n = f_.keys_of(b);
    const int64_t real = call_.grad_context.data ? min(max(n - first, 0), count) : 0;
    for (int64_t s = first + real; s < first + count; ++s) {
      zero_row(call_.grad_values.at(b, s), s_.D, f_.dtype);
    }
    if (real == 0) return;
    const auto put = [&](int64_t s, int64_t column, Float sum, int lanes) {
      store_as(f_.dtype, call_.grad_values.at(b, first + s) + column * esize_, sum, lanes);
    };
    const auto run = [&](auto constant) {
      weigh<decltype(constant)::value>(real, weights(b, 0) + first, 1, s_.S, s_.Tq,
                                       call_.grad_context.at(b, 0), call_.grad_context.row_stride,
                                       s_.D, put);
    };
    with_dtype(f_.dtype, run);
  }

  int64_t chunks() const { return (s_.A + places_.chunk - 1) / places_.chunk; }

  // Phase 2: columns [column, column + places_.chunk) of A, of sentence b.
  void factor_gradients(int64_t b, int64_t chunk) {
    const int64_t column = chunk * places_.chunk, width = min(s_.A - column, places_.chunk);
    if (!pairs<false>(b, column, width)) pairs<true>(b, column, width);
    const int64_t n = f_.keys_of(b);
    const auto write = [&](const Rows& to, const float* sums, int64_t rows, int64_t real) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t a = 0; a < width; a += kLanes) {
          const int lanes = lanes_left(a, width);
          const Float v = load_as(f_.dtype, f_.score_weight + (column + a) * esize_, lanes);
          const Float sum = i < real ? load(sums + i * places_.chunk + a) : zero();
          store_as(f_.dtype, to.at(b, i) + (column + a) * esize_, mul(mul(set1(4.0f), v), sum),
                   lanes);
        }
      }
    };
    write(call_.grad_query, mine(places_.grad_q), s_.Tq, n > 0 ? s_.Tq : 0);
    write(call_.grad_keys, mine(places_.grad_k), s_.S, n);
  }

  // Phase 3: the part of grad_v that is this member's.
  void sum_score_weight(int rank, int members) {
    const int64_t vectors = (s_.A + kLanes - 1) / kLanes;
    for (int64_t i = vectors * rank / members; i < vectors * (rank + 1) / members; ++i) {
      Float sum = zero();
      for (int64_t b = 0; b < s_.B; ++b) sum = add(sum, load(grad_v(b) + i * kLanes));
      store_partial(call_.grad_score_weight + i * kLanes, mul(set1(-2.0f), sum),
                    lanes_left(i * kLanes, s_.A));
    }
  }

 private:
  static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
  float* mine(int64_t place) const { return reinterpret_cast<float*>(own_ + place); }
  float* grads(int64_t b, int64_t t) const {
    return reinterpret_cast<float*>(work_ + places_.grads) + (b * s_.Tq + t) * places_.grads_stride;
  }
  float* grad_v(int64_t b) const {
    return reinterpret_cast<float*>(work_ + places_.grad_v) + b * round_up(s_.A, kLanes);
  }
  const float* weights(int64_t b, int64_t t) const { return f_.weights + (b * s_.Tq + t) * s_.S; }

  void softmax_gradient(int64_t b, int64_t t, int64_t n) {
    float* g = grads(b, t);
    const float* w = weights(b, t);
    const float* extra = call_.grad_weights ? call_.grad_weights + (b * s_.Tq + t) * s_.S : nullptr;
    Float dot = zero();
    for (int64_t s = 0; s < n; s += kLanes) {
      const int lanes = lanes_left(s, n);
      Float d = call_.grad_context.data ? load(g + s) : zero();
      if (extra) d = add(d, load_as(Format::kFloat32, cast(extra + s), lanes));
      store(g + s, d);
      dot = fma(load_as(Format::kFloat32, cast(w + s), lanes), first_lanes(d, lanes), dot);
    }
    const Float mean = set1(reduce_add(dot));
    for (int64_t s = 0; s < n; s += kLanes) {
      const int lanes = lanes_left(s, n);
      const Float own = load_as(Format::kFloat32, cast(w + s), lanes);
      store(g + s, mul(own, sub(first_lanes(load(g + s), lanes), mean)));
    }
  }
  static const char* cast(const float* p) { return reinterpret_cast<const char*>(p); }

  // The sums of one chunk, or false where a factor is out of range.
  template <bool direct>
  bool pairs(int64_t b, int64_t column, int64_t width) {
    const int64_t n = f_.keys_of(b), chunk = places_.chunk;
    float* const q = mine(places_.q);
    float* const k = mine(places_.k);
    bool good = true;
    for (int64_t t = 0; n > 0 && t < s_.Tq; ++t) {
      good &= factor_row<direct>(f_.dtype, f_.query.at(b, t) + column * esize_, width, nullptr,
                                 nullptr, q + t * chunk);
    }
    const char* const by = f_.coverage ? f_.coverage_weight + column * esize_ : nullptr;
    for (int64_t s = 0; s < n; ++s) {
      const char* c = f_.coverage ? f_.coverage + (b * s_.S + s) * esize_ : nullptr;
      good &= factor_row<direct>(f_.dtype, f_.keys.at(b, s) + column * esize_, width, c, by,
                                 k + s * chunk);
    }
    if (!good) return false;
    std::memset(mine(places_.grad_k), 0, static_cast<size_t>(n * chunk * 4));
    for (int64_t a = 0; a < width; a += kLanes) store(grad_v(b) + column + a, zero());
    for (int64_t t = 0; n > 0 && t < s_.Tq; t += 4) {
      const int64_t rows = min(4, s_.Tq - t);
      for (int64_t a = 0; a < width; a += kLanes) {
        float* const v = grad_v(b) + column + a;
        rows == 4   ? column_of_pairs<direct, 4>(b, t, n, a, v)
        : rows == 3 ? column_of_pairs<direct, 3>(b, t, n, a, v)
        : rows == 2 ? column_of_pairs<direct, 2>(b, t, n, a, v)
                    : column_of_pairs<direct, 1>(b, t, n, a, v);
      }
    }
    return true;
  }

  // One vector of A: queries [t, t + queries) with all keys.
  template <bool direct, int queries>
  void column_of_pairs(int64_t b, int64_t t, int64_t n, int64_t a, float* v) const {
    const int64_t chunk = places_.chunk;
    const float* key = mine(places_.k) + a;
    float* grad_key = mine(places_.grad_k) + a;
    const float* g = grads(b, t);
    Float q[queries], grad_q[queries], of_v[queries];
#pragma GCC unroll 4
    for (int i = 0; i < queries; ++i) {
      q[i] = load(mine(places_.q) + (t + i) * chunk + a);
      grad_q[i] = of_v[i] = zero();
    }
    for (int64_t s = 0; s < n; ++s, key += chunk, grad_key += chunk) {
      const Float k = load(key);
      Float sum = load(grad_key);
#pragma GCC unroll 4
      for (int i = 0; i < queries; ++i) {
        const Float weight = set1(g[i * places_.grads_stride + s]);
        const Float r = reciprocal_of<direct>(q[i], k), u = fnma(r, r, r);
        of_v[i] = fma(weight, r, of_v[i]);
        grad_q[i] = fma(weight, u, grad_q[i]);
        sum = fma(weight, u, sum);
      }
      store(grad_key, sum);
    }
#pragma GCC unroll 4
    for (int i = 0; i < queries; ++i) {
      store(mine(places_.grad_q) + (t + i) * chunk + a, grad_q[i]);
      if (i > 0) of_v[0] = add(of_v[0], of_v[i]);
    }
    store(v, add(load(v), of_v[0]));
  }

  const AdditiveBackward& call_;
  const Additive& f_;
  const AdditiveShape& s_;
  const AdditiveBackwardPlaces places_;
  char* const work_;
  char* const own_;
  const int esize_;
};

inline void run_additive_backward(const AdditiveBackward& b) {
  const Additive& f = b.forward;
  const AdditiveShape& s = f.shape;
  const int64_t tiles = (s.Tq + f.query_rows - 1) / f.query_rows;
  const int64_t key_tiles = (s.S + kBackwardKeys - 1) / kBackwardKeys;
  const int64_t query_units = s.B * tiles, key_units = s.B * key_tiles;
  const int64_t chunk_units = s.B * AdditiveBackwardRun(b, 0).chunks();
  Units queries, keys, chunks;
  Barrier barrier;
  auto body = [&](int rank, int size) {
    AdditiveBackwardRun own(b, rank);
    for (int64_t u = queries.take(query_units); u >= 0; u = queries.take(query_units)) {
      const int64_t i = u % tiles, first = s.Tq * i / tiles;
      own.score_gradients(u / tiles, first, s.Tq * (i + 1) / tiles - first);
    }
    for (int64_t u = keys.take(key_units); u >= 0; u = keys.take(key_units)) {
      const int64_t first = u % key_tiles * kBackwardKeys, left = s.S - first;
      own.value_gradients(u / key_tiles, first, left < kBackwardKeys ? left : kBackwardKeys);
    }
    barrier.wait(size);
    for (int64_t u = chunks.take(chunk_units); u >= 0; u = chunks.take(chunk_units)) {
      own.factor_gradients(u / own.chunks(), u % own.chunks());
    }
    barrier.wait(size);
    own.sum_score_weight(rank, size);
  };
  run_team(f.threads, body);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::attention
