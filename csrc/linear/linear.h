// y = after(x W' + b): a matrix product on packed weights, with what follows it in the same pass.
//
// Plain structs and raw pointers; torch lives in linear_binding.cpp only. Sizes are in elements,
// strides in bytes. Names: M rows, N output and K input features.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "core/format.h"
#include "core/product_plan.h"

namespace encdec::linear {

enum class Activation : int32_t { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };
enum class Norm : int32_t { kNone = 0, kLayer = 1, kRms = 2 };

// How a packed weight begins; byte offsets from there.
struct PackedHeader {
  static constexpr uint64_t kMagic = 0x656e636465636c6eull;
  uint64_t magic;
  uint64_t fingerprint;  // of the weight it was made from
  Isa isa;
  Format format;
  int64_t N, K, bytes;
  MatrixPlace weight;
};

struct Linear {
  Format dtype;  // of every tensor
  int64_t M = 0, N = 0, K = 0;
  const char* packed = nullptr;
  const char* input = nullptr;
  int64_t input_stride = 0;
  const char* bias = nullptr;  // [N]; null: none
  Activation activation = Activation::kNone;
  const char* residual = nullptr;  // (M, N), added after the activation; null: none
  int64_t residual_stride = 0;
  Norm norm = Norm::kNone;            // of each row, last of all
  const char* norm_weight = nullptr;  // [N]; null: ones
  const char* norm_bias = nullptr;    // [N]; null: zeros
  float norm_eps = 0.0f;
  char* output = nullptr;  // (M, N)
  int64_t output_stride = 0;
  ProductPlan plan;
  char* workspace = nullptr;
};

// Gradients of y = x W' + b; in float32.
struct LinearBackward {
  int64_t M = 0, N = 0, K = 0;
  Weight weight;
  const char* grad = nullptr;  // of y
  int64_t grad_stride = 0;
  const char* input = nullptr;
  int64_t input_stride = 0;
  char* grad_input = nullptr;   // (M, K); null: not wanted, as the others
  char* grad_weight = nullptr;  // (N, K)
  char* grad_bias = nullptr;    // [N]
  int threads = 1;
  int64_t chunk_rows = 1;
  char* workspace = nullptr;
};

// What one instruction set offers. The packed form differs between instruction sets.
struct Kernels {
  int64_t (*packed_bytes)(int64_t N, int64_t K, Format format);
  void (*pack)(const Weight&, Format format, int threads, char* packed);
  int64_t (*workspace)(const Linear&);
  void (*run)(const Linear&);
  int64_t (*backward_workspace)(const LinearBackward&);
  void (*backward)(const LinearBackward&);
};

const Kernels& kernels(Isa isa);

// Threads and chunks of a call, where `available` threads may be had.
void plan(Linear& call, Format format, int available);
void plan(LinearBackward& call, int available);

namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}

}  // namespace encdec::linear
