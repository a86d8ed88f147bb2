// What a kernel asks of a GPU beyond plain C++: threads that wait for each other, memory that other
// blocks read, tensor cores. Kernels use these names only, so that the same source runs on a CPU:
// with ENCDEC_GPU_ON_CPU they come from tests/cpp/gpu_on_cpu.h, which schedules threads at random
// and keeps stores to other blocks to itself until they are released.
//
//   sync_block, sync_threads_of, shuffle_xor               within a block
//   sync_cluster, store_async, Mbarrier                    within a cluster (9.0 and newer)
//   store_released, load_released, fence, add, wait_for    between all blocks, through L2
//   copy_async, wait_for_copies                            global to shared memory, past L1
//   multiply                                               one tile on tensor cores
//
// Memory model: PTX ISA, "Memory Consistency Model"; clusters: "mbarrier", "st.async".
#pragma once

#include <cstdint>

namespace encdec::gpu {

// Half precisions are carried as bits, the same on both sides.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What one access moves at most.
struct alignas(16) Quad {
  uint32_t word[4];
};

constexpr int kWarp = 32;
constexpr float kInfinity = __builtin_huge_valf();

}  // namespace encdec::gpu

#ifdef ENCDEC_GPU_ON_CPU
#include "gpu_on_cpu.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace encdec::gpu {

// A kernel's dynamic shared memory.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline float bits_to_float(uint32_t x) { return __uint_as_float(x); }
__device__ inline uint32_t float_to_bits(float x) { return __float_as_uint(x); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Bfloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ inline float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// Rounded to nearest, ties to even.
template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline Bfloat16 from_float<Bfloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ inline Float16 from_float<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Both within 2e-7 of the function; NaN stays.
__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
__device__ inline float exponential(float x) { return __expf(x); }
__device__ inline float tanh(float x) {
  if (fabsf(x) < 0.1f) {  // where the difference below would lose its digits
    const float y = x * x;
    return x * (1.0f + y * (-1.0f / 3 + y * (2.0f / 15 - y * (17.0f / 315))));
  }
  const float e = __expf(-2.0f * fabsf(x));
  return copysignf(__fdividef(1.0f - e, 1.0f + e), x);
}

// A value rounded to TF32 (ten bits of mantissa), as bits of a float.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits & 0xffffe000u;  // nobody promises zeros below
}

// The same value, of which the compiler knows nothing: what is worked out from it in a loop is not
// worked out ahead, into registers that there are not.
__device__ inline uint32_t opaque(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// All threads of the block.
__device__ inline void sync_block() { __syncthreads(); }

// `threads` threads of the block, those that name the same id (1 to 15). Not bar.sync, which asks
// that a warp's lanes come together: the compiler does not know that an asm has such a wish.
__device__ inline void sync_threads_of(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// A store that other blocks read once it has been released: by a fence in this thread, or in one
// that has met this one at a barrier.
__device__ inline void store_released(Quad* to, Quad value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.word[0]),
               "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
               : "memory");
}

__device__ inline void store_released(float* to, float value) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}

// What another block has released and this one has acquired; past L1.
__device__ inline float load_released(const float* from) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}

// Of what is read once, and written by nobody while the kernel runs.
__device__ inline Quad load_streamed(const void* from) {
  Quad q;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(q.word[0]), "=r"(q.word[1]), "=r"(q.word[2]), "=r"(q.word[3])
      : "l"(from));
  return q;
}

// Releases what was stored before it, to all blocks.
__device__ inline void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ inline void add(uint32_t* counter, uint32_t n) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(n) : "memory");
}

// Waits until the counter is at least n, and acquires what was released before it became so.
__device__ inline void wait_for(const uint32_t* counter, uint32_t n) {
  uint32_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
  } while (found < n);
}

// Sixteen bytes from L2 to shared memory; they are there after wait_for_copies, for this thread.
__device__ inline void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Counts the bytes that arrive in this block's shared memory. A phase ends when one thread has said
// how many there will be and that many have come.
using Mbarrier = uint64_t;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900

// There are no clusters: kHasClusters keeps kernels from calling these.
constexpr bool kHasClusters = false;
__device__ void sync_cluster();
__device__ void start(Mbarrier* barrier);
__device__ void expect(Mbarrier* barrier, uint32_t bytes);
__device__ void wait_for(Mbarrier* barrier, uint32_t parity);
__device__ void store_async(Quad* to, Quad value, Mbarrier* barrier, uint32_t rank);

#else

constexpr bool kHasClusters = true;

// All threads of the cluster; what they stored before it is there after it.
__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// To be followed by sync_cluster before another block uses the barrier.
__device__ inline void start(Mbarrier* barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void expect(Mbarrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits for the end of the phase of that parity (the first is 0), and acquires what came in it.
__device__ inline void wait_for(Mbarrier* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// Sixteen bytes into the shared memory of a block of the cluster, at the place that `to` has in
// this one; they count for that block's barrier.
__device__ inline void store_async(Quad* to, Quad value, Mbarrier* barrier, uint32_t rank) {
  uint32_t there, its_barrier;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(its_barrier)
      : "r"(shared_address(barrier)), "r"(rank));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(there),
      "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3]),
      "r"(its_barrier)
      : "memory");
}

#endif

// d += a b' for one tile: 16 rows of a, 8 of b, 16 columns (8 of TF32). Fragments are PTX's, for
// mma.m16n8k16 and mma.m16n8k8.
template <class T>
__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define ENCDEC_MULTIPLY(Type, instruction)                                             \
  template <>                                                                          \
  __device__ inline void multiply<Type>(float (&d)[4], const uint32_t (&a)[4],         \
                                        const uint32_t (&b)[2]) {                      \
    asm(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));           \
  }
ENCDEC_MULTIPLY(float, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
ENCDEC_MULTIPLY(Bfloat16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
ENCDEC_MULTIPLY(Float16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
#undef ENCDEC_MULTIPLY

}  // namespace encdec::gpu
#endif

namespace encdec::gpu {

// The two numbers of half precision in a word.
template <class T>
__device__ inline float low(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word & 0xffff)});
}
template <class T>
__device__ inline float high(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}

}  // namespace encdec::gpu
