// One query of several heads whose keys, and values, lie side by side in memory: row by row over
// all of these heads, so that memory is read in order.
#pragma once

#include "attention/tiles.h"

namespace encdec::attention {
namespace ENCDEC_ISA_NAMESPACE {

// Heads of `vectors` vectors that are taken together: half of the registers for their sums.
constexpr int heads_together(int vectors) { return kRegisters / 2 / vectors; }
constexpr int kMostTogether = heads_together(1);
static_assert(kMostTogether <= kLanes, "a vector has a sum for each head");

// The heads of a row of a tensor.
struct HeadRows {
  const char* data;  // of the first head
  int64_t stride;    // bytes from row to row
};

// scores[h * scores_stride + s]: the sum over all numbers of query h times those of head h of row
// s, for s < count. Query h is at q + h * q_stride. Rows of scores have room for whole vectors.
template <Format dtype, int NV>
inline void head_scores(const float* q, int64_t q_stride, HeadRows keys, int64_t count,
                        float* scores, int64_t scores_stride) {
  constexpr int kHeads = heads_together(NV), kKeys = kLanes / kHeads;
  constexpr int kVectorBytes = kLanes * element_bytes(dtype);
  alignas(64) float tile[kLanes];
  for (int64_t s = 0; s < count; s += kKeys) {
    Float sums[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      const int64_t row = s + i < count ? s + i : count - 1;
      const char* const key = keys.data + row * keys.stride;
#pragma GCC unroll 16
      for (int h = 0; h < kHeads; ++h) {
        Float sum = zero();
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
          sum = fma(load(q + h * q_stride + v * kLanes),
                    load_as(dtype, key + (h * NV + v) * kVectorBytes), sum);
        }
        sums[h * kKeys + i] = sum;
      }
    }
    store(tile, sums_of(sums));
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h) {
      std::memcpy(scores + h * scores_stride + s, tile + h * kKeys, sizeof(float) * kKeys);
    }
  }
}

// put(h, v, sum): vector v of the sum over s < count of weight (h, s) times head h of row s.
template <Format dtype, int NV, class Put>
inline void weigh_heads(const float* weights, int64_t weights_stride, HeadRows values,
                        int64_t count, const Put& put) {
  constexpr int kHeads = heads_together(NV);
  constexpr int kVectorBytes = kLanes * element_bytes(dtype);
  Float sums[kHeads][NV];
#pragma GCC unroll 16
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sums[h][v] = zero();
  }
  for (int64_t s = 0; s < count; ++s) {
    const char* const value = values.data + s * values.stride;
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h) {
      const Float weight = set1(weights[h * weights_stride + s]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        sums[h][v] = fma(weight, load_as(dtype, value + (h * NV + v) * kVectorBytes), sums[h][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) put(h, v, sums[h][v]);
  }
}

// Calls visit with the vectors of a head as a constant. Returns false for heads that are not taken
// together.
template <class Visit>
inline bool with_head_vectors(int64_t size, const Visit& visit) {
  const auto take = [&](auto vectors) {
    if (size != vectors * kLanes || heads_together(vectors) < 2) return false;
    visit(vectors);
    return true;
  };
  return take(std::integral_constant<int, 1>{}) || take(std::integral_constant<int, 2>{}) ||
         take(std::integral_constant<int, 4>{}) || take(std::integral_constant<int, 8>{});
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::attention
