// A layer's recurrence on a GPU in one launch: what a call consists of, and how it is cut.
//
// The products with the input are there already (torch's, for all steps at once). What is left is a
// chain of steps, each a small product with the recurrent weights, which never move: a *group* of
// blocks holds those of one direction in registers and shared memory, each block the rows of its
// own hidden units, and steps a *slice* of the sequences. After a step the blocks of a group send
// each other what they computed: the state, in backward the gates' gradients.
//
//   block     16 * row_groups hidden units
//   warp      one row group, and every k_groups-th tile of the product's columns
//   tile      sequences that a warp multiplies by its weights at once
//   chunk     sequences between two barriers of a row group: some tiles
//
// Layers of one direction may share a launch, without gradients: each has groups of its own, which
// multiply what the layer below hands up by weights that stay as well, one step behind it or more.
//
// Plain structs and raw pointers. Names are those of rnn.h; shapes beside pointers, rows of numbers
// contiguous.
#pragma once

#include <cstdint>
#include <string>

#include "core/format.h"
#include "rnn/rnn.h"

namespace encdec::rnn::gpu {

constexpr int kUnits = 16;       // hidden units of a row group: the rows of a tensor cores' tile
constexpr int kMaxCluster = 16;  // blocks
constexpr int kMaxWarps = 8;     // of a block, so that each thread may have 255 registers
constexpr int kTileBytes = 64;   // of a state's row: the columns that a warp takes at once
constexpr int kTensorCoresTile = 8;
constexpr int kRowMultiple = 8;     // of numbers in a row of weights; zeros fill it up
constexpr int kPasses = 2;          // elements of a chunk that one thread works out
constexpr int kCounterBytes = 128;  // of a group: a cache line, so that groups do not meet there

// Which steps there are and where they lie. A row is one step of one sequence; tensors of the
// caller are padded, and hold a row at its place. Sequences are in order of falling length.
struct Steps {
  int32_t T, B, H, directions;
  int64_t rows;            // that the tensors made for the kernel have room for
  int64_t step, sequence;  // place = t * step + order[n] * sequence
  const int32_t* lengths;  // [B], or null: T
  const int64_t* starts;   // [T] row = starts[t] + n; null: the row is the place
  const int64_t* order;   // [B] sequence n's own number, or null: n. With starts, null: place = row
  const uint8_t* resets;  // [rows] the state before this row is zero; or null
};

// D is the number of directions, or of layers, if there is more than one.
struct Forward {
  Steps steps;
  int32_t layers;         // 1, or more of one direction
  const float* products;  // [rows][D][gates][H] of the input, with the biases; of the first layer
  const void* weight;     // [D][gates * H][H, to the next multiple of kRowMultiple]
  const float* bias;      // GRU: [D][H], what is added to the new gate's product of h; or null
  const void* h0;         // [D][B][H], or null: zeros
  float* c;               // LSTM: [D][B][H], the cell state before and after
  void* output;           // [places][D][H]; of the last layer alone
  void* cells;            // LSTM: the same, or null
  void* gates;            // [D][rows][4][H], or null where no gradient is needed
  void* h_n;              // [D][B][H]
  // Of layers above the first; else null:
  const void* input_weight;  // [layers - 1], like weight
  const float* input_bias;   // [layers - 1][gates][H], or null
  void* handed_up;           // [layers - 1][rows][row of weight]: states of all but the last layer
  uint32_t* finished;        // [layers - 1][slices][blocks] steps that are; zeros before it
};

struct Backward {
  Steps steps;
  const void* grad_output;  // [places][D][H], or null
  const void* grad_h_n;     // [D][B][H], or null
  const void* grad_cells;   // LSTM: like grad_output, or null
  const void* weight;       // the same with each gate's part transposed
  const void* gates;
  const void* output;
  const void* cells;
  const void* h0;
  const void* c0;
  void* grads;     // [rows][D][4][H]: of what enters the gates. The GRU's new gate has two: of the
                   // product with x, and last, times r, of that with h
  void* previous;  // [rows][D][H]: the state before each step
  float* carry;    // [D][B][H]: what passes a step without a product; LSTM: of c, GRU: of h
  void* grad_h0;   // [D][B][H], or null
};

// What a device has; bytes are per block.
struct Limits {
  int32_t capability;    // 10 * major + minor
  int32_t processors;    // multiprocessors
  int32_t shared_bytes;  // that a kernel may ask for
  int32_t
      clusters[kMaxCluster + 1];  // of so many blocks each, that run at the same time; [0] unused
};

struct Shape {
  Cell cell;
  Format dtype;
  bool backward;
  int32_t B, H, directions;
  int32_t layers = 1;

  // Groups of a slice.
  constexpr int32_t stacked() const { return directions * layers; }
};

struct Plan {
  bool cluster;        // the state goes through distributed shared memory; else through L2
  int32_t tile;        // sequences: 8 on tensor cores; 1 or 4 as plain multiply-adds
  int32_t blocks;      // of a group
  int32_t row_groups;  // of a block
  int32_t k_groups;    // warps that share a row group
  int32_t chunk;       // sequences, whole tiles
  int32_t slice;       // sequences of a group
  int32_t launch;      // sequences of a launch
  int32_t shared_bytes;
  double microseconds;  // of a step, predicted

