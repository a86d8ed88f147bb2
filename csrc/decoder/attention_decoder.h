// A recurrent decoder that attends to a memory and feeds what it found into its next step:
//
//     h_t = cell([x_t; f_{t-1}], h_{t-1})        f_t = attention(W_q h_t, memory)
//
// With W_o, f_t = tanh(W_o [attention(W_q h_t, memory); h_t]). Location attention, whose scores are
// made of x and h alone, comes before the step: f_t = attention(p_t + W_q h_{t-1}, memory), and
// f_t enters the step in place of f_{t-1}.
//
// The recurrent kernels run it, with h as their state; here stands what they are given beside it:
// attention once per step, and the product of f with its columns of W_ih.
//
// Plain structs and raw pointers; torch lives in attention_decoder_binding.cpp only. Sizes are in
// elements, strides in bytes. Names: B batch, T steps, S keys, A attention size (of location: the
// positions that have scores), M size of a value, F of what is fed.
#pragma once

#include "attention/additive.h"
#include "rnn/rnn.h"

namespace encdec::decoder {

enum class Score : int32_t { kAdditive = 0, kDot = 1, kLocation = 2 };

struct Memory {
  const char* feed_weight = nullptr;  // the columns of W_ih that meet f: (gates H, F)
  int64_t feed_stride = 0;            // elements
  const char* context0 = nullptr;     // [B][F]; location: not read
  Score score = Score::kAdditive;
  int64_t S = 0, A = 0, M = 0, F = 0;
  float scale = 1.0f;                   // of a dot product
  const char* query_weight = nullptr;   // W_q (A, H); null: the query is h itself, A = H
  int64_t query_stride = 0;             // elements
  const char* score_weight = nullptr;   // v [A], additive
  attention::Rows keys, values;         // (B, S, A), none of location; (B, S, M)
  attention::Rows positions;            // (B, T, A): p, of location
  const char* output_weight = nullptr;  // W_o (F, M + H); null: f is the context, F = M
  int64_t output_stride = 0;            // elements
  // With coverage, key s of step t is k_s + c_ts u, c_t the sum of the weights before t:
  const char* coverage = nullptr;         // [B][S]: c before the first step
  const char* coverage_weight = nullptr;  // u [A]; null: there is no coverage
  const int64_t* lengths = nullptr;       // [B] keys that count, 0 to S; null: all

  bool located() const { return score == Score::kLocation; }
  bool covered() const { return coverage_weight; }  // an empty memory's coverage may be null
  int64_t keys_of(int64_t b) const { return lengths ? lengths[b] : S; }
  // Numbers in a row of weights, and those that a sentence's softmax goes over: of location without
  // lengths all positions, whether there is a key or not.
  int64_t weights_size() const { return located() ? A : S; }
  int64_t weights_of(int64_t b) const { return located() && !lengths ? A : keys_of(b); }
};

struct Forward {
  rnn::Forward rnn;
  Memory memory;               // f_t goes behind h_t in a row of the output
  float* weights = nullptr;    // [B][T][weights_size]
  char* queries = nullptr;     // [B][T][A], of the call's dtype; null: not wanted
  char* contexts = nullptr;    // [B][T][M] likewise, where f is not the context
  float* coverages = nullptr;  // [B][T][S]: c, with coverage; null: not wanted
  char* workspace = nullptr;
};

struct Backward {
  rnn::Backward rnn;
  Memory memory;
  const float* weights = nullptr;       // as forward left them
  const char* queries = nullptr;        // likewise
  const char* contexts = nullptr;       // likewise
  const float* coverages = nullptr;     // likewise
  const float* grad_weights = nullptr;  // [B][T][weights_size]; null: zero
  char* grad_context = nullptr;         // [B][T][M]: of all that the context went into
  char* grad_context0 = nullptr;        // [B][F]
  char* grad_feed_weight = nullptr;     // (gates H, F)
  char* grad_query_weight = nullptr;    // (A, H); null without W_q
  char* grad_positions = nullptr;       // [B][T][A], of location
  char* grad_output_context = nullptr;  // (F, M) and (F, H): W_o's
  char* grad_output_state = nullptr;
  // With coverage, what the keys' changes from step to step forbid to make at the end:
  char* grad_keys = nullptr;             // [B][S][A]
  char* grad_score_weight = nullptr;     // [A]
  char* grad_coverage = nullptr;         // [B][S]
  char* grad_coverage_weight = nullptr;  // [A]
  char* workspace = nullptr;
};

// One for each instruction set. The workspaces are those of attention; rnn's have their own.
struct DecoderKernels {
  int64_t (*forward_workspace)(const Forward&);
  void (*forward)(const Forward&);
  int64_t (*backward_workspace)(const Backward&);
  void (*backward)(const Backward&);
};

const DecoderKernels& decoder_kernels(Isa isa);

namespace avx2 {
extern const DecoderKernels kDecoderKernels;
}
namespace avx512 {
extern const DecoderKernels kDecoderKernels;
}
namespace avx512_bf16 {
extern const DecoderKernels kDecoderKernels;
}

}  // namespace encdec::decoder
