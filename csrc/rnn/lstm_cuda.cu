// The LSTM's recurrence on a GPU; encdec_fast/ops/lstm.py has the mathematics, recurrence.cuh the
// kernel that this completes.
#include "rnn/cells.cuh"

namespace encdec::rnn::gpu {
namespace {

template <class T>
class LstmForward : public ForwardOp<T> {
 public:
  static constexpr int kGates = 4;  // i f g o
  using ForwardOp<T>::ForwardOp;

  struct Inputs {
    float products[4] = {};
    bool reset = false;
  };

  __device__ const T* weights(int gate, int, int unit) const {
    return this->row_of(kGates, gate, unit);
  }

  __device__ Inputs load(const Element& e) const {
    Inputs in;
    if (!e.real) return in;
    for (int g = 0; g < kGates; ++g) in.products[g] = this->input_of(e, kGates, g);
    in.reset = this->is_reset(e);
    return in;
  }

  __device__ void finish(const Element& e, const float (&sums)[kGates], const Inputs& in,
                         T previous, float& c, T (&published)[1]) const {
    published[0] = previous;
    if (!e.real) return;
    float x[kGates];
    for (int g = 0; g < kGates; ++g) x[g] = in.products[g] + (in.reset ? 0.0f : sums[g]);
    const float i = sigmoid(x[0]), f = sigmoid(x[1]), g = gpu::tanh(x[2]), o = sigmoid(x[3]);
    c = (in.reset ? 0.0f : f * c) + i * g;
    published[0] = this->keep(e, o * gpu::tanh(c));
    const Forward& call = this->call;
    if (call.cells != nullptr && !this->is_below()) {
      this->write(call.cells, this->at_place(e.place, e.unit), c);
    }
    if (call.gates != nullptr) {
      const float gates[kGates] = {i, f, g, o};
      for (int k = 0; k < kGates; ++k) {
        this->write(call.gates, this->at_gates(e) + k * this->H(), gates[k]);
      }
    }
  }
};

template <class T>
class LstmBackward : public BackwardOp<T> {
 public:
  static constexpr int kPublished = 4;
  using BackwardOp<T>::BackwardOp;

  struct Inputs : BackwardOp<T>::Shared {
    T cell{}, cell_before{}, grad_cell{};
  };

  // dh = dgates W_hh: a unit's own column, down all gates; a row of the transposed matrices.
  __device__ const T* weights(int, int segment, int unit) const {
    return this->row_of(4, segment, unit);
  }

  __device__ Inputs load(const Element& e) const {
    const Backward& b = this->call;
    Inputs in{this->load_shared(e)};
    if (!e.real) return in;
    in.cell = this->read(b.cells, this->at_place(e.place, e.unit));
    if (!in.reset) in.cell_before = this->before(e, b.cells, b.c0);
    if (b.grad_cells != nullptr) {
      in.grad_cell = this->read(b.grad_cells, this->at_place(e.place, e.unit));
    }
    return in;
  }

  // The carry is the gradient of c, times f once its step is done.
  __device__ void finish(const Element& e, const float (&sums)[1], const Inputs& in, T,
                         float& carry, T (&published)[4]) const {
    if (this->ends(e, sums[0])) return;
    const float dh = sums[0] + to_float(in.grad_output) + to_float(in.grad_h_n);
    const float i = to_float(in.gates[0]), f = to_float(in.gates[1]), g = to_float(in.gates[2]),
                o = to_float(in.gates[3]);
    const float tanh_c = gpu::tanh(to_float(in.cell));
    const float dc = dh * o * (1.0f - tanh_c * tanh_c) + carry + to_float(in.grad_cell);
    const float grads[4] = {dc * g * i * (1.0f - i), dc * to_float(in.cell_before) * f * (1.0f - f),
                            dc * i * (1.0f - g * g), dh * tanh_c * o * (1.0f - o)};
    carry = in.reset ? 0.0f : dc * f;
    for (int k = 0; k < 4; ++k) {
      this->keep(e, k, grads[k]);
      if (!in.reset) published[k] = from_float<T>(grads[k]);
    }
    static_cast<T*>(this->call.previous)[this->at_row(e, 1)] = in.before;
  }
};

}  // namespace

int max_clusters(int blocks) {
  // All kernels have the same limits; this one is asked with as much as a block may have.
  return encdec::gpu::max_clusters(
      &recurrence<LstmForward<float>, TensorCores<float, 4>, ThroughCluster>, blocks,
      kWarp * kMaxWarps);
}

void lstm_forward(const Forward& f, const Shape& shape, const Plan& plan, void* exchange,
                  void* stream) {
  run_recurrence<LstmForward>(f, shape, plan, exchange, stream);
}

void lstm_backward(const Backward& b, const Shape& shape, const Plan& plan, void* exchange,
                   void* stream) {
  run_recurrence<LstmBackward>(b, shape, plan, exchange, stream);
}

}  // namespace encdec::rnn::gpu
