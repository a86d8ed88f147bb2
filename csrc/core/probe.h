// What this machine can do at most, measured by the kernels' own instructions: the ceilings that
// benchmarks divide by.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "core/format.h"

namespace encdec {

struct Probes {
  // `rounds` times 24 independent vector products of the format; returns the multiply-adds done.
  int64_t (*multiply)(Format format, int64_t rounds);
  // Reads `bytes` once (a multiple of 1024).
  void (*read)(const char* data, int64_t bytes);
};

// Multiply-add operations a second (two per product), in Gop/s, of `threads` threads together.
double measure_peak(Format format, int threads);

// GB/s of `threads` threads that each read `bytes_per_thread` of their own again and again.
double measure_read_bandwidth(int64_t bytes_per_thread, int threads);

// Nanoseconds that a meeting of `threads` threads takes. The cores of a virtual machine are now
// nearer to each other, now farther.
double measure_barrier(int threads);

namespace avx2 {
extern const Probes kProbes;
}
namespace avx512 {
extern const Probes kProbes;
}
namespace avx512_bf16 {
extern const Probes kProbes;
}

}  // namespace encdec
