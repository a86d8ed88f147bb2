// The GRU's recurrence on a GPU; encdec_fast/ops/gru.py has the mathematics, recurrence.cuh the
// kernel that this completes.
#include "rnn/cells.cuh"

namespace encdec::rnn::gpu {
namespace {

template <class T>
class GruForward : public ForwardOp<T> {
 public:
  static constexpr int kGates = 3;  // reset, update, new
  using ForwardOp<T>::ForwardOp;

  struct Inputs {
    float products[3] = {};
    float bias = 0.0f;
    bool reset = false;
  };

  __device__ const T* weights(int gate, int, int unit) const {
    return this->row_of(kGates, gate, unit);
  }

  __device__ Inputs load(const Element& e) const {
    Inputs in;
    if (!e.real) return in;
    for (int g = 0; g < kGates; ++g) in.products[g] = this->input_of(e, kGates, g);
    if (this->call.bias != nullptr) in.bias = this->call.bias[this->q * this->H() + e.unit];
    in.reset = this->is_reset(e);
    return in;
  }

  __device__ void finish(const Element& e, const float (&sums)[kGates], const Inputs& in,
                         T previous, float&, T (&published)[1]) const {
    published[0] = previous;
    if (!e.real) return;
    const float before = in.reset ? 0.0f : to_float(previous);
    float of_h[kGates];
    for (int g = 0; g < kGates; ++g) of_h[g] = in.reset ? 0.0f : sums[g];
    const float reset = sigmoid(in.products[0] + of_h[0]);
    const float update = sigmoid(in.products[1] + of_h[1]);
    const float inner = of_h[2] + in.bias;
    const float fresh = gpu::tanh(in.products[2] + reset * inner);
    published[0] = this->keep(e, fresh + update * (before - fresh));
    if (this->call.gates != nullptr) {
      const float gates[4] = {reset, update, fresh, inner};
      for (int k = 0; k < 4; ++k) {
        this->write(this->call.gates, this->at_gates(e) + k * this->H(), gates[k]);
      }
    }
  }
};

template <class T>
class GruBackward : public BackwardOp<T> {
 public:
  static constexpr int kPublished = 3;
  using BackwardOp<T>::BackwardOp;
  using Inputs = typename BackwardOp<T>::Shared;

  __device__ const T* weights(int, int segment, int unit) const {
    return this->row_of(3, segment, unit);
  }

  __device__ Inputs load(const Element& e) const { return this->load_shared(e); }

  // The carry is what of h's gradient passes the update gate.
  __device__ void finish(const Element& e, const float (&sums)[1], const Inputs& in, T,
                         float& carry, T (&published)[3]) const {
    float dh = sums[0] + carry;
    if (this->ends(e, dh)) return;
    dh += to_float(in.grad_output) + to_float(in.grad_h_n);
    const float reset = to_float(in.gates[0]), update = to_float(in.gates[1]),
                fresh = to_float(in.gates[2]), inner = to_float(in.gates[3]);
    const float of_fresh = dh * (1.0f - update) * (1.0f - fresh * fresh);
    const float grads[4] = {of_fresh * inner * reset * (1.0f - reset),
                            dh * (to_float(in.before) - fresh) * update * (1.0f - update), of_fresh,
                            of_fresh * reset};
    carry = in.reset ? 0.0f : dh * update;
    for (int k = 0; k < 4; ++k) this->keep(e, k, grads[k]);
    if (!in.reset) {
      published[0] = from_float<T>(grads[0]);
      published[1] = from_float<T>(grads[1]);
      published[2] = from_float<T>(grads[3]);  // what its product with h had
    }
    static_cast<T*>(this->call.previous)[this->at_row(e, 1)] = in.before;
  }
};

}  // namespace

void gru_forward(const Forward& f, const Shape& shape, const Plan& plan, void* exchange,
                 void* stream) {
  run_recurrence<GruForward>(f, shape, plan, exchange, stream);
}

void gru_backward(const Backward& b, const Shape& shape, const Plan& plan, void* exchange,
                  void* stream) {
  run_recurrence<GruBackward>(b, shape, plan, exchange, stream);
}

}  // namespace encdec::rnn::gpu
