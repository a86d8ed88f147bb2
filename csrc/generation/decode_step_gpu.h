// A step of a recurrent decoder with attention on a GPU in one launch, for few rows.
//
// What encdec_fast/generation/decoders.py describes as RecurrentDecoder: cells, attention over the
// memory, scores of all tokens. Every weight is read once and by the whole device, which is what
// such a step costs; a barrier of the grid stands between what depends on each other:
//
//   layer 0 | query | attention | layers 1 ... | scores, and the new states to their places
//
// Plain structs and raw pointers; T is the dtype of weights, states and memory. R rows: the
// hypotheses of B sentences, K of each.
#pragma once

#include <cstdint>
#include <string>

#include "core/format.h"
#include "rnn/rnn.h"

namespace encdec::generation::gpu {

constexpr int kMaxLayers = 8;
constexpr int kMaxRows = 8;      // whose sums a thread keeps in registers
constexpr int kThreads = 256;    // of a block
constexpr int kOutputs = 4;      // rows of weights that a warp multiplies at once
constexpr int kRowMultiple = 8;  // of numbers in a row of weights or memory

enum class Attention : int32_t { kNone = 0, kAdditive = 1, kDot = 2 };

struct Layer {
  const void* input;        // [gates * H][inputs]
  const void* hidden;       // [gates * H][H]
  const void* input_bias;   // [gates * H], or null
  const void* hidden_bias;  // the same
};

struct DecodeStep {
  rnn::Cell cell;  // LSTM or GRU
  Attention attention;
  bool context_in_output;
  int32_t layers, R, K, S, E, H, M, A, V;
  const int64_t* tokens;   // [R], of the embedding; those beyond its ends are the nearest
  const int64_t* parents;  // [R] the row that each continues
  const void* embedding;   // [V][E]
  Layer layer[kMaxLayers];
  const void* query;        // [A][H], or null: the state itself
  const void* query_bias;   // [A], or null
  const void* score;        // [A], additive
  const void* keys;         // [B][S][A]
  const void* values;       // [B][S][M]
  const int64_t* lengths;   // [B], each from 0 to S
  const void* output;       // [V][H + M, or H]
  const void* output_bias;  // [V], or null
  void* h;                  // [layers][R][H] before, and after the step
  void* c;                  // LSTM: the same
  void* context;            // [R][M]
  void* logits;             // [R][V]
  void* weights;            // [R][S] of the attention, or null
  // Of the launch alone: zeros before it; floats that blocks leave for each other.
  uint32_t* arrived;
  float* between;
};

// Floats of `between`: new h and c of each layer, the query, the context.
struct Between {
  int64_t h, c, query, context, count;
};

constexpr Between between(const DecodeStep& s) {
  const int64_t states = static_cast<int64_t>(s.layers) * s.R * s.H;
  const int64_t query = static_cast<int64_t>(s.R) * s.A, context = static_cast<int64_t>(s.R) * s.M;
  return {0, states, 2 * states, 2 * states + query, 2 * states + query + context};
}

// Features that a layer reads: the first [embedding; context], the second [state; context] where
// there is attention, the others the state below.
constexpr int32_t inputs_of(const DecodeStep& s, int layer) {
  if (layer == 0) return s.E + s.M;
  return layer == 1 && s.attention != Attention::kNone ? s.H + s.M : s.H;
}

constexpr int32_t output_inputs(const DecodeStep& s) {
  return s.context_in_output ? s.H + s.M : s.H;
}

// Rows that the kernel is compiled for, of which some may be empty.
constexpr int32_t padded_rows(int32_t R) { return R == 1 ? 1 : R <= 4 ? 4 : kMaxRows; }

// Bytes of shared memory of a block: the inputs of all rows of the widest product, as floats; and
// the scores of one row.
int64_t shared_bytes(const DecodeStep& s);

// Why it cannot run on a device with so much shared memory for a block; empty where it can.
std::string refuse(const DecodeStep& s, int64_t device_shared_bytes);

// Launches on a stream (cudaStream_t), on `blocks` multiprocessors. Throws std::runtime_error with
// CUDA's own words.
void decode_step(const DecodeStep& s, Format dtype, int blocks, void* stream);

}  // namespace encdec::generation::gpu
