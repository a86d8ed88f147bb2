// A memory as the steps of a decoder read it: its keys as rows of floats, made once for all steps.
//
// For additive scores these are the factors of tanh(q + k) (attention/additive_factors.h), or, for
// a sentence with a number that is too large for them, rows of 2k. With coverage they are rows of
// k, of which each step makes 2 (k + c u): an exponential for each number, as factors would take
// too.
#pragma once

#include "attention/additive_forward.h"
#include "core/gemm.h"
#include "core/layout.h"
#include "core/panels.h"
#include "decoder/attention_decoder.h"

namespace encdec::decoder {
namespace ENCDEC_ISA_NAMESPACE {

using namespace encdec::ENCDEC_ISA_NAMESPACE;
using attention::ENCDEC_ISA_NAMESPACE::all_sums;
using attention::ENCDEC_ISA_NAMESPACE::factor_row;
using attention::ENCDEC_ISA_NAMESPACE::float_row;
using attention::ENCDEC_ISA_NAMESPACE::FloatKeys;
using attention::ENCDEC_ISA_NAMESPACE::kKeyBlock;
using attention::ENCDEC_ISA_NAMESPACE::kTileQueries;
using attention::ENCDEC_ISA_NAMESPACE::reciprocal_of;
using attention::ENCDEC_ISA_NAMESPACE::row_floats;
using attention::ENCDEC_ISA_NAMESPACE::softmax_row;

struct MemoryPlaces {
  int64_t keys, stride;  // float [B][padded S][stride]
  int64_t padded;        // keys of a sentence, up to whole blocks
  int64_t direct;        // float [B]: not 0 where the keys are rows of 2k
  int64_t v;             // float [A]
  int64_t u;             // with coverage: float [A]
  int64_t coverage;  // float [B][padded]: the sums of weights so far, where they begin with some
};

inline MemoryPlaces memory_places(const Memory& m, int64_t B, Layout& layout) {
  MemoryPlaces p{};
  p.stride = row_floats(m.A);
  p.padded = round_up(m.S, kKeyBlock);
  p.keys = layout.take(m.located() ? 0 : B * p.padded * p.stride * 4);
  p.direct = layout.take(B * 4);
  p.v = layout.take(round_up(m.A, kLanes) * 4);
  p.u = layout.take(m.covered() ? round_up(m.A, kLanes) * 4 : 0);
  p.coverage = layout.take(m.coverage ? B * p.padded * 4 : 0);
  return p;
}

// Room for a row of weights.
inline int64_t scores_floats(const Memory& m, const MemoryPlaces& p) {
  return row_floats(p.padded > m.weights_size() ? p.padded : m.weights_size());
}

// Buffers of a member, with zeros behind what they hold: a query's factors in kTileQueries rows, a
// block of keys.
struct QueryPlaces {
  int64_t factors, keys;
};

inline QueryPlaces query_places(const MemoryPlaces& p, Layout& layout) {
  QueryPlaces q{};
  q.factors = layout.take(kTileQueries * p.stride * 4);
  q.keys = layout.take(kKeyBlock * p.stride * 4);
  return q;
}

class MemoryRows {
 public:
  MemoryRows(const Memory& memory, Format dtype, char* work, const MemoryPlaces& places)
      : m_(memory), dtype_(dtype), work_(work), p_(places) {}

  float* key(int64_t b, int64_t s) const {
    return floats(p_.keys) + (b * p_.padded + s) * p_.stride;
  }
  int64_t stride() const { return p_.stride; }
  const float* v() const { return floats(p_.v); }
  const float* u() const { return floats(p_.u); }
  float* coverage(int64_t b) const { return floats(p_.coverage) + b * p_.padded; }
  bool direct(int64_t b) const { return floats(p_.direct)[b] != 0.0f; }

  // The rows of sentence b, by one member; and v, by the first.
  void prepare(int64_t b) const {
    if (m_.located()) return;
    const int64_t n = m_.keys_of(b);
    if (b == 0 && m_.score_weight) {
      for (int64_t a = 0; a < m_.A; a += kLanes) {
        const char* from = m_.score_weight + a * element_bytes(dtype_);
        store(floats(p_.v) + a, load_as(dtype_, from, lanes_left(a, m_.A)));
      }
    }
    if (m_.covered()) {
      if (b == 0) float_row(m_.coverage_weight, dtype_, m_.A, floats(p_.u));
      if (m_.coverage) {
        float_row(m_.coverage + b * m_.S * element_bytes(dtype_), dtype_, n, coverage(b));
      }
    }
    if (m_.score == Score::kDot || m_.covered()) {
      for (int64_t s = 0; s < n; ++s) float_row(m_.keys.at(b, s), dtype_, m_.A, key(b, s));
    } else {
      const bool direct = !factors<false>(b, n) && factors<true>(b, n);
      floats(p_.direct)[b] = direct ? 1.0f : 0.0f;
    }
    const int64_t whole = round_up(m_.A, kLanes);
    for (int64_t s = n; s < p_.padded; ++s)
      std::memset(key(b, s), 0, static_cast<size_t>(whole * 4));
  }

