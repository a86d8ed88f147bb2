// Scaled dot-product attention over heads: softmax(scale * q k' + bias) v, with masks and dropout.
//
// Plain structs and raw pointers; torch lives in attention_binding.cpp only. Sizes are in elements,
// strides in bytes. Names: B batch, H query heads, G key heads (H a multiple of G: H / G query
// heads share one), Tq queries, S keys, D size of a query and key, V size of a value.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "core/format.h"

namespace encdec::attention {

// A tensor (B, heads, rows, size), the last dimension contiguous; or, with `starts`, sentences one
// behind the other: sentence b has the rows from starts[b] to starts[b + 1].
struct Heads {
  char* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
  const int64_t* starts = nullptr;

  char* at(int64_t b, int64_t h, int64_t row) const {
    const int64_t sentence = starts ? starts[b] * row_stride : b * batch_stride;
    return data + sentence + h * head_stride + row * row_stride;
  }
  int64_t rows(int64_t b) const { return starts[b + 1] - starts[b]; }
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
  int64_t B, H, G, Tq, S, D, V;  // Tq and S of the longest sentence
  Format dtype;
  Heads query, key, value, output;
  float scale = 1.0f;
  bool causal = false;               // query t sees keys up to t
  const int64_t* lengths = nullptr;  // [B] keys that count, 0 to S; null: all
  ScoreTensor mask;                  // bytes: 0 where a key does not count
  ScoreTensor bias;                  // of `dtype`
  double dropout = 0.0;              // the probability with which a weight is dropped, below 1
  uint64_t seed = 0;                 // of dropout: core/random.h; row (b * H + h) * Tq + t
  float* weights = nullptr;          // [B][H][Tq][S], or their mean [B][Tq][S]; null: not wanted
  bool average = false;
  int threads = 1;
  bool packed = false;      // keys and values are packed for the matrix product first
  int64_t query_rows = 1;   // that a member takes at a time
  int64_t round_heads = 1;  // (b, key head) pairs that are packed at a time
  bool apart = false;       // a member packs the heads that it takes, for itself alone
  char* workspace = nullptr;

  int64_t queries_of(int64_t b) const { return query.starts ? query.rows(b) : Tq; }
  int64_t keys_of(int64_t b) const { return key.starts ? key.rows(b) : lengths ? lengths[b] : S; }
};

struct AttentionBackward {
  Attention forward;                    // its inputs; `average` tells of grad_weights
  Heads grad_output;                    // data null: zero
  const float* grad_weights = nullptr;  // [B][H][Tq][S] or [B][Tq][S]; null: zero
  Heads grad_query, grad_key, grad_value;
  // float, with the bias's sizes: strides in floats, 0 along what is shared. data null: not wanted.
  float* grad_bias = nullptr;
  int64_t grad_bias_size = 0;
  int64_t bias_batch = 0, bias_head = 0, bias_row = 0, bias_key = 0;
  char* workspace = nullptr;
};

// One for each instruction set.
struct AttentionKernels {
  int64_t (*heads_of_unit)(const Attention&);  // with one query each, taken together; else 1
  int64_t (*workspace)(const Attention&);
  void (*run)(const Attention&);
  int64_t (*backward_workspace)(const AttentionBackward&);
  void (*backward)(const AttentionBackward&);
};

const AttentionKernels& attention_kernels(Isa isa);

// How a call is cut, where `available` threads may be had.
void plan(Attention& call, int available);
void plan_backward(Attention& call, int available);

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
