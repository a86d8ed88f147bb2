// Additive attention: softmax over s of v' tanh(q_t + k_s), and the context it makes of values.
//
// Plain structs and raw pointers; torch lives in additive_binding.cpp only. Sizes are in elements,
// strides in bytes. Names: B batch, Tq queries, S keys, A attention size, D size of a value.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "core/format.h"

namespace encdec::attention {

// A tensor (B, rows, size); the last dimension is contiguous.
struct Rows {
  char* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;

  char* at(int64_t b, int64_t row) const { return data + b * batch_stride + row * row_stride; }
};

struct AdditiveShape {
  int64_t B, Tq, S, A, D;
};

struct Additive {
  AdditiveShape shape;
  Format dtype;  // of every tensor that has no type of its own
  Rows query, keys, values;
  const char* score_weight = nullptr;     // v [A]
  const char* coverage = nullptr;         // [B][S]; null: none
  const char* coverage_weight = nullptr;  // [A], with coverage
  const int64_t* lengths = nullptr;       // [B] keys that count, 0 to S; null: all
  Rows context;                           // (B, Tq, D)
  float* weights = nullptr;               // [B][Tq][S]; null: not wanted
  int threads = 1;
  int64_t query_rows = 1;  // that a member takes at a time
  char* workspace = nullptr;

  int64_t keys_of(int64_t b) const { return lengths ? lengths[b] : shape.S; }
};

struct AdditiveBackward {
  Additive forward;                     // its inputs, and `weights` as forward returned them
  Rows grad_context;                    // data null: zero
  const float* grad_weights = nullptr;  // [B][Tq][S]; null: zero
  Rows grad_query, grad_keys, grad_values;
  float* grad_score_weight = nullptr;  // [A]
  char* workspace = nullptr;
};

// One for each instruction set.
struct AdditiveKernels {
  int64_t (*forward_workspace)(const Additive&);
  void (*forward)(const Additive&);
  int64_t (*backward_workspace)(const AdditiveBackward&);
  void (*backward)(const AdditiveBackward&);
};

const AdditiveKernels& additive_kernels(Isa isa);

// Threads and query rows of a call, where `available` threads may be had.
void plan(Additive& call, int available);

namespace avx2 {
extern const AdditiveKernels kAdditiveKernels;
}
namespace avx512 {
extern const AdditiveKernels kAdditiveKernels;
}
namespace avx512_bf16 {
extern const AdditiveKernels kAdditiveKernels;
}

}  // namespace encdec::attention
