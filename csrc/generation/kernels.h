// The steps of decoders, and the scan of their scores: what one instruction set offers.
//
// Plain structs and raw pointers. Everything between products is float32, whatever the weights'
// format; only a Transformer's keys and values are kept as bfloat16 where its weights are coarser
// than float32, since a step of many rows reads more of them than of weights. Names: D model size,
// H hidden size, V vocabulary, S source positions, F feed-forward size.
#pragma once

#include "core/cpu_features.h"
#include "core/format.h"
#include "linear/linear.h"
#include "rnn/rnn.h"

namespace encdec::generation {

// y = x W' + b, W packed as linear's are.
struct Projection {
  const char* packed = nullptr;
  const float* bias = nullptr;  // [N, up to whole vectors]; null: none
  int64_t N = 0, K = 0;
};

struct NormWeights {
  linear::Norm kind = linear::Norm::kNone;
  const float* weight = nullptr;  // [D, up to whole vectors]
  const float* bias = nullptr;    // likewise; null: none
  float eps = 0.0f;
};

// Rows of an embedding as they lie in the model.
struct Table {
  const char* data = nullptr;
  Format dtype = Format::kFloat32;
  int64_t row_stride = 0;  // bytes
  int64_t rows = 0;
};

// In which a Transformer's keys and values are kept.
constexpr Format kept_format(Format weights) {
  return weights == Format::kFloat32 ? Format::kFloat32 : Format::kBfloat16;
}

struct TransformerLayer {
  NormWeights self_norm, cross_norm, feed_norm;
  Projection self_query, self_key, self_value, self_out;
  Projection cross_query, cross_out;
  Projection up, gate, down;  // gate.N = 0: none
  // In kept_format, of each sentence and head: keys as a packed matrix of head_size by S, values
  // [S][head_size].
  const char *memory_keys = nullptr, *memory_values = nullptr;
};

// Keys and values of all layers for a batch of memories.
struct TransformerMemory {
  const Projection* projections = nullptr;  // [layers][2]: to keys, to values
  int64_t layers = 0, heads = 0, head_size = 0;
  const float* memory = nullptr;  // [B S][size]
  int64_t B = 0, S = 0, size = 0;
  char* to = nullptr;  // [layers]: keys, then values
  Format format = Format::kFloat32;
  int threads = 1;
  char* workspace = nullptr;
};

// In bytes: of one layer's keys, of its values, and for the work.
struct TransformerMemorySizes {
  int64_t keys = 0, values = 0, workspace = 0;
};

// What a step finds in its rows of scores while they are in cache: the logarithm of the sum of
// e^row (NaN where a number is NaN or +infinity, 0 where all are -infinity), and the `kept` largest
// numbers with their places, in falling order, of equal ones the first; `counts` of them, if fewer
// are above -infinity.
struct RowScans {
  int64_t kept = 0;  // at most kMostKept
  float* log_sums = nullptr;
  float* numbers = nullptr;   // [rows][kept]
  int32_t* places = nullptr;  // [rows][kept]
  int32_t* counts = nullptr;
};
constexpr int64_t kMostKept = 64;

// The layer that makes scores. With a shortlist it has the columns of these tokens only, in rising
// order, and what a row of scores has at other tokens stays.
struct OutputLayer {
  Projection projection;            // of the state
  Projection context;               // of a recurrent decoder's context; N = 0: it is not read
  const int32_t* tokens = nullptr;  // [projection.N]; null: all, in order
};

// What a step writes.
struct StepScores {
  float* logits = nullptr;  // [rows][stride]: of the next token
  int64_t stride = 0;
  float* attention = nullptr;  // [rows][S]; null: not wanted
  RowScans scans;
  // With `few`, only the scores of these tokens, in rising order, will be read: a decoder that
  // scans need not write others.
  bool few = false;
  const int32_t* few_tokens = nullptr;
  int64_t few_count = 0;
};

struct TransformerStep {
  // The model.
  int64_t D = 0, heads = 0, head_size = 0, F = 0, V = 0;  // heads * head_size may differ from D
  bool norm_first = false;
  linear::Activation activation = linear::Activation::kRelu;
  float attention_scale = 1.0f, embedding_scale = 1.0f, output_scale = 1.0f;
  Table embedding, positions;  // positions.data null: none
  int64_t position_offset = 0;
  NormWeights embedding_norm, final_norm;
  const float* position_bias = nullptr;  // [heads][bias_length] by distance; null: none
  int64_t bias_length = 0;
  const TransformerLayer* layers = nullptr;
  int64_t layer_count = 0;
  OutputLayer output;

  // The batch.
  int64_t S = 0;
  const int64_t* memory_lengths = nullptr;  // [B]

