// Random numbers, and memory that ends where a kernel's buffer ends. Static, as in check.h.
#pragma once

#include <cstdint>
#include <cstdlib>
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