  int32_t slices(int32_t B) const { return (B + slice - 1) / slice; }
  int32_t threads() const { return 32 * row_groups * k_groups; }
};

// Where a block's shared memory has what, in bytes; the kernel and the planner read it here.
struct SharedLayout {
  int32_t row_bytes;  // from one row of the state to the next: conflict-free for 16-byte reads
  int32_t width;      // columns of the product, whole tiles
  int32_t tiles;      // width in tiles
  int32_t spilled;    // tiles of a warp that do not fit its registers, of each gate
  int32_t below;      // those of the product with the layer below, none of them in registers
  int32_t state, state_bytes, weights, partials, partials_below, carry, sequences, barriers;
  int32_t handed;  // what the layer below handed up, like a buffer of the state
  int32_t bytes;
};

// Tiles of weights that a warp keeps in registers, eight of each; float32 needs more for its parts.
constexpr int resident_tiles(int element_bytes) { return element_bytes == 4 ? 12 : 16; }

constexpr int tiles_of_unit(Cell cell, bool backward) { return backward ? 1 : gate_count(cell); }
constexpr int published(Cell cell, bool backward) { return backward ? gate_count(cell) : 1; }
constexpr int kPartialStride =
    kUnits + 4;  // floats; so that a tile's columns miss each other's banks

constexpr SharedLayout shared_layout(const Shape& shape, const Plan& plan) {
  SharedLayout s{};
  const int32_t bytes = element_bytes(shape.dtype), per_tile = kTileBytes / bytes;
  const int32_t gates = tiles_of_unit(shape.cell, shape.backward);
  const int32_t segments = published(shape.cell, shape.backward);
  // Each published segment starts at a tile, so that a tile's columns are of one.
  const int32_t segment = (shape.H + per_tile - 1) / per_tile * per_tile;
  s.width = segments * segment;
  s.tiles = s.width / per_tile;
  s.row_bytes = (s.tiles | 1) * kTileBytes;
  const int32_t mine = (s.tiles + plan.k_groups - 1) / plan.k_groups,
                kept = resident_tiles(bytes) / gates;
  s.spilled = mine > kept ? mine - kept : 0;
  s.below = shape.layers > 1 ? mine : 0;
  const int32_t warps = plan.row_groups * plan.k_groups;
  const int32_t rows = (plan.slice + plan.chunk - 1) / plan.chunk * plan.chunk;
  int32_t at = 0;
  const auto take = [&](int32_t size) {
    const int32_t here = at;
    at += (size + 127) / 128 * 128;
    return here;
  };
  s.state_bytes = rows * s.row_bytes;
  s.state = take(s.state_bytes * (plan.cluster ? 2 : 1));
  s.weights = take(warps * (s.spilled + s.below) * gates * kUnits * kTileBytes);
  const int32_t partials = warps * gates * plan.chunk * kPartialStride * 4;
  s.partials = take(partials);
  s.partials_below = take(shape.layers > 1 ? partials : 0);
  s.carry = take(plan.slice * plan.row_groups * kUnits * 4);
  s.sequences = take(plan.slice * 8);
  s.barriers = take(plan.cluster ? 16 : 0);
  s.handed = take(shape.layers > 1 ? s.state_bytes : 0);
  s.bytes = at;
  return s;
}

// The plan that should be fastest, or the reasons against all of them.
bool make_plan(const Shape& shape, const Limits& limits, Plan& plan, std::string& why_not);

// Whether a plan may be launched, whoever made it; else why not.
std::string refuse(const Shape& shape, const Limits& limits, const Plan& plan);

// Why steps whose weights are read anew should be faster than the plan's; empty where they are not.
std::string slower(const Shape& shape, const Plan& plan);

// What runs, in words.
std::string describe(const Shape& shape, const Plan& plan);

// Bytes of global memory that a launch exchanges states through, zeros before it: those of the form
// through L2, and behind them, of layers, `finished`.
int64_t exchange_bytes(const Shape& shape, const Plan& plan);
int64_t finished_bytes(const Shape& shape, const Plan& plan);

// How many clusters of so many blocks, each with a multiprocessor for itself, run at the same time
// on the current device; 0 for sizes that it does not have.
int max_clusters(int blocks);

// Launches, on a stream (cudaStream_t), all sequences of a call. Throws std::runtime_error with
// CUDA's own words.
void lstm_forward(const Forward& f, const Shape& shape, const Plan& plan, void* exchange,
                  void* stream);
void lstm_backward(const Backward& b, const Shape& shape, const Plan& plan, void* exchange,
                   void* stream);
void gru_forward(const Forward& f, const Shape& shape, const Plan& plan, void* exchange,
                 void* stream);
void gru_backward(const Backward& b, const Shape& shape, const Plan& plan, void* exchange,
                  void* stream);

}  // namespace encdec::rnn::gpu
