// One layer of an LSTM, GRU or Elman RNN over whole sequences: what a call consists of.
//
// Plain structs and raw pointers; torch lives in rnn_binding.cpp only. Sizes are in elements and
// strides in bytes unless a name says otherwise. Names: T steps, B sequences, I input size, H
// hidden size, P output size (H, or the projection's size).
//
// Rows. Sequences of unequal length are taken in order of falling length, so that the rows that are
// still running at a step are always the first `active(t)` ones. `order[r]` is the batch position
// of row r. Buffers that backward reads hold only real steps: entry `row_start(t) + r`.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cpu_features.h"
#include "core/format.h"

namespace encdec::rnn {

enum class Cell : int32_t { kLstm = 0, kGru = 1, kTanh = 2, kRelu = 3 };

constexpr int gate_count(Cell c) { return c == Cell::kLstm ? 4 : c == Cell::kGru ? 3 : 1; }

// Numbers per hidden unit that backward reads beside the output: LSTM i f g o; GRU r z n and the
// recurrent part of the new gate before r multiplies it.
constexpr int saved_gates(Cell c) { return c == Cell::kLstm || c == Cell::kGru ? 4 : 0; }

struct Shape {
  Cell cell;
  int64_t T, B, I, H, P;
  bool projected;  // P is the size of h = W_hr m, m the cell's own output
};

// Of `n` rows, those that are first, first + every, ...: as many.
__attribute__((always_inline)) constexpr int64_t rows_apart(int64_t n, int64_t first,
                                                            int64_t every) {
  return (n - first + every - 1) / every;
}

// A member of a team may walk sequences of its own: rows `first`, `first + every`, ... of every
// step are its rows 0, 1, ...; `active` and `row` are about these.
struct Sequences {
  int64_t T = 0, B = 0;
  const int64_t* sizes = nullptr;   // [T] rows running at each step, not rising; null: always B
  const int64_t* starts = nullptr;  // [T + 1] their running sum; null with sizes null
  const int64_t* order = nullptr;   // [B] row -> batch position; null: the same
  bool packed = false;              // tensors hold the rows of each step one behind the other
  int64_t first = 0, every = 1;

  __attribute__((always_inline)) int64_t active(int64_t t) const {
    const int64_t all = sizes ? sizes[t] : B;
    return every == 1 ? all : rows_apart(all, first, every);
  }
  __attribute__((always_inline)) int64_t row(int64_t r) const { return first + r * every; }
  __attribute__((always_inline)) int64_t row_start(int64_t t) const {
    return starts ? starts[t] : t * B;
  }
  int64_t rows() const { return row_start(T); }
  __attribute__((always_inline)) int64_t position(int64_t r) const {
    return order ? order[row(r)] : row(r);
  }
};

// A tensor of one vector per step and row; the last dimension is contiguous.
struct StepTensor {
  char* data = nullptr;
  int64_t step_stride = 0;
  int64_t row_stride = 0;

  // Inlined wherever it is used: a kernel's copy must not be linked into other code.
  __attribute__((always_inline)) char* at(const Sequences& s, int64_t t, int64_t r) const {
    if (s.packed) return data + (s.row_start(t) + s.row(r)) * row_stride;
    return data + t * step_stride + s.position(r) * row_stride;
  }
};

// Weights of one direction as torch holds them; the matrices' rows may be strided.
struct Weights {
  Format dtype;
  const char* ih = nullptr;  // (G H, I)
  const char* hh = nullptr;  // (G H, P)
  const char* b_ih = nullptr;
  const char* b_hh = nullptr;
  const char* hr = nullptr;                             // (P, H)
  int64_t ih_stride = 0, hh_stride = 0, hr_stride = 0;  // elements
};

// Forward of one direction. The states are (B, size), contiguous, in batch positions.
struct Direction {
  const char* packed = nullptr;       // the direction's weights, as pack() left them
  const Weights* unpacked = nullptr;  // W_ih and W_hh, where pack() left them to forward()
  bool reverse = false;
  const char* h0 = nullptr;  // null: zeros
  const char* c0 = nullptr;
  StepTensor output;
  StepTensor cells;  // data null: not wanted
  char* h_n = nullptr;
  char* c_n = nullptr;
  char* gates = nullptr;  // [rows][saved_gates][H]; null: not wanted
};

struct Forward {
  Shape shape;
  Sequences sequences;
  Format dtype;   // of every tensor
  Format format;  // of the packed weights
  StepTensor input;
  int directions = 1;
  Direction direction[2];
  int threads = 1;
  bool apart = false;      // a member walks sequences of its own, with all hidden units
  int64_t chunk_rows = 0;  // rows of input products held at a time
  int beside_rows = 0;     // rows whose input products are made beside steps: rows_beside, or 0
  char* workspace = nullptr;
};

struct BackwardDirection {
  Weights weights;
  bool reverse = false;
  const char* h0 = nullptr;
  const char* c0 = nullptr;
  StepTensor output;  // forward's result
  StepTensor cells;
  const char* gates = nullptr;
  StepTensor grad_output;  // data null: zeros
  StepTensor grad_cells;
  const char* grad_h_n = nullptr;
  const char* grad_c_n = nullptr;
  char* grad_h0 = nullptr;  // results, (B, size) and in the parameters' shapes; null without h0
  char* grad_c0 = nullptr;
  char* grad_ih = nullptr;
  char* grad_hh = nullptr;
  char* grad_b_ih = nullptr;
  char* grad_b_hh = nullptr;
};

struct Backward {
  Shape shape;
  Sequences sequences;
  Format dtype;
  StepTensor input;
  StepTensor grad_input;  // summed over directions
  int directions = 1;
  BackwardDirection direction[2];
  int64_t fed = 0;  // numbers that enter a step beside input and state, by a Feed
  int threads = 1;
  bool apart = false;  // a member walks rows of its own, with all hidden units, through a chunk
  int64_t chunk_rows = 0;
  char* workspace = nullptr;
};

// How a packed direction begins; byte offsets from there, 0 for a part that it does not have.
struct PackedHeader {
  static constexpr uint64_t kMagic = 0x656e63646563726eull;
  uint64_t magic;
  uint64_t fingerprint;  // of the weights it was made from
  Isa isa;
  Cell cell;
  Format format;
  int32_t projected;
  int64_t I, H, P, bytes;
  MatrixPlace ih, hh, hr;
  int64_t input_bias;      // added to the input product: both biases, but for the GRU's new gate
  int64_t recurrent_bias;  // GRU only: b_hh of the new gate
};

// What one instruction set offers. The packed form differs between instruction sets.
struct Kernels {
  int64_t (*packed_bytes)(const Shape&, Format format);
  // Without `matrices`, forward() is to pack W_ih and W_hh (Direction::unpacked).
  void (*pack)(const Shape&, const Weights&, Format format, int threads, bool matrices,
               char* packed);
  // The rows whose input products can be made beside the steps of a single sequence, by `members`
  // of a team; 0 where there is no such kernel, or too little for it to do.
  int (*rows_beside)(const Shape&, Format format, int members);
  int64_t (*forward_workspace)(const Forward&);
  void (*forward)(const Forward&);
  int64_t (*backward_workspace)(const Backward&);
  void (*backward)(const Backward&);
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

}  // namespace encdec::rnn