  // The step.
  int64_t rows = 0, position = 0;
  const int32_t* tokens = nullptr;
  const int32_t* sentences = nullptr;
  // Keys and values of each position that was fed, in kept_format: [layer][2][cache_rows][heads
  // head_size].
  char* const* cache = nullptr;
  int64_t cache_rows = 0;
  const int32_t* ancestors = nullptr;  // [rows][ancestor_stride]: the cache row of each position
  int64_t ancestor_stride = 0;
  StepScores scores;  // attention: of the last layer, the mean of its heads

  Format format = Format::kFloat32;
  int threads = 1;
  char* workspace = nullptr;
};

// Gates: the sum of what three products give.
struct RecurrentLayer {
  rnn::Cell cell = rnn::Cell::kLstm;
  Projection input;    // of the token's embedding, or of the state below
  Projection context;  // N = 0: it is not read
  Projection hidden;   // of the state before
  // In place of the input's product, layer 0: [V][gates * H] by token; null: none.
  const float* token_gates = nullptr;
};

enum class Attention : int32_t { kNone = 0, kAdditive = 1, kDot = 2, kLocation = 3 };

// A product W c with the context by way of the memory: c is the sum of w(s) m(s), so that W c is
// the sum of w(s) W m(s). Where a sentence is short, rows of W m(s) are less to read than W, and to
// sum them less than to multiply. Of each sentence a row for what stands in for the first context,
// then one for each position.
struct ContextRows {
  const float* data = nullptr;  // null: W is multiplied
  int64_t stride = 0;           // floats
};
// Who reads the context.
enum ContextReader { kFirstLayer, kSecondLayer, kOutput, kAttentional, kContextReaders };

// Layer 0 reads [token's embedding; context], the others the state below them; the first of them
// beside it the context, where there is attention. With an attentional vector (Luong et al., 2015,
// eq. 5), f = tanh(W [c; h]) of the lowest layer's h, all of them read it in the context's place.
struct RecurrentStep {
  int64_t E = 0, H = 0, M = 0, A = 0, V = 0;  // M: of the context
  int64_t F = 0;                              // of the context, or of what stands in its place
  Table embedding;
  const RecurrentLayer* layers = nullptr;
  int64_t layer_count = 0;
  Attention attention_kind = Attention::kNone;
  Projection query;                           // N = 0: the query is the state itself
  const float* score = nullptr;               // v [A], additive
  Projection location;                        // [embedding; state] to scores of positions
  Projection attentional, attentional_state;  // W's parts for c and for h; N = 0: none
  // u [A]: key s is k_s + c_s u, c_s the sum of its weights so far (additive); null: no coverage.
  const float* coverage_weight = nullptr;
  OutputLayer output;

  int64_t B = 0, S = 0;
  const int64_t* memory_lengths = nullptr;  // [B]
  const float* keys = nullptr;              // (B, S, A)
  const float* values = nullptr;            // (B, S, M)
  char* memory_rows = nullptr;              // what `prepare` makes of the keys for all steps
  ContextRows context_rows[kContextReaders];
  const int64_t* first_rows = nullptr;  // [B]: of each sentence, in all of them
  bool multiplies_context = true;       // whether somebody multiplies the sum itself
  int64_t weights_stride = 0;

  int64_t rows = 0;
  const int32_t* tokens = nullptr;
  const int32_t* parents = nullptr;  // rows of the states before
  const int32_t* sentences = nullptr;
  // [layer][row][H] before and after; c for LSTM only; context [row][F]; weights
  // [row][weights_stride]: of the rows of its sentence in context_rows; coverage likewise.
  const float *h_before = nullptr, *c_before = nullptr, *context_before = nullptr;
  const float *weights_before = nullptr, *coverage_before = nullptr;
  float *h = nullptr, *c = nullptr, *context = nullptr, *weights = nullptr, *coverage = nullptr;
  int64_t state_rows = 0;  // rows that a layer's states have room for
  StepScores scores;

  Format format = Format::kFloat32;
  int threads = 1;
  char* workspace = nullptr;
};

struct Kernels {
  // Row 0 of `scans`, as a step would fill it in; any number may be kept.
  void (*scan_row)(const float* row, int64_t size, const RowScans& scans);
  TransformerMemorySizes (*transformer_memory_sizes)(const TransformerMemory&);
  void (*transformer_memory)(const TransformerMemory&);
  int64_t (*transformer_workspace)(const TransformerStep&);
  void (*transformer_step)(const TransformerStep&);
  // The keys as the steps read them: bytes, and the work, once for a memory.
  int64_t (*recurrent_memory)(const RecurrentStep&);
  void (*prepare_memory)(const RecurrentStep&);
  int64_t (*recurrent_workspace)(const RecurrentStep&);
  void (*recurrent_step)(const RecurrentStep&);
};

const Kernels& kernels(Isa isa);

namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}

}  // namespace encdec::generation
