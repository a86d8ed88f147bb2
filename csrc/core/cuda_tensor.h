// Tensors of a GPU as the bindings see them, over the stable ABI. For *_cuda_binding.cpp only.
#pragma once

#include "core/torch_tensor.h"

// The dispatch key of the ops: the CPU's where the kernels run on it, for tests.
#ifdef ENCDEC_GPU_ON_CPU
#define ENCDEC_GPU_KEY CPU
#else
#define ENCDEC_GPU_KEY CUDA
#endif

namespace encdec {

// The stream that torch launches on for the tensor's device; nothing where kernels run on the CPU.
inline void* current_stream([[maybe_unused]] const Tensor& like) {
  void* stream = nullptr;
#ifndef ENCDEC_GPU_ON_CPU
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device(), &stream));
#endif
  return stream;
}

// A tensor that a kernel indexes by itself: on the device of `like`, contiguous, of this size.
inline void check_device_tensor(const Tensor& t, const Tensor& like, ScalarType type, int64_t numel,
                                const char* name) {
  STD_TORCH_CHECK(t.get_device() == like.get_device() && t.is_cuda() == like.is_cuda(), name,
                  " must be on the device of the others");
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == type && t.numel() == numel, name,
                  " must be contiguous, of the right dtype and have ", numel, " numbers, got ",
                  t.numel());
}

// Where a kernel reads sixteen bytes at once.
inline void check_aligned(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, name,
                  " must start at a multiple of 16 bytes");
}

}  // namespace encdec
