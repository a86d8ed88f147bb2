// Forward of additive attention. A unit of work is some queries of one sentence: their factors stay
// in cache while blocks of keys pass by, each read once; then softmax, then the context.
#pragma once

#include "attention/additive_factors.h"

namespace encdec::attention {
namespace ENCDEC_ISA_NAMESPACE {

constexpr int64_t kKeyBlock = 16;  // keys whose factors are held at a time: A = 512 fits in L1

// A member's buffers, as offsets into its workspace.
struct AdditivePlaces {
  int64_t q, k, v, scores;        // float [query rows][stride], [kKeyBlock][stride], [A], [rows][S]
  int64_t stride, scores_stride;  // floats
  int64_t bytes;
};

inline AdditivePlaces additive_places(const Additive& f) {
  AdditivePlaces p{};
  p.stride = round_up(f.shape.A, kPairFloats);
  p.scores_stride = row_floats(round_up(f.shape.S, kKeyBlock));
  const int64_t rows = round_up(f.query_rows, kTileQueries);
  int64_t at = 0;
  const auto take = [&](int64_t floats) {
    const int64_t here = at;
    at += round_up(floats * 4, 64);
    return here;
  };
  p.q = take(rows * p.stride);
  p.k = take(kKeyBlock * p.stride);
  p.v = take(p.stride);
  p.scores = take(rows * p.scores_stride);
  p.bytes = at;
  return p;
}

class AdditiveForward {
 public:
  AdditiveForward(const Additive& call, int rank)
      : call_(call),
        s_(call.shape),
        places_(additive_places(call)),
        work_(call.workspace + rank * places_.bytes) {
    const int bytes = element_bytes(call.dtype);
    // What is behind the numbers of a row, up to a whole pair of vectors, counts for nothing.
    std::memset(floats(places_.v), 0, static_cast<size_t>(places_.stride * 4));
    for (int64_t a = 0; a < s_.A; a += kLanes) {
      store(floats(places_.v) + a,
            load_as(call.dtype, call.score_weight + a * bytes, lanes_left(a, s_.A)));
    }
  }

  // Queries [first, first + rows) of sentence b.
  void run(int64_t b, int64_t first, int64_t rows) {
    const int64_t n = call_.keys_of(b);
    if (n > 0) {
      if (!scores<false>(b, first, rows, n)) scores<true>(b, first, rows, n);
      // The scores are -2 times the sums, and v's own sum, which softmax does not see.
      for (int64_t t = 0; t < rows; ++t) softmax_row(score_row(t), n, -2.0f);
    }
    if (call_.weights) {
      for (int64_t t = 0; t < rows; ++t) {
        float* to = call_.weights + (b * s_.Tq + first + t) * s_.S;
        std::memcpy(to, score_row(t), static_cast<size_t>(n * 4));
        std::memset(to + n, 0, static_cast<size_t>((s_.S - n) * 4));
      }
    }
    context(b, first, rows, n);
  }

 private:
  float* floats(int64_t place) const { return reinterpret_cast<float*>(work_ + place); }
  float* score_row(int64_t t) const { return floats(places_.scores) + t * places_.scores_stride; }

  template <bool direct>
  bool row_of_factors(const char* row, const char* coverage, float* to) const {
    const int64_t whole = round_up(s_.A, kLanes);
    if (whole < places_.stride) store(to + whole, zero());
    return factor_row<direct>(call_.dtype, row, s_.A, coverage, call_.coverage_weight, to,
                              kLargestOfPairs);
  }

