// Random numbers that depend on nothing but a seed and a place: Philox4x32-10 of Salmon, Moraes,
// Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, 2011. Every thread, tile and backend
// finds the same number for the same place.
#pragma once

#include "core/simd.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {

// The counter's four words become four words of random bits, in every lane for itself.
ENCDEC_INLINE void philox(Int (&c)[4], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  const Int m0 = iset1(static_cast<int32_t>(0xd2511f53u));
  const Int m1 = iset1(static_cast<int32_t>(0xcd9e8d57u));
  for (int round = 0; round < 10; ++round) {
    Int high0, low0, high1, low1;
    mul_wide(m0, c[0], &high0, &low0);
    mul_wide(m1, c[2], &high1, &low1);
    c[0] = ixor(ixor(high1, c[1]), iset1(static_cast<int32_t>(key0)));
    c[1] = low1;
    c[2] = ixor(ixor(high0, c[3]), iset1(static_cast<int32_t>(key1)));
    c[3] = low0;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
}

// How dropout falls: number `i` of row `r` is kept where word (i % 64) / 16 of the counter
// (i / 64 * 16 + i % 16, 0, r's two halves) is at least `least`, and is multiplied by `scale`.
struct Dropout {
  uint64_t seed = 0;
  uint32_t least = 0;  // the probability to be dropped, times 2^32; 0: no dropout
  float scale = 1.0f;  // 1 / (1 - that probability)
};

// Drops among the first n numbers of a row, which has room for whole vectors: those behind may
// change too.
inline void drop_row(const Dropout& d, int64_t r, float* row, int64_t n) {
  constexpr int kBlock = 64, kWord = 16;
  alignas(64) static constexpr int32_t kPlace[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                     8, 9, 10, 11, 12, 13, 14, 15};
  const Int low = iset1(static_cast<int32_t>(static_cast<uint64_t>(r)));
  const Int high = iset1(static_cast<int32_t>(static_cast<uint64_t>(r) >> 32));
  const Float scale = set1(d.scale);
  for (int64_t block = 0; block * kBlock < n; ++block) {
    for (int part = 0; part < kWord; part += kLanes) {
      const Int first = iset1(static_cast<int32_t>(block * kWord));
      Int words[4] = {iadd(first, iload(kPlace + part)), izero(), low, high};
      philox(words, d.seed);
      for (int w = 0; w < 4; ++w) {
        const int64_t i = block * kBlock + w * kWord + part;
        if (i < n) store(row + i, where_at_least(words[w], d.least, mul(scale, load(row + i))));
      }
    }
  }
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
