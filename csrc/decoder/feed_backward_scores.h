// The gradients of a decoder's attention at one step and sentence (attention_feed_backward.h): from
// those of the context to those of scores and query, and with coverage to those of all that the
// scores are made of.
#pragma once

#include "decoder/feed_backward_places.h"

namespace encdec::decoder {
namespace ENCDEC_ISA_NAMESPACE {

using attention::ENCDEC_ISA_NAMESPACE::all_sums;

template <Cell cell, Format format>
class FeedBackwardScores {
 protected:
  FeedBackwardScores(const Backward& call, int rank, int members)
      : call_(call),
        m_(call.memory),
        s_(call.rnn.shape),
        dtype_(call.rnn.dtype),
        esize_(element_bytes(call.rnn.dtype)),
        rank_(rank),
        members_(members),
        places_(feed_backward_places<cell, format>(call)),
        memory_(m_, dtype_, call.workspace, places_.memory),
        own_(call.workspace + places_.member + rank * places_.member_bytes) {}

  int64_t part(int64_t n, int i) const { return n * i / members_; }
  float* mine(int64_t place) const { return reinterpret_cast<float*>(own_ + place); }
  float* value(int64_t b, int64_t s) const {
    return reinterpret_cast<float*>(call_.workspace + places_.values) +
           (b * places_.memory.padded + s) * places_.value_stride;
  }
  char* d_query(int64_t t, int64_t b) const {
    return call_.workspace + places_.d_query + (t * s_.B + b) * places_.d_query_row;
  }

  char* d_output(int64_t t, int64_t b) const {
    return call_.workspace + places_.d_output + (t * s_.B + b) * places_.d_output_row;
  }
  float* key_grads(int64_t b) const {
    return reinterpret_cast<float*>(call_.workspace + places_.d_keys) +
           b * places_.memory.padded * memory_.stride();
  }
  float* coverage_grads(int64_t b) const {
    return reinterpret_cast<float*>(call_.workspace + places_.d_coverage) +
           b * places_.memory.padded;
  }
  float* context_grads(int64_t b) const {
    return reinterpret_cast<float*>(call_.workspace + places_.contexts) + b * places_.context_row;
  }
  const char* context(int64_t t, int64_t b) const {
    return call_.contexts + (b * s_.T + t) * m_.M * esize_;
  }

  float* fed_grads(int64_t b) const {
    return reinterpret_cast<float*>(call_.workspace + places_.fed_grads) + b * places_.fed_row;
  }
  const char* output(int64_t t, int64_t b) const {
    return call_.rnn.direction[0].output.at(call_.rnn.sequences, t, b);
  }

  // The gradient of f, as it was fed and as it was seen: vector c of it.
  Float fed_gradient(int64_t t, int64_t b, int64_t c, int lanes) const {
    const rnn::StepTensor& given = call_.rnn.direction[0].grad_output;
    Float d = load(fed_grads(b) + c);
    if (given.data) {
      const char* const own = given.at(call_.rnn.sequences, t, b) + (s_.H + c) * esize_;
      d = add(d, load_as(dtype_, own, lanes));
    }
    return first_lanes(d, lanes);
  }

  // Through tanh, staged.
  void output_gradients(int64_t t, int64_t b) const {
    const char* const f = output(t, b) + s_.H * esize_;
    for (int64_t c = 0; c < m_.F; c += kLanes) {
      const int lanes = lanes_left(c, m_.F);
      const Float y = load_as(dtype_, f + c * esize_, lanes);
      const Float d = mul(fed_gradient(t, b, c, lanes), fnma(y, y, set1(1.0f)));
      stage_vector<format>(staged_at<format>(d_output(t, b), c), d);
    }
  }

  // The gradients of one sentence's context, scores and query.
  void sentence(int64_t t, int64_t b, float* state_grads) const {
    const int64_t n = m_.weights_of(b);
    float* const d_context = mine(places_.d_context);
    char* const shown = call_.grad_context + (b * s_.T + t) * m_.M * esize_;
    for (int64_t c = 0; c < m_.M; c += kLanes) {
      const int lanes = lanes_left(c, m_.M);
      const Float d = m_.output_weight ? load(context_grads(b) + c) : fed_gradient(t, b, c, lanes);
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
    } else if (m_.located()) {
      for (int64_t a = 0; a < m_.A; a += kLanes) {
        const int lanes = static_cast<int>(n - a < kLanes ? (n > a ? n - a : 0) : kLanes);
        put(a, lanes > 0 ? first_lanes(load(g + a), lanes) : zero(), lanes_left(a, m_.A));
      }
    } else if (m_.score == Score::kDot) {
      each_vector([&](int64_t a, int64_t vectors) { dots(b, n, a, vectors, g, put); });
    } else {
      const char* query = call_.queries + (b * s_.T + t) * m_.A * esize_;
      float* const q = mine(places_.factors);
      if (m_.covered()) {
        factor_row<true>(dtype_, query, m_.A, nullptr, nullptr, q);
        return covered(t, b, n, q, g, put);
      }
      const bool direct =
          memory_.direct(b) || !factor_row<false>(dtype_, query, m_.A, nullptr, nullptr, q);
      if (direct) factor_row<true>(dtype_, query, m_.A, nullptr, nullptr, q);
      direct ? additive<true>(b, n, q, g, put) : additive<false>(b, n, q, g, put);
    }
  }

