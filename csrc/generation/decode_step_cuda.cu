// One decode step as one launch; decode_step_gpu.h says of what.
#include <stdexcept>

#include "core/gpu.cuh"
#include "core/gpu_launch.cuh"
#include "generation/decode_step_gpu.h"

namespace encdec::generation::gpu {

using namespace encdec::gpu;

namespace {

// sums[o][r] += rows[o] . x[r]; rows that are null are left out. A lane takes every 32nd quad.
template <class T, int kRows>
__device__ inline void multiply_rows(float (&sums)[kOutputs][kRows],
                                     const T* const (&rows)[kOutputs], const float* x, int stride,
                                     int count, int lane) {
  constexpr int kNumbers = 16 / sizeof(T);
#pragma unroll 2
  for (int k = lane * kNumbers; k < count; k += kWarp * kNumbers) {
    Quad w[kOutputs];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      w[o] = rows[o] != nullptr ? load_streamed(rows[o] + k) : Quad{};
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float own[kNumbers];
#pragma unroll
      for (int i = 0; i < kNumbers; i += 4) {
        const Quad q = *reinterpret_cast<const Quad*>(x + r * stride + k + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) own[i + j] = bits_to_float(q.word[j]);
      }
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (sizeof(T) == 4) {
            sums[o][r] = fmaf(bits_to_float(w[o].word[i]), own[i], sums[o][r]);
          } else {
            sums[o][r] = fmaf(low<T>(w[o].word[i]), own[2 * i], sums[o][r]);
            sums[o][r] = fmaf(high<T>(w[o].word[i]), own[2 * i + 1], sums[o][r]);
          }
        }
      }
    }
  }
}

// The sums of all lanes; lane r receives those of row r.
template <int kRows>
__device__ inline void collect(const float (&sums)[kOutputs][kRows], float (&own)[kOutputs],
                               int lane) {
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    own[o] = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = sums[o][r];
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        sum += bits_to_float(shuffle_xor(float_to_bits(sum), mask));
      }
      if (lane == r) own[o] = sum;
    }
  }
}

template <class T>
__device__ inline float read(const void* tensor, int64_t at) {
  return to_float(static_cast<const T*>(tensor)[at]);
}

template <class T>
__device__ inline float read_or_zero(const void* tensor, int64_t at) {
  return tensor != nullptr ? read<T>(tensor, at) : 0.0f;
}

template <class T>
__device__ inline float rounded(float x) {
  return to_float(from_float<T>(x));
}

template <class T, int kRows>
class Step {
 public:
  __device__ explicit Step(const DecodeStep& s)
      : s_(s),
        between_(between(s)),
        x_(reinterpret_cast<float*>(shared_memory())),
        lane_(threadIdx.x % kWarp),
        warp_(blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp),
        warps_(gridDim.x * (kThreads / kWarp)) {}

  __device__ void run() {
    if (s_.attention == Attention::kNone) pass_context();
    for (int i = 0; i < s_.layers; ++i) {
      cells(i);
      wait_for_all();
      if (i > 0 || s_.attention == Attention::kNone) continue;
      if (s_.query != nullptr) {
        project_query();
        wait_for_all();
      }
      for (int r = blockIdx.x; r < s_.R; r += gridDim.x) attend(r);
      wait_for_all();
    }
    scores();
    keep_states();
  }

 private:
  // All blocks are here, and what they left is there for all.
  __device__ void wait_for_all() {
    sync_block();
    if (threadIdx.x == 0) {
      fence();
      add(s_.arrived, 1);
      wait_for(s_.arrived, gridDim.x * ++phase_);
    }
    sync_block();
  }

  __device__ float* h(int layer, int r) const {
    return s_.between + between_.h + (static_cast<int64_t>(layer) * s_.R + r) * s_.H;
  }
  __device__ float* c(int layer, int r) const {
    return s_.between + between_.c + (static_cast<int64_t>(layer) * s_.R + r) * s_.H;
  }
  __device__ float* query(int r) const {
    return s_.between + between_.query + static_cast<int64_t>(r) * s_.A;
  }
  __device__ float* context(int r) const {
    return s_.between + between_.context + static_cast<int64_t>(r) * s_.M;
  }

  __device__ int64_t parent(int r) const {
    const int64_t found = s_.parents[r];
    return found < 0 ? 0 : found < s_.R ? found : s_.R - 1;
  }

  // What this step's context is, once it is known; before that, and where there is no attention,
  // what the row that a row continues had.
  __device__ float context_now(int r, int m, bool attended) const {
    if (attended) return load_released(context(r) + m);
    return read<T>(s_.context, parent(r) * s_.M + m);
  }

  // Rows of `count` floats in shared memory, one for each of kRows, zero where there is no row.
  // What was there before has been read: a barrier of all blocks is between two products.
  template <class Value>
  __device__ void fill(int count, Value value) {
    for (int i = threadIdx.x; i < kRows * count; i += kThreads) {
      const int r = i / count;
      x_[i] = r < s_.R ? value(r, i % count) : 0.0f;
    }
    sync_block();
  }

