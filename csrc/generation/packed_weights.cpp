#include "generation/packed_weights.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace encdec::generation {
namespace {

constexpr int64_t kSamples = 64;

// Mixes about 64 elements, spread over all rows and columns.
uint64_t mark_of(const Weight& w) {
  const int64_t count = w.N * w.K, bytes = element_bytes(w.dtype);
  const int64_t step = count > 2 * kSamples ? (count / kSamples - 1) | 1 : 1;
  uint64_t mark = 0x9e3779b97f4a7c15ull;
  for (int64_t i = 0; i < count; i += step) {
    uint32_t value = 0;
    std::memcpy(&value, w.data + (i / w.K * w.row_stride + i % w.K) * bytes,
                static_cast<size_t>(bytes));
    mark = (mark ^ value) * 0xff51afd7ed558ccdull;
    mark ^= mark >> 32;
  }
  return mark;
}

}  // namespace

char* PackedWeights::block(int64_t bytes) {
  blocks_.emplace_back();
  if (!blocks_.back().grow(std::max<int64_t>(bytes, 64))) throw std::bad_alloc();
  bytes_ += bytes;
  return blocks_.back().data();
}

Projection PackedWeights::projection(const Weight& weight, const float* bias, int threads) {
  const linear::Kernels& kernels = linear::kernels(chosen_isa());
  const int64_t bytes = kernels.packed_bytes(weight.N, weight.K, format_);
  char* const packed = block(bytes);
  kernels.pack(weight, format_, threads, packed);
  collapse_to_huge_pages(packed, bytes);
  watch(weight);
  return {packed, bias ? floats(bias, weight.N) : nullptr, weight.N, weight.K};
}

const float* PackedWeights::floats(const float* from, int64_t count) {
  const int64_t whole = round_up(count, 64);
  float* const to = reinterpret_cast<float*>(block(whole * 4));
  std::memcpy(to, from, static_cast<size_t>(count * 4));
  std::fill(to + count, to + whole, 0.0f);
  return to;
}

void PackedWeights::watch(const Weight& weight) { watched_.push_back({weight, mark_of(weight)}); }

bool PackedWeights::fresh() const {
  return std::all_of(watched_.begin(), watched_.end(),
                     [](const Watched& w) { return mark_of(w.weight) == w.mark; });
}

}  // namespace encdec::generation
