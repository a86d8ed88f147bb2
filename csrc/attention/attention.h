// Scaled dot-product attention over heads: softmax(scale * q k' + bias) v, with masks.
//
// Plain structs and raw pointers; torch lives in attention_binding.cpp only. Sizes are in elements,
// strides in bytes. Names: B batch, H query heads, G key heads (H a multiple of G: H / G query
// heads share one), Tq queries, S keys, D size of a query and key, V size of a value.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "core/format.h"

namespace encdec::attention {

// A tensor (B, heads, rows, size); the last dimension is contiguous.
struct Heads {
  char* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;

  char* at(int64_t b, int64_t h, int64_t row) const {
    return data + b * batch_stride + h * head_stride + row * row_stride;
  }
};

// What is added to the scores, or which of them count: (B or 1, H or 1, Tq or 1, S or 1), with the
// stride 0 along what is shared.
struct ScoreTensor {
  const char* data = nullptr;  // null: none
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0, key_stride = 0;

  const char* at(int64_t b, int64_t h, int64_t t) const {
    return data + b * batch_stride + h * head_stride + t * row_stride;
  }
};

struct Attention {
  int64_t B, H, G, Tq, S, D, V;
  Format dtype;
  Heads query, key, value, output;
  float scale = 1.0f;
  bool causal = false;               // query t sees keys up to t
  const int64_t* lengths = nullptr;  // [B] keys that count, 0 to S; null: all
  ScoreTensor mask;                  // bytes: 0 where a key does not count
  ScoreTensor bias;                  // of `dtype`
  float* weights = nullptr;          // [B][H][Tq][S]; null: not wanted
  int threads = 1;
  bool packed = false;      // keys and values are packed for the matrix product first
  int64_t query_rows = 1;   // that a member takes at a time
  int64_t round_heads = 1;  // (b, key head) pairs that are packed at a time
  char* workspace = nullptr;

  int64_t keys_of(int64_t b) const { return lengths ? lengths[b] : S; }
};

// One for each instruction set.
struct AttentionKernels {
  int64_t (*workspace)(const Attention&);
  void (*run)(const Attention&);
};

const AttentionKernels& attention_kernels(Isa isa);

// How a call is cut, where `available` threads may be had.
void plan(Attention& call, int available);

namespace avx2 {
extern const AttentionKernels kAttentionKernels;
}
namespace avx512 {
extern const AttentionKernels kAttentionKernels;
}
namespace avx512_bf16 {
extern const AttentionKernels kAttentionKernels;
}

}  // namespace encdec::attention