  // Without attention a context stays with the row that is continued.
  __device__ void pass_context() {
    if (blockIdx.x != 0) return;
    for (int i = threadIdx.x; i < s_.R * s_.M; i += kThreads) {
      store_released(context(0) + i, context_now(i / s_.M, i % s_.M, false));
    }
  }

  __device__ void cells(int layer) {
    const Layer& own = s_.layer[layer];
    const int H = s_.H, inputs = inputs_of(s_, layer), width = inputs + H;
    const bool attended = layer > 0 && s_.attention != Attention::kNone;
    fill(width, [&](int r, int k) {
      if (k >= inputs) {
        return read<T>(s_.h, (static_cast<int64_t>(layer) * s_.R + parent(r)) * H + k - inputs);
      }
      if (layer == 0 && k < s_.E) {
        const int64_t token = s_.tokens[r];
        const int64_t row = token < 0 ? 0 : token < s_.V ? token : s_.V - 1;
        return read<T>(s_.embedding, row * s_.E + k);
      }
      if (layer > 0 && k < H) return load_released(h(layer - 1, r) + k);
      return context_now(r, k - (layer == 0 ? s_.E : H), attended);
    });
    const bool lstm = s_.cell == rnn::Cell::kLstm;
    const int gates = lstm ? 4 : 3;
    for (int u = warp_; u < H; u += warps_) {
      float sums[kOutputs][kRows] = {};
      const T* rows[kOutputs];
      const auto find = [&](const void* weight, int count) {
#pragma unroll
        for (int g = 0; g < kOutputs; ++g) {
          const int64_t at = (static_cast<int64_t>(g) * H + u) * count;
          rows[g] = g < gates ? static_cast<const T*>(weight) + at : nullptr;
        }
      };
      find(own.input, inputs);
      multiply_rows<T, kRows>(sums, rows, x_, width, inputs, lane_);
      find(own.hidden, H);
      if (!lstm) {  // r multiplies the new gate's product of h, which is summed by itself
        rows[3] = rows[2];
        rows[2] = nullptr;
      }
      multiply_rows<T, kRows>(sums, rows, x_ + inputs, width, H, lane_);
      float x[kOutputs];
      collect<kRows>(sums, x, lane_);
      const int r = lane_;
      if (r >= s_.R) continue;
      const auto biases = [&](const void* bias, int g) {
        return read_or_zero<T>(bias, static_cast<int64_t>(g) * H + u);
      };
      if (lstm) {
#pragma unroll
        for (int g = 0; g < 4; ++g) x[g] += biases(own.input_bias, g) + biases(own.hidden_bias, g);
        const int64_t before = (static_cast<int64_t>(layer) * s_.R + parent(r)) * H + u;
        const float cell =
            sigmoid(x[1]) * read<T>(s_.c, before) + sigmoid(x[0]) * encdec::gpu::tanh(x[2]);
        store_released(c(layer, r) + u, cell);
        store_released(h(layer, r) + u, rounded<T>(sigmoid(x[3]) * encdec::gpu::tanh(cell)));
      } else {
#pragma unroll
        for (int g = 0; g < 2; ++g) x[g] += biases(own.input_bias, g) + biases(own.hidden_bias, g);
        const float inner = x[3] + biases(own.hidden_bias, 2);
        const float fresh =
            encdec::gpu::tanh(x[2] + biases(own.input_bias, 2) + sigmoid(x[0]) * inner);
        const float before = x_[r * width + inputs + u];
        const float update = sigmoid(x[1]);
        store_released(h(layer, r) + u, rounded<T>(fresh + update * (before - fresh)));
      }
    }
  }

