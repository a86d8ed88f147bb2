// The product of one step on one warp: 16 hidden units, a few sequences, some of the columns.
//
// A warp keeps its weights in the order in which its lanes multiply them: of each tile (16 rows by
// 64 bytes of columns) a lane holds two quads, each from one row. Which, is free as long as the
// state is read to match, and chosen so that a lane reads the state by whole quads, too.
//
// TensorCores multiplies tiles of 8 sequences; float32 as three products of TF32 parts, a_hi b_hi +
// a_hi b_lo + a_lo b_hi, which is as good as float32 (Ootomo and Yokota, 2022, without their care
// for the accumulator). PlainFma serves fewer sequences than such a tile has.
#pragma once

#include "core/gpu.cuh"
#include "rnn/rnn_gpu.h"

namespace encdec::rnn::gpu {

using namespace encdec::gpu;

// A lane's part of a tile of weights.
struct Tile {
  Quad part[2];
};

__device__ inline void make_opaque(Tile& tile) {
#pragma unroll
  for (int i = 0; i < 8; ++i) tile.part[i / 4].word[i % 4] = opaque(tile.part[i / 4].word[i % 4]);
}

__device__ inline Quad load_quad(const char* at) { return *reinterpret_cast<const Quad*>(at); }

// The part of a float that TF32 drops, as TF32.
__device__ inline uint32_t rest_of_tf32(uint32_t x, uint32_t high) {
  return to_tf32(bits_to_float(x) - bits_to_float(high));
}

template <class T, int kGates>
struct TensorCores {
  static constexpr int kRows = kTensorCoresTile;  // sequences
  // Of one gate alone two sums, so that multiplications need not wait for each other.
  static constexpr int kChains = kGates == 1 ? 2 : 1;
  float sums[kGates * kChains][4] = {};

  // Where in its tile a lane's parts lie.
  __device__ static int row(int lane, int part) { return lane / 4 + 8 * part; }
  __device__ static int byte(int lane, int) { return lane % 4 * 16; }

  // state: the first row's columns of this tile.
  __device__ void multiply_tile(const Tile (&w)[kGates], const char* state, int row_bytes,
                                int lane) {
    const Quad s = load_quad(state + lane / 4 * row_bytes + lane % 4 * 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t b[2] = {s.word[2 * half], s.word[2 * half + 1]};
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        const uint32_t a[4] = {w[g].part[0].word[2 * half], w[g].part[1].word[2 * half],
                               w[g].part[0].word[2 * half + 1], w[g].part[1].word[2 * half + 1]};
        multiply_half(sums[g * kChains + half % kChains], a, b);
      }
    }
  }

  // To [gate][sequence][unit], kPartialStride from sequence to sequence.
  __device__ void write(float* partials, int gate_stride, int lane) const {
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      float* const to = partials + g * gate_stride + lane % 4 * 2 * kPartialStride + lane / 4;
      const auto sum = [&](int i) {
        return kChains == 1 ? sums[g][i] : sums[g * kChains][i] + sums[g * kChains + 1][i];
      };
      to[0] = sum(0);
      to[kPartialStride] = sum(1);
      to[8] = sum(2);
      to[kPartialStride + 8] = sum(3);
    }
  }

 private:
  __device__ static void multiply_half(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
    if constexpr (sizeof(T) == 4) {
      uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a_high[i] = to_tf32(bits_to_float(a[i]));
        a_low[i] = rest_of_tf32(a[i], a_high[i]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        b_high[i] = to_tf32(bits_to_float(b[i]));
        b_low[i] = rest_of_tf32(b[i], b_high[i]);
      }
      multiply<T>(d, a_low, b_high);
      multiply<T>(d, a_high, b_low);
      multiply<T>(d, a_high, b_high);
    } else {
      multiply<T>(d, a, b);
    }
  }
};

template <class T, int kGates, int kSequences>
struct PlainFma {
  static constexpr int kRows = kSequences;
  float sums[kGates][kSequences] = {};

  // A lane has one unit and half of the columns.
  __device__ static int row(int lane, int) { return lane % 16; }
  __device__ static int byte(int lane, int part) { return lane / 16 * 32 + 16 * part; }

  __device__ void multiply_tile(const Tile (&w)[kGates], const char* state, int row_bytes,
                                int lane) {
#pragma unroll
    for (int n = 0; n < kSequences; ++n) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const Quad s = load_quad(state + n * row_bytes + byte(lane, part));
#pragma unroll
        for (int g = 0; g < kGates; ++g) sums[g][n] = dot(w[g].part[part], s, sums[g][n]);
      }
    }
  }

  __device__ void write(float* partials, int gate_stride, int lane) const {
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
#pragma unroll
      for (int n = 0; n < kSequences; ++n) {
        const uint32_t other = shuffle_xor(float_to_bits(sums[g][n]), 16);
        if (lane < 16) {
          partials[g * gate_stride + n * kPartialStride + lane] = sums[g][n] + bits_to_float(other);
        }
      }
    }
  }

 private:
  __device__ static float dot(const Quad& a, const Quad& b, float sum) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        sum = fmaf(bits_to_float(a.word[i]), bits_to_float(b.word[i]), sum);
      } else {
        sum = fmaf(low<T>(a.word[i]), low<T>(b.word[i]), sum);
        sum = fmaf(high<T>(a.word[i]), high<T>(b.word[i]), sum);
      }
    }
    return sum;
  }
};

}  // namespace encdec::rnn::gpu
