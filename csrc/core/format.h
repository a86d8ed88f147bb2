// Formats of stored numbers: what torch hands over, and what weights and rows are packed to.
#pragma once

#include <cstddef>
#include <cstdint>

namespace encdec {

// Visible, for its values are arguments of templates that a library exports.
enum class __attribute__((visibility("default"))) Format : int32_t {
  kFloat32 = 0,
  kBfloat16 = 1,
  kFloat16 = 2,
  kInt8 = 3
};

constexpr const char* format_name(Format f) {
  return f == Format::kFloat32    ? "float32"
         : f == Format::kBfloat16 ? "bfloat16"
         : f == Format::kFloat16  ? "float16"
                                  : "int8";
}

// Bytes of one number in a tensor.
constexpr int element_bytes(Format f) {
  return f == Format::kFloat32 ? 4 : f == Format::kInt8 ? 1 : 2;
}

// How many k share one 32-bit word of a row in a matrix product.
constexpr int group_size(Format f) {
  return f == Format::kBfloat16 ? 2 : f == Format::kInt8 ? 4 : 1;
}

// Bytes of the weights of one group in one column. Rows always take four: half-precision weights
// meet rows of floats.
constexpr int weight_group_bytes(Format f) { return f == Format::kFloat16 ? 2 : 4; }

// A weight as torch holds it: N rows of K contiguous numbers, row_stride numbers apart.
struct Weight {
  Format dtype;
  const char* data;
  int64_t row_stride;
  int64_t N, K;
};

// Where the parts of a packed matrix lie in its block, in bytes; int8 has scale and start as well.
struct MatrixPlace {
  int64_t data = 0, scale = 0, start = 0;
};

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Bytes from one staged row of k numbers to the next: whole cache lines, and an odd number of them,
// so that rows do not fall into the same cache sets.
constexpr int64_t staged_row_bytes(Format f, int64_t k) {
  const int64_t lines = round_up(round_up(k, group_size(f)) / group_size(f) * 4, 64) / 64;
  return (lines | 1) * 64;
}

}  // namespace encdec