  // n: the weights of the sentence, of which the first belong to keys.
  void score_gradients(int64_t t, int64_t b, int64_t n, const float* d_context, float* g) const {
    const int64_t keys = m_.keys_of(b);
    if (keys > 0) {
      all_sums(d_context, places_.value_stride, 1, keys, round_up(m_.M, kLanes), g, 0,
               FloatKeys{value(b, 0), places_.value_stride},
               [](Float sum, Float x, Float y, int64_t)
                   __attribute__((always_inline)) { return fma(x, y, sum); });
    }
    for (int64_t s = keys; s < n; ++s) g[s] = 0.0f;
    const int64_t row = (b * s_.T + t) * m_.weights_size();
    const float* const w = call_.weights + row;
    const float* const extra = call_.grad_weights ? call_.grad_weights + row : nullptr;
    const float* const later = m_.covered() ? coverage_grads(b) : nullptr;  // of steps behind t
    float mean = 0.0f;
    for (int64_t s = 0; s < n; ++s) {
      if (extra) g[s] += extra[s];
      if (later) g[s] += later[s];
      mean += w[s] * g[s];
    }
    for (int64_t s = 0; s < n; ++s) g[s] = w[s] * (g[s] - mean);
    if (!m_.located()) return;
    char* const to = call_.grad_positions + (b * s_.T + t) * m_.A * esize_;
    for (int64_t s = 0; s < n; s += kLanes) {
      const int lanes = lanes_left(s, n);
      store_as(dtype_, to + s * esize_, first_lanes(load(g + s), lanes), lanes);
    }
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

  // With coverage: the query's gradient, and what the step adds to those of keys, v, u and the
  // coverage before it.
  template <class Put>
  void covered(int64_t t, int64_t b, int64_t n, const float* q, const float* g,
               const Put& put) const {
    const float* const c = call_.coverages + (b * s_.T + t) * m_.S;
    float* const keys = mine(places_.keys);
    memory_.covered_keys(b, 0, n, c, keys);
    float* const d_coverage = coverage_grads(b);
    const Float two = set1(2.0f), one = set1(1.0f);
    each_vector([&](int64_t a, int64_t vectors) {
      Float d_q[4], d_v[4], d_u[4], own[4], v4[4], u[4];
      for (int64_t i = 0; i < vectors; ++i) {
        const int64_t at = a + i * kLanes;
        d_q[i] = zero();
        d_v[i] = load(mine(places_.d_v) + at);
        d_u[i] = load(mine(places_.d_u) + at);
        own[i] = load(q + at);
        v4[i] = mul(set1(4.0f), load(memory_.v() + at));
        u[i] = load(memory_.u() + at);
      }
      for (int64_t s = 0; s < n; ++s) {
        const float* const key = keys + s * memory_.stride() + a;
        float* const d_key = key_grads(b) + s * memory_.stride() + a;
        const Float weight = set1(g[s]), sum = set1(c[s]);
        Float of_coverage = zero();
        for (int64_t i = 0; i < vectors; ++i) {
          const Float r = reciprocal_of<true>(own[i], load(key + i * kLanes));
          const Float d = mul(mul(weight, v4[i]), fnma(r, r, r));
          d_q[i] = add(d_q[i], d);
          store(d_key + i * kLanes, add(load(d_key + i * kLanes), d));
          d_u[i] = fma(sum, d, d_u[i]);
          d_v[i] = fma(weight, fnma(two, r, one), d_v[i]);
          of_coverage = fma(d, u[i], of_coverage);
        }
        d_coverage[s] += reduce_add(of_coverage);
      }
      for (int64_t i = 0; i < vectors; ++i) {
        const int64_t at = a + i * kLanes;
        store(mine(places_.d_v) + at, d_v[i]);
        store(mine(places_.d_u) + at, d_u[i]);
        put(at, d_q[i], lanes_left(at, m_.A));
      }
    });
  }

  const Backward& call_;
  const Memory& m_;
  const rnn::Shape& s_;
  const Format dtype_;
  const int esize_;
  const int rank_, members_;
  const FeedBackwardPlaces places_;
  const MemoryRows memory_;
  char* const own_;
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::decoder
