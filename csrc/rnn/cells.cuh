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

  __device__ CellOp(const Arguments& call, int direction) : call(call), d(direction) {}

  __device__ int H() const { return call.steps.H; }

  // A unit's row of a gate's part of the weights.
  __device__ const T* row_of(int gates, int gate, int unit) const {
    const int64_t row = (static_cast<int64_t>(d) * gates + gate) * H() + unit;
    return static_cast<const T*>(call.weight) + row * ((H() + kRowMultiple - 1) & -kRowMultiple);
  }

 protected:
  __device__ const Steps& steps() const { return call.steps; }

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
    return (static_cast<int64_t>(d) * steps().rows + e.row) * 4 * H() + e.unit;
  }
  // In [D][B][H].
  __device__ int64_t at_state(const Element& e) const {
    return (static_cast<int64_t>(d) * steps().B + e.sequence) * H() + e.unit;
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
  const int d;
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

 protected:
  // The new state, rounded, to where it is asked for.
  __device__ T keep(const Element& e, float h) const {
    const T rounded = from_float<T>(h);
    static_cast<T*>(this->call.output)[this->at_place(e.place, e.unit)] = rounded;
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