  // Rows of a matrix times the inputs in x_, four for each warp at a time; value(n, r, sum)
  // receives each.
  template <class Value>
  __device__ void product(const void* weight, int outputs, int count, Value value) {
    for (int n = warp_ * kOutputs; n < outputs; n += warps_ * kOutputs) {
      float sums[kOutputs][kRows] = {};
      const T* rows[kOutputs];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const int64_t at = static_cast<int64_t>(n + o) * count;
        rows[o] = n + o < outputs ? static_cast<const T*>(weight) + at : nullptr;
      }
      multiply_rows<T, kRows>(sums, rows, x_, count, count, lane_);
      float own[kOutputs];
      collect<kRows>(sums, own, lane_);
      if (lane_ >= s_.R) continue;
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        if (n + o < outputs) value(n + o, lane_, own[o]);
      }
    }
  }

  __device__ void project_query() {
    fill(s_.H, [&](int r, int k) { return load_released(h(0, r) + k); });
    product(s_.query, s_.A, s_.H, [&](int n, int r, float sum) {
      store_released(query(r) + n, rounded<T>(sum + read_or_zero<T>(s_.query_bias, n)));
    });
  }

  // The attention of one row, by one block: scores, their softmax, the context.
  __device__ void attend(int r) {
    const int b = r / s_.K;
    const int64_t asked = s_.lengths[b];
    const int length = static_cast<int>(asked < 0 ? 0 : asked < s_.S ? asked : s_.S);
    float* const own_query = x_;
    float* const probabilities = x_ + s_.A;
    for (int a = threadIdx.x; a < s_.A; a += kThreads) {
      own_query[a] = load_released(s_.query != nullptr ? query(r) + a : h(0, r) + a);
    }
    sync_block();  // and whoever still reads the row before's probabilities is done
    const int first = threadIdx.x / kWarp;
    for (int p = first; p < length; p += kThreads / kWarp) {
      const int64_t key = (static_cast<int64_t>(b) * s_.S + p) * s_.A;
      float sum = 0.0f;
      for (int a = lane_; a < s_.A; a += kWarp) {
        const float k = read<T>(s_.keys, key + a);
        sum += s_.attention == Attention::kDot
                   ? own_query[a] * k
                   : read<T>(s_.score, a) * encdec::gpu::tanh(own_query[a] + k);
      }
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        sum += bits_to_float(shuffle_xor(float_to_bits(sum), mask));
      }
      if (lane_ == 0) probabilities[p] = sum;
    }
    sync_block();
    // Every warp works out the sum for itself: it is short, and saves a barrier.
    float most = -kInfinity, total = 0.0f;
    for (int p = 0; p < length; ++p) most = fmaxf(most, probabilities[p]);
    for (int p = 0; p < length; ++p) total += exponential(probabilities[p] - most);
    const float scale = total > 0.0f ? 1.0f / total : 0.0f;
    if (s_.weights != nullptr) {
      for (int p = threadIdx.x; p < s_.S; p += kThreads) {
        const float w = p < length ? exponential(probabilities[p] - most) * scale : 0.0f;
        static_cast<T*>(s_.weights)[static_cast<int64_t>(r) * s_.S + p] = from_float<T>(w);
      }
    }
    for (int m = threadIdx.x; m < s_.M; m += kThreads) {
      float sum = 0.0f;
      for (int p = 0; p < length; ++p) {
        const int64_t value = (static_cast<int64_t>(b) * s_.S + p) * s_.M + m;
        sum += exponential(probabilities[p] - most) * read<T>(s_.values, value);
      }
      store_released(context(r) + m, rounded<T>(sum * scale));
    }
  }

  __device__ void scores() {
    const int count = output_inputs(s_);
    const bool attended = s_.attention != Attention::kNone;
    fill(count, [&](int r, int k) {
      return k < s_.H ? load_released(h(s_.layers - 1, r) + k) : context_now(r, k - s_.H, attended);
    });
    product(s_.output, s_.V, count, [&](int n, int r, float sum) {
      const float score = sum + read_or_zero<T>(s_.output_bias, n);
      static_cast<T*>(s_.logits)[static_cast<int64_t>(r) * s_.V + n] = from_float<T>(score);
    });
  }

  // The new states to their places, which nobody reads any more.
  __device__ void keep_states() {
    wait_for_all();
    const int64_t count = static_cast<int64_t>(s_.layers) * s_.R * s_.H;
    const int64_t own = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t all = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = own; i < count; i += all) {
      static_cast<T*>(s_.h)[i] = from_float<T>(load_released(s_.between + between_.h + i));
      if (s_.c != nullptr) {
        static_cast<T*>(s_.c)[i] = from_float<T>(load_released(s_.between + between_.c + i));
      }
    }
    for (int64_t i = own; i < static_cast<int64_t>(s_.R) * s_.M; i += all) {
      static_cast<T*>(s_.context)[i] =
          from_float<T>(load_released(s_.between + between_.context + i));
    }
  }

  const DecodeStep& s_;
  const Between between_;
  float* const x_;
  const int lane_, warp_, warps_;
  uint32_t phase_ = 0;
};

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, 1) decode(const __grid_constant__ DecodeStep s) {
  Step<T, kRows>(s).run();
}

template <class T>
void launch_step(const DecodeStep& s, int blocks, void* stream) {
  const int bytes = static_cast<int>(shared_bytes(s));
  const Launch launch{{blocks, 1, 1}, kThreads, bytes, 0, true, stream};
  const int rows = padded_rows(s.R);
  if (rows == 1) return encdec::gpu::launch(launch, &decode<T, 1>, s);
  if (rows == 4) return encdec::gpu::launch(launch, &decode<T, 4>, s);
  return encdec::gpu::launch(launch, &decode<T, kMaxRows>, s);
}

}  // namespace

void decode_step(const DecodeStep& s, Format dtype, int blocks, void* stream) {
  if (dtype == Format::kFloat32) {
    launch_step<float>(s, blocks, stream);
  } else if (dtype == Format::kBfloat16) {
    launch_step<Bfloat16>(s, blocks, stream);
  } else {
    throw std::runtime_error("decode_step: it has float32 and bfloat16");
  }
}

}  // namespace encdec::generation::gpu
