// Philox against the vectors that its authors publish (Random123, kat_vectors), and dropout against
// the words that core/random.h says decide it.
#include <cmath>
#include <vector>

#include "check.h"
#include "core/format.h"
#include "core/random.h"

using namespace encdec::ENCDEC_ISA_NAMESPACE;

namespace {

// Word `word` of the counter's random bits, in lane 0.
uint32_t random_word(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed, int word) {
  const auto lanes = [](uint32_t x) { return iset1(static_cast<int32_t>(x)); };
  Int counter[4] = {lanes(c0), lanes(c1), lanes(c2), lanes(c3)};
  philox(counter, seed);
  alignas(64) uint32_t out[kLanes];
  istore(out, counter[word]);
  for (int l = 1; l < kLanes; ++l) CHECK(out[l] == out[0]);
  return out[0];
}

}  // namespace

void run_tests() {
  const uint32_t zeros[] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u};
  const uint32_t ones[] = {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu};
  const uint32_t pi[] = {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u};
  for (int w = 0; w < 4; ++w) {
    CHECK(random_word(0, 0, 0, 0, 0, w) == zeros[w]);
    CHECK(random_word(~0u, ~0u, ~0u, ~0u, ~uint64_t{0}, w) == ones[w]);
    CHECK(random_word(0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0x299f31d0a4093822u, w) ==
          pi[w]);
  }
  const Dropout dropout{12345678901234567ull, 0x60000000u, 1.6f};
  const int64_t row = (int64_t{3} << 32) + 5;
  for (const int64_t n : {1, 17, 64, 100, 150}) {
    std::vector<float> x(static_cast<size_t>(encdec::round_up(n, kLanes)), 2.0f);
    drop_row(dropout, row, x.data(), n);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t place = static_cast<uint32_t>(i / 64 * 16 + i % 16);
      const uint32_t word =
          random_word(place, 0, 5, 3, dropout.seed, static_cast<int>(i % 64 / 16));
      CHECK(x[static_cast<size_t>(i)] == (word >= dropout.least ? 2.0f * dropout.scale : 0.0f));
    }
  }
}
