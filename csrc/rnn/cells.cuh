// What the cells' kernels share: the tensors of an element.
#pragma once

#include "rnn/recurrence.cuh"

namespace encdec::rnn::gpu {

// The parts of a direction of a layer, in numbers of T.
template <class T, class Arguments>
class CellOp {
 public:
  using Number = T;
  using Call = Arguments;

  // group: a direction, or a layer of one direction.
  __device__ CellOp(const Arguments& call, int group, int direction)
      : call(call), q(group), d(direction) {}

  __device__ int H() const { return call.steps.H; }

  // A unit's row of a gate's part of the weights.
  __device__ const T* row_of(int gates, int gate, int unit) const {
    return row_in(call.weight, q, gates, gate, unit);
  }

 protected:
  __device__ const Steps& steps() const { return call.steps; }

  // Numbers in a row of weights, and in one that is handed up.
  __device__ int row_numbers() const { return (H() + kRowMultiple - 1) & -kRowMultiple; }

  __device__ const T* row_in(const void* weight, int matrix, int gates, int gate, int unit) const {
    const int64_t row = (static_cast<int64_t>(matrix) * gates + gate) * H() + unit;
    return static_cast<const T*>(weight) + row * row_numbers();
  }

  // In [places][D][H].
  __device__ int64_t at_place(int64_t place, int unit) const {
    return (place * steps().directions + d) * H() + unit;
  }
  // In [rows][D][segments][H], its first segment.
  __device__ int64_t at_row(const Element& e, int segments) const {
    return (e.row * steps().directions + d) * segments * H() + e.unit;
  }
  // In [D][rows][4][H].
  __device__ int64_t at_gates(const Element& e) const {
    return (static_cast<int64_t>(q) * steps().rows + e.row) * 4 * H() + e.unit;
  }
  // In [D][B][H].
  __device__ int64_t at_state(const Element& e) const {
    return (static_cast<int64_t>(q) * steps().B + e.sequence) * H() + e.unit;
  }

  // Whether this is the sequence's first step in its direction, or its last.
  __device__ bool is_first(const Element& e) const { return e.t == (d == 0 ? 0 : e.length - 1); }
  __device__ bool is_last(const Element& e) const { return e.t == (d == 0 ? e.length - 1 : 0); }

  __device__ bool is_reset(const Element& e) const {
    return steps().resets != nullptr && e.real && steps().resets[e.row] != 0;
  }

  __device__ static T read(const void* tensor, int64_t at) {
    return static_cast<const T*>(tensor)[at];
  }
  __device__ static void write(void* tensor, int64_t at, float value) {
    static_cast<T*>(tensor)[at] = from_float<T>(value);
  }

  const Arguments& call;
  const int q;  // group
  const int d;  // direction
};

template <class T>
class ForwardOp : public CellOp<T, Forward> {
 public:
  static constexpr bool kBackward = false;
  static constexpr int kPublished = 1;
  using CellOp<T, Forward>::CellOp;

  __device__ const T* first_state() const { return static_cast<const T*>(this->call.h0); }
  __device__ float* carry() const { return this->call.c; }
  __device__ int extra_steps() const { return 0; }

  // Layers that share a launch.
  __device__ static int direction_of(const Forward& call, int group) {
    return call.layers > 1 ? 0 : group;
  }
  __device__ bool is_above() const { return this->call.layers > 1 && this->q > 0; }
  __device__ bool is_below() const { return this->q + 1 < this->call.layers; }
  __device__ const T* input_row(int gates, int gate, int unit) const {
    return this->row_in(this->call.input_weight, this->q - 1, gates, gate, unit);
  }
  // Steps that each block of a layer's group has done. A sum over them would not do: one block may
  // be done with the next step before another has said that it is done with this one.
  __device__ uint32_t* finished(int layer, int slices, int slice, int blocks) const {
    return this->call.finished + (layer * slices + slice) * blocks;
  }
  // Rows of the states of a layer that the one above it reads.
  __device__ T* handed(int layer, int64_t row) const {
    const int64_t at = static_cast<int64_t>(layer) * this->steps().rows + row;
    return static_cast<T*>(this->call.handed_up) + at * this->row_numbers();
  }

 protected:
  // Of a gate: the product with the input, or of a layer above the bias alone.
  __device__ float input_of(const Element& e, int gates, int gate) const {
    if (!is_above()) return this->call.products[this->at_row(e, gates) + gate * this->H()];
    if (this->call.input_bias == nullptr) return 0.0f;
    const int64_t at = static_cast<int64_t>(this->q - 1) * gates + gate;
    return this->call.input_bias[at * this->H() + e.unit];
  }

  // The new state, rounded, to where it is asked for.
  __device__ T keep(const Element& e, float h) const {
    const T rounded = from_float<T>(h);
    if (!is_below()) {
      static_cast<T*>(this->call.output)[this->at_place(e.place, e.unit)] = rounded;
    }
    if (this->is_last(e)) static_cast<T*>(this->call.h_n)[this->at_state(e)] = rounded;
    return rounded;
  }
};

template <class T>
class BackwardOp : public CellOp<T, Backward> {
 public:
  static constexpr bool kBackward = true;
  static constexpr int kGates = 1;
  using CellOp<T, Backward>::CellOp;

  // What every cell's backward reads, as it lies in memory, zero where there is nothing.
  struct Shared {
    T grad_output{}, grad_h_n{}, before{}, gates[4] = {};
    bool reset = false;
  };

  __device__ static int direction_of(const Backward&, int group) { return group; }
  __device__ const T* first_state() const { return nullptr; }
  __device__ float* carry() const { return this->call.carry; }
  __device__ int extra_steps() const { return this->call.grad_h0 != nullptr ? 1 : 0; }

 protected:
  __device__ Shared load_shared(const Element& e) const {
    const Backward& b = this->call;
    Shared in;
    if (!e.real) return in;
    if (b.grad_output != nullptr) {
      in.grad_output = this->read(b.grad_output, this->at_place(e.place, e.unit));
    }
    if (b.grad_h_n != nullptr && this->is_last(e)) {
      in.grad_h_n = this->read(b.grad_h_n, this->at_state(e));
    }
    in.reset = this->is_reset(e);
    if (!in.reset) in.before = before(e, b.output, b.h0);
    for (int g = 0; g < 4; ++g)
      in.gates[g] = this->read(b.gates, this->at_gates(e) + g * this->H());
    return in;
  }

  // What the step before left in a tensor like the output, or the sequence began with.
  __device__ T before(const Element& e, const void* tensor, const void* first) const {
    if (!this->is_first(e)) return this->read(tensor, this->at_place(e.place_ahead, e.unit));
    return first != nullptr ? this->read(first, this->at_state(e)) : T{};
  }

  // Past the sequence's first step: the gradient of h0. Whether that is all.
  __device__ bool ends(const Element& e, float dh) const {
    if (e.real) return false;
    const bool past = this->d == 0 ? e.t == -1 : e.t == e.length;
    if (past && this->call.grad_h0 != nullptr)
      this->write(this->call.grad_h0, this->at_state(e), dh);
    return true;
  }

  __device__ void keep(const Element& e, int segment, float grad) const {
    this->write(this->call.grads, this->at_row(e, 4) + segment * this->H(), grad);
  }
};

}  // namespace encdec::rnn::gpu
