#include "core/dot.h"
#include "core/probe.h"

namespace encdec {
namespace ENCDEC_ISA_NAMESPACE {
namespace {

template <Format format>
int64_t multiply(int64_t rounds) {
  using D = Dot<format>;
  constexpr int kSums = kRegisters == 32 ? 24 : 12;
  alignas(64) char one[2 * kWideGroups * 4] = {};
  asm volatile("" : : "r"(one) : "memory");  // or the compiler sees that all are zero
  const auto word = D::word(one);
  auto weight = D::template weights<0>(one);
  typename D::Acc acc[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) {
    acc[i] = D::start();
    asm volatile("" : "+v"(acc[i]));  // or the compiler sees that all sums are the same
  }
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      asm volatile("" : "+v"(weight));  // or products of the same numbers are made once
      acc[i] = D::step(acc[i], word, weight);
    }
  }
  alignas(64) float sink[kLanes];
#pragma GCC unroll 24
  for (int i = 1; i < kSums; ++i) acc[0] = D::sum(acc[0], acc[i]);
  D::put(sink, acc[0]);
  asm volatile("" : : "r"(sink) : "memory");
  return rounds * kSums * kLanes * group_size(format) / D::kParts;
}

int64_t multiply_any(Format format, int64_t rounds) {
  switch (format) {
    case Format::kBfloat16:
      return multiply<Format::kBfloat16>(rounds);
    case Format::kInt8:
      return multiply<Format::kInt8>(rounds);
    default:
      return multiply<Format::kFloat32>(rounds);
  }
}

void read(const char* data, int64_t bytes) {
  Int sum[8];
  for (int i = 0; i < 8; ++i) sum[i] = izero();
  constexpr int64_t kVector = kLanes * 4;
  for (int64_t at = 0; at < bytes; at += 8 * kVector) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] = iadd(sum[i], iload(data + at + i * kVector));
  }
  alignas(64) int32_t sink[kLanes];
  for (int i = 1; i < 8; ++i) sum[0] = iadd(sum[0], sum[i]);
  istore(sink, sum[0]);
  asm volatile("" : : "r"(sink) : "memory");
}

}  // namespace

const Probes kProbes = {multiply_any, read};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec
