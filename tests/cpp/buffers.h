// Random numbers, and memory that ends where a kernel's buffer ends. Static, as in check.h.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core/format.h"

namespace {

uint32_t random_state = 7;
inline float next() {  // in [-1, 1)
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(random_state)) / 2147483648.0f;
}

inline std::vector<float> random_floats(int64_t n, float scale = 1.0f) {
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = next() * scale;
  return v;
}

template <class T>
char* chars(std::vector<T>& v) {
  return reinterpret_cast<char*>(v.data());
}

template <class T>
T number_at(const char* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// A number as tensors of a dtype hold it. bfloat16 is cut off: any number near will do.
inline void put_number(encdec::Format format, char* to, float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t upper = static_cast<uint16_t>(bits >> 16);
  const char* from = reinterpret_cast<const char*>(&value);
  if (format == encdec::Format::kFloat16) from = reinterpret_cast<const char*>(&half);
  if (format == encdec::Format::kBfloat16) from = reinterpret_cast<const char*>(&upper);
  std::memcpy(to, from, static_cast<size_t>(encdec::element_bytes(format)));
}
inline float get_number(encdec::Format format, const char* p) {
  if (format == encdec::Format::kFloat32) return number_at<float>(p);
  if (format == encdec::Format::kFloat16) return static_cast<float>(number_at<_Float16>(p));
  const uint32_t bits = uint32_t{number_at<uint16_t>(p)} << 16;
  return number_at<float>(reinterpret_cast<const char*>(&bits));
}

// Memory that starts at a cache line and ends where it ends.
struct Lines {
  explicit Lines(int64_t bytes)
      : data(static_cast<char*>(
            std::aligned_alloc(64, static_cast<size_t>(encdec::round_up(bytes, 64))))) {}
  Lines(const Lines&) = delete;
  ~Lines() { std::free(data); }
  char* const data;
};

}  // namespace