  // Rows of 2k for a query that is itself out of range, whose sentence's keys are factors.
  void direct_keys(int64_t b, int64_t first, int64_t count, float* to) const {
    for (int64_t i = 0; i < kKeyBlock; ++i) {
      float* const row = to + i * p_.stride;
      if (i < count) {
        factor_row<true>(dtype_, m_.keys.at(b, first + i), m_.A, nullptr, nullptr, row);
      } else {
        std::memset(row, 0, static_cast<size_t>(round_up(m_.A, kLanes) * 4));
      }
    }
  }

  // Rows of 2 (k + c u) of keys [first, first + count), with rows of zeros up to a whole block.
  void covered_keys(int64_t b, int64_t first, int64_t count, const float* c, float* to) const {
    for (int64_t i = 0; i < round_up(count, kKeyBlock); ++i, to += p_.stride) {
      if (i < count) {
        const char* const key_row = reinterpret_cast<const char*>(key(b, first + i));
        factor_row<true>(Format::kFloat32, key_row, m_.A, reinterpret_cast<const char*>(c + i),
                         reinterpret_cast<const char*>(u()), to);
      } else {
        std::memset(to, 0, static_cast<size_t>(round_up(m_.A, kLanes) * 4));
      }
    }
  }

  // The weights that a query gives to the keys of sentence b, which has some. sums: with coverage,
  // of the weights before.
  void attend(int64_t b, const float* query, char* own, const QueryPlaces& places, float* weights,
              const float* sums) const {
    float* const factors = reinterpret_cast<float*>(own + places.factors);
    float* const keys = reinterpret_cast<float*>(own + places.keys);
    const int64_t n = m_.keys_of(b);
    if (m_.score == Score::kDot) {
      dots(b, n, query, factors, weights);
    } else if (m_.covered()) {
      additive<true>(b, n, query, factors, keys, weights, sums);
    } else if (direct(b) || !additive<false>(b, n, query, factors, keys, weights, nullptr)) {
      additive<true>(b, n, query, factors, keys, weights, nullptr);
    }
    softmax_row(weights, n, m_.score == Score::kDot ? m_.scale : -2.0f);
  }

 private:
  void dots(int64_t b, int64_t n, const float* query, float* own, float* scores) const {
    std::memcpy(own, query, static_cast<size_t>(round_up(m_.A, kLanes) * 4));
    all_sums(own, p_.stride, 1, n, round_up(m_.A, kLanes), scores, 0,
             FloatKeys{key(b, 0), p_.stride},
             [](Float sum, Float x, Float y, int64_t)
                 __attribute__((always_inline)) { return fma(x, y, sum); });
  }

  // Sums of v / (1 + q k), or false where the query is out of range.
  template <bool direct_form>
  bool additive(int64_t b, int64_t n, const float* query, float* own, float* block, float* scores,
                const float* sums) const {
    const bool good = factor_row<direct_form>(
        Format::kFloat32, reinterpret_cast<const char*>(query), m_.A, nullptr, nullptr, own);
    if (!good) return false;
    for (int64_t s = 0; s < n; s += kKeyBlock) {
      const int64_t count = n - s < kKeyBlock ? n - s : kKeyBlock;
      const float* keys = key(b, s);
      if (m_.covered()) {
        covered_keys(b, s, count, sums + s, block);
        keys = block;
      } else if (direct_form && !direct(b)) {
        direct_keys(b, s, count, block);
        keys = block;
      }
      all_sums(own, p_.stride, 1, count, round_up(m_.A, kLanes), scores + s, 0,
               FloatKeys{keys, p_.stride},
               [&](Float sum, Float x, Float k, int64_t a) __attribute__((always_inline)) {
                 return fma(load(v() + a), reciprocal_of<direct_form>(x, k), sum);
               });
    }
    return true;
  }

  float* floats(int64_t place) const { return reinterpret_cast<float*>(work_ + place); }
  template <bool direct>
  bool factors(int64_t b, int64_t n) const {
    bool good = true;
    for (int64_t s = 0; s < n; ++s) {
      good &= factor_row<direct>(dtype_, m_.keys.at(b, s), m_.A, nullptr, nullptr, key(b, s));
    }
    return good;
  }

  const Memory& m_;
  const Format dtype_;
  char* const work_;
  const MemoryPlaces p_;
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::decoder
