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

// As much as the device has for a block: a limit, so that another thread's launch of the same
// kernel never finds a lower one. Returns it.
inline int allow_all_shared_memory(const void* function) {
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared memory");
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        "shared memory");
  return most;
}

// Clusters of so many blocks that run at the same time, each block with all shared memory; 0 where
// the device has none of that size.
template <class... Parameters>
int max_clusters(void (*kernel)(Parameters...), int blocks, int threads) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(allow_all_shared_memory(function));
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  if (cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) !=
          cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&count, function, &config) != cudaSuccess) {
    cudaGetLastError();  // it is the answer
    return 0;
  }
  return count;
}

template <class... Parameters, class... Arguments>
void launch(const Launch& l, void (*kernel)(Parameters...), Arguments... arguments) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  allow_all_shared_memory(function);
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
