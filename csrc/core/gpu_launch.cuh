// Launches of kernels that talk across blocks: all blocks at once (cooperative), or in clusters.
#pragma once

#include <stdexcept>
#include <string>

#include "core/gpu.cuh"

namespace encdec::gpu {

struct Launch {
  int grid[3];
  int threads;
  int shared_bytes;
  int cluster;       // blocks along x that share a cluster; 0: none
  bool cooperative;  // all blocks run at the same time, or the launch is an error
  void* stream;      // cudaStream_t
};

}  // namespace encdec::gpu

#ifndef ENCDEC_GPU_ON_CPU

#include <cuda_runtime_api.h>

namespace encdec::gpu {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that nobody else is told of it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(const Launch& l, void (*kernel)(Parameters...), Arguments... arguments) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared_bytes),
        "shared memory");
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (l.cluster > 0) {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cluster");
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(l.cluster), 1, 1};
  }
  if (l.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(l.grid[0]), static_cast<unsigned>(l.grid[1]),
                        static_cast<unsigned>(l.grid[2]));
  config.blockDim = dim3(static_cast<unsigned>(l.threads));
  config.dynamicSmemBytes = static_cast<size_t>(l.shared_bytes);
  config.stream = static_cast<cudaStream_t>(l.stream);
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch");
}

}  // namespace encdec::gpu

#endif
