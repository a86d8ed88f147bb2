// Runs kernels written with csrc/core/gpu.cuh on the CPU, to find what is wrong with their logic.
//
// Each thread is a fibre; which one goes on is chosen at random whenever one waits, and from time
// to time a warp or a block is left asleep, so that the others run as far ahead as they may. What
// other blocks could not count on is not there:
//
//   store_released              stays with the thread until a fence that is ordered after it
//   load_released, copy_async   may read any value that memory had since the thread last acquired
//   store_async                 arrives at any later time, and then counts
//
// A barrier, fence or wait can be left out by its place in the source (`mutation`), and the kernel
// must then be seen to fail: a wrong result, or an error here (everybody waits, a barrier is
// counted wrongly). Shared memory starts as NaN and ends at a page that may not be touched.
//
// Included by core/gpu.cuh, never by itself; gpu_on_cpu.cpp is the scheduler.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>
#include <string>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

namespace encdec::gpu {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

using std::fmaf;
using std::min;

constexpr bool kHasClusters = true;
using Mbarrier = uint64_t;

struct Launch;

namespace cpu {

// Where in the source something happens.
struct Site {
  const char* file;
  int line;
};

// What the tests set, and what they learn.
struct Options {
  uint64_t seed = 1;
  std::string mutation;         // "file:line", or "file:line relaxed": a wait that does not acquire
  std::set<std::string> sites;  // all that could be left out, as they were met
};
Options& options();

// Runs `right` with each barrier, fence and wait that it meets left out in turn, under so many
// orders of threads: those for which it was never wrong, nor an error, and which are not needed
// therefore.
std::set<std::string> not_needed(const std::function<bool()>& right, int orders);

void run(const Launch& launch, const std::function<void()>& kernel);  // throws std::runtime_error

char* shared_memory();
void barrier(int id, int threads, Site site);
void cluster_barrier(Site site);
void release(Site site);
void store(void* to, Quad value, int bytes);
Quad load(const void* from, int bytes);
void copy(void* to, const void* from);
void finish_copies(Site site);
void wait_until(const std::function<bool()>& done, bool acquires, Site site);
void expect(Mbarrier* barrier, uint32_t bytes, Site site);
void send(Quad* to, Quad value, Mbarrier* barrier, uint32_t rank);
// Every lane of the warp gives its words and receives those of all, [lane][words].
const uint32_t* meet(const uint32_t* words, int count);
int lane();

}  // namespace cpu

#define ENCDEC_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline char* shared_memory() { return cpu::shared_memory(); }

inline float bits_to_float(uint32_t x) {
  float value;
  std::memcpy(&value, &x, 4);
  return value;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Bfloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
float to_float(Float16 x);

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
Bfloat16 from_float<Bfloat16>(float x);
template <>
Float16 from_float<Float16>(float x);

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
inline float tanh(float x) { return std::tanh(x); }
inline float exponential(float x) { return std::exp(x); }
inline uint32_t to_tf32(float x) { return (float_to_bits(x) + 0x1000) & ~0x1fffu; }
inline uint32_t opaque(uint32_t value) { return value; }

inline void sync_block(ENCDEC_HERE) { cpu::barrier(0, static_cast<int>(blockDim.x), {file, line}); }
inline void sync_threads_of(int id, int threads, ENCDEC_HERE) {
  cpu::barrier(id, threads, {file, line});
}

inline uint32_t shuffle_xor(uint32_t value, int mask) {
  return cpu::meet(&value, 1)[cpu::lane() ^ mask];
}

inline void store_released(Quad* to, Quad value) { cpu::store(to, value, sizeof(Quad)); }
inline void store_released(float* to, float value) {
  cpu::store(to, {{float_to_bits(value)}}, sizeof(float));
}
inline float load_released(const float* from) {
  return bits_to_float(cpu::load(from, sizeof(float)).word[0]);
}
inline Quad load_streamed(const void* from) { return *static_cast<const Quad*>(from); }
inline void fence(ENCDEC_HERE) { cpu::release({file, line}); }
inline void add(uint32_t* counter, uint32_t n) { *counter += n; }
inline void wait_for(const uint32_t* counter, uint32_t n, ENCDEC_HERE) {
  cpu::wait_until([=] { return *counter >= n; }, true, {file, line});
}

inline void copy_async(void* to, const void* from) { cpu::copy(to, from); }
inline void wait_for_copies(ENCDEC_HERE) { cpu::finish_copies({file, line}); }

// A barrier in shared memory: arrivals that are missing, bytes that are, the phase.
struct MbarrierState {
  int32_t bytes;
  int16_t arrivals;
  uint16_t phase;
};
static_assert(sizeof(MbarrierState) == sizeof(Mbarrier));

inline MbarrierState& state_of(Mbarrier* barrier) {
  return *reinterpret_cast<MbarrierState*>(barrier);
}

inline void sync_cluster(ENCDEC_HERE) { cpu::cluster_barrier({file, line}); }
inline void start(Mbarrier* barrier) { state_of(barrier) = {0, 1, 0}; }
inline void expect(Mbarrier* barrier, uint32_t bytes, ENCDEC_HERE) {
  cpu::expect(barrier, bytes, {file, line});
}
inline void wait_for(Mbarrier* barrier, uint32_t parity, ENCDEC_HERE) {
  cpu::wait_until([=] { return (state_of(barrier).phase & 1u) != parity; }, false, {file, line});
}
inline void store_async(Quad* to, Quad value, Mbarrier* barrier, uint32_t rank) {
  cpu::send(to, value, barrier, rank);
}

template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
void multiply<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
void multiply<Bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
void multiply<Float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// A device of twelve multiprocessors, in one group.
template <class... Parameters>
int max_clusters(void (*)(Parameters...), int blocks, int) {
  return 12 / blocks;
}

template <class... Parameters, class... Arguments>
void launch(const Launch& l, void (*kernel)(Parameters...), Arguments... arguments) {
  cpu::run(l, [=] { kernel(arguments...); });
}

}  // namespace encdec::gpu
