// How the blocks of a group tell each other, after each step, what they computed.
//
// Both keep two buffers in turn: what a step publishes is read in the next. A block that publishes
// in step j has received all of step j - 1's, which everybody sent after reading step j - 1's
// buffer; so it may overwrite that one.
//
// ThroughL2: any blocks that run at the same time (a cooperative launch). They store to global
// memory, count themselves in after each step, and copy everything to shared memory: 8.0 and newer.
// ThroughCluster: each block stores straight into the shared memory of every other one, and a
// barrier there counts the bytes: no fence, no copy; 9.0 and newer.
#pragma once

#include "core/gpu.cuh"
#include "rnn/rnn_gpu.h"

namespace encdec::rnn::gpu {

using namespace encdec::gpu;

// What both need to know of their group.
struct Group {
  char* memory;    // shared
  char* exchange;  // global
  int number;      // among all groups of a call
  int groups;
  int blocks;
  int rows;     // sequences
  int slice;    // sequences that there is room for
  int message;  // bytes that one sequence's row has in a step, from all blocks
};

class ThroughL2 {
 public:
  static constexpr bool kCluster = false;

  __device__ ThroughL2(const Group& group, const SharedLayout& at)
      : group_(group),
        at_(at),
        row_(at.tiles * kTileBytes),
        counter_(reinterpret_cast<uint32_t*>(group.exchange + group.number * kCounterBytes)),
        buffers_(group.exchange + group.groups * kCounterBytes +
                 static_cast<int64_t>(group.number) * 2 * group.slice * row_) {}

  __device__ void start() { sync_block(); }

  // Until the state that step `step` multiplies is complete; all threads. more: there is a step
  // after this one.
  __device__ void wait(int step, bool) {
    if (step == 0) return;
    if (threadIdx.x == 0) wait_for(counter_, static_cast<uint32_t>(group_.blocks * step));
    sync_block();
    const char* const from = buffer(step);
    const int quads = row_ / 16;
    for (int i = threadIdx.x; i < group_.rows * quads; i += blockDim.x) {
      const int n = i / quads, q = i % quads;
      copy_async(group_.memory + at_.state + n * at_.row_bytes + q * 16, from + n * row_ + q * 16);
    }
    wait_for_copies();
    sync_block();
  }

  __device__ const char* state(int) const { return group_.memory + at_.state; }

  // A quad of the next step's state; the lanes that share it have peers 0, 1, ...
  __device__ void publish(int step, int n, int byte, const Quad& value, int peer, int) {
    if (peer == 0) {
      store_released(reinterpret_cast<Quad*>(buffer(step + 1) + n * row_ + byte), value);
    }
  }

  // This block is done with a step; all threads. more: there is another one, for which it has
  // published. above: where the layer above counts it, or null.
  __device__ void arrive(bool more, uint32_t* above) {
    if (!more && above == nullptr) return;
    sync_block();
    if (threadIdx.x == 0) {
      fence();
      if (more) add(counter_, 1);
      if (above != nullptr) add(above, 1);
    }
  }

 private:
  __device__ char* buffer(int step) const {
    return buffers_ + static_cast<int64_t>(step & 1) * group_.slice * row_;
  }

  const Group& group_;
  const SharedLayout& at_;
  const int row_;
  uint32_t* const counter_;
  char* const buffers_;
};

class ThroughCluster {
 public:
  static constexpr bool kCluster = true;

  __device__ ThroughCluster(const Group& group, const SharedLayout& at)
      : group_(group), at_(at), full_(reinterpret_cast<Mbarrier*>(group.memory + at.barriers)) {}

  __device__ void start() {
    if (threadIdx.x == 0) {
      encdec::gpu::start(full_);
      encdec::gpu::start(full_ + 1);
    }
    sync_cluster();
  }

  __device__ void wait(int step, bool more) {
    if (step > 0) wait_for(full_ + (step & 1), static_cast<uint32_t>(((step - 1) / 2) & 1));
    // The barrier of the step that follows had its last phase before this one, if any.
    if (more && threadIdx.x == 0) {
      expect(full_ + ((step + 1) & 1), static_cast<uint32_t>(group_.rows * group_.message));
    }
  }

  __device__ const char* state(int step) const {
    return group_.memory + at_.state + (step & 1) * at_.state_bytes;
  }

  // A lane sends its quad to as many blocks as there are left for it; `peers` lanes share the quad.
  __device__ void publish(int step, int n, int byte, const Quad& value, int peer, int peers) {
    const int next = (step + 1) & 1;
    char* const to = group_.memory + at_.state + next * at_.state_bytes + n * at_.row_bytes + byte;
    for (int rank = peer; rank < group_.blocks; rank += peers) {
      store_async(reinterpret_cast<Quad*>(to), value, full_ + next, static_cast<uint32_t>(rank));
    }
  }

  __device__ void arrive(bool, uint32_t* above) {
    if (above == nullptr) return;
    sync_block();
    if (threadIdx.x == 0) {
      fence();
      add(above, 1);
    }
  }

 private:
  const Group& group_;
  const SharedLayout& at_;
  Mbarrier* const full_;
};

}  // namespace encdec::rnn::gpu