  // Sums of v / (1 + q k) for n keys, or false where a factor is out of range.
  template <bool direct>
  bool scores(int64_t b, int64_t first, int64_t rows, int64_t n) {
    const int64_t stride = places_.stride;
    float* const q = floats(places_.q);
    float* const k = floats(places_.k);
    const float* const v = floats(places_.v);
    const int bytes = element_bytes(call_.dtype);
    bool good = true;
    for (int64_t t = 0; t < rows; ++t) {
      good &= row_of_factors<direct>(call_.query.at(b, first + t), nullptr, q + t * stride);
    }
    for (int64_t t = rows; t < round_up(rows, kTileQueries); ++t) {
      std::memset(q + t * stride, 0, static_cast<size_t>(stride * 4));
    }
    const bool at_once = !direct && rows == 1 && !call_.coverage && s_.A % kPairFloats == 0;
    for (int64_t s = 0; good && s < n; s += kKeyBlock) {
      const int64_t count = n - s < kKeyBlock ? n - s : kKeyBlock;
      for (int64_t i = 0; rows == 1 && i < count; ++i) {
        ask_for_row(call_.values.at(b, s + i), s_.D * bytes);
      }
      if (at_once && count == kKeyBlock) {
        good = scores_at_once(b, s);
        continue;
      }
      for (int64_t i = 0; i < kKeyBlock; ++i) {
        if (i < count) {
          const char* c = call_.coverage ? call_.coverage + (b * s_.S + s + i) * bytes : nullptr;
          good &= row_of_factors<direct>(call_.keys.at(b, s + i), c, k + i * stride);
        } else {
          std::memset(k + i * stride, 0, static_cast<size_t>(stride * 4));
        }
      }
      all_sums(q, stride, rows, count, stride, score_row(0) + s, places_.scores_stride,
               PairKeys{k, stride},
               [&](Float sum, Pair own, Pair key, int64_t a) __attribute__((always_inline)) {
                 return add_weighted<direct>(sum, numbers_at<Pair>(v + a), own, key);
               });
    }
    return good;
  }

  // A block of keys for one query, their factors made where they are used.
  bool scores_at_once(int64_t b, int64_t s) const {
    const float* const v = floats(places_.v);
    const int64_t row = call_.keys.row_stride;
    Float largest = zero();
    with_dtype(call_.dtype, [&](auto dtype) {
      constexpr Format d = decltype(dtype)::value;
      const char* const first = call_.keys.at(b, s);
      all_sums(
          floats(places_.q), places_.stride, 1, kKeyBlock, places_.stride, score_row(0) + s,
          places_.scores_stride,
          [&](int64_t j, int64_t a) __attribute__((always_inline)) {
            const auto factors = [&](int64_t at) __attribute__((always_inline)) {
              const Float x = load_as(d, first + j * row + at * element_bytes(d));
              largest = max(abs(x), largest);  // past a NaN, which its score will show
              return exp_twice(x);
            };
            return Pair{factors(a), factors(a + kLanes)};
          },
          [&](Float sum, Pair own, Pair key, int64_t a) __attribute__((always_inline)) {
            return add_weighted<false>(sum, numbers_at<Pair>(v + a), own, key);
          });
    });
    return !any_not_le(largest, set1(0.5f * kLargestOfPairs));
  }

  void context(int64_t b, int64_t first, int64_t rows, int64_t n) {
    const int bytes = element_bytes(call_.dtype);
    const auto put = [&](int64_t t, int64_t column, Float sum, int lanes) {
      store_as(call_.dtype, call_.context.at(b, first + t) + column * bytes, sum, lanes);
    };
    const auto run = [&](auto constant) {
      weigh<decltype(constant)::value>(rows, score_row(0), places_.scores_stride, 1, n,
                                       call_.values.at(b, 0), call_.values.row_stride, s_.D, put);
    };
    with_dtype(call_.dtype, run);
  }

  const Additive& call_;
  const AdditiveShape& s_;
  const AdditivePlaces places_;
  char* const work_;
};

inline void run_additive(const Additive& f) {
  const int64_t tiles = (f.shape.Tq + f.query_rows - 1) / f.query_rows;
  const int64_t count = f.shape.B * tiles;
  Units units;
  auto body = [&](int rank, int) {
    AdditiveForward own(f, rank);
    for (int64_t u = units.take(count); u >= 0; u = units.take(count)) {
      // Tiles of a sentence differ by one query at most.
      const int64_t i = u % tiles, first = f.shape.Tq * i / tiles;
      own.run(u / tiles, first, f.shape.Tq * (i + 1) / tiles - first);
    }
  };
  run_team(f.threads, body);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::attention
