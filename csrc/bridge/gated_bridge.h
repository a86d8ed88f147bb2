// A decoder's state mixed with a context by a gate:
//
//     g = sigmoid(W_g [s; c] + b),   u = tanh(W_c c),   s' = g s + (1 - g) u
//
// Plain structs and raw pointers; torch lives in gated_bridge_binding.cpp only. Sizes are in
// elements, strides in bytes. Names: M rows, H features of a state, C of a context.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "core/format.h"
#include "core/product_plan.h"

namespace encdec::bridge {

// How the packed weights begin; byte offsets from there. The gate's weight is two matrices, for the
// state and for the context, so that each may be staged, and in int8 scaled, by itself.
struct PackedHeader {
  static constexpr uint64_t kMagic = 0x656e636465636762ull;
  uint64_t magic;
  uint64_t fingerprint;  // of the weights it was made from
  Isa isa;
  Format format;
  int64_t H, C, bytes;
  MatrixPlace state_gate, context_gate, candidate;
};

struct GatedBridge {
  Format dtype;  // of every tensor
  int64_t M = 0, H = 0, C = 0;
  const char* packed = nullptr;
  const char* state = nullptr;  // (M, H)
  int64_t state_stride = 0;
  const char* context = nullptr;  // (M, C)
  int64_t context_stride = 0;
  const char* bias = nullptr;  // [H]; null: none
  char* output = nullptr;      // (M, H), as g and u
  char* gate = nullptr;        // g and u, for backward; null: not wanted
  char* candidate = nullptr;
  int64_t output_stride = 0;
  ProductPlan plan;
  char* workspace = nullptr;
};

// What one instruction set offers. The packed form differs between instruction sets.
struct Kernels {
  int64_t (*packed_bytes)(int64_t H, int64_t C, Format format);
  // gate: (H, H + C); candidate: (H, C), of the same dtype.
  void (*pack)(const Weight& gate, const Weight& candidate, Format format, int threads,
               char* packed);
  int64_t (*workspace)(const GatedBridge&);
  void (*run)(const GatedBridge&);
};

const Kernels& kernels(Isa isa);

// Threads and chunks of a call, where `available` threads may be had.
void plan(GatedBridge& call, Format format, int available);

namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}

}  // namespace encdec::bridge
