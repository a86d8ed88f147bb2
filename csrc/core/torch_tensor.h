// torch's tensors as the bindings see them, over the stable ABI. For *_binding.cpp only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "core/format.h"
#include "core/memory.h"

namespace encdec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Format format_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Format::kFloat32;
    case ScalarType::BFloat16:
      return Format::kBfloat16;
    case ScalarType::Half:
      return Format::kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected a float32, bfloat16 or float16 tensor");
  }
}

inline char* data(const Tensor& t) { return static_cast<char*>(t.data_ptr()); }
inline char* data(const std::optional<Tensor>& t) { return t ? data(*t) : nullptr; }

// A new CPU tensor, not initialised.
inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, size_t n, int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(n), sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor t(handle);
  const int64_t bytes = t.numel() * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  if (bytes >= 2 * kHugePage) prefer_huge_pages(t.data_ptr(), bytes);
  return t;
}

template <size_t n>
inline Tensor empty_strided(const std::array<int64_t, n>& sizes,
                            const std::array<int64_t, n>& strides, int32_t dtype) {
  return empty_strided(sizes.data(), strides.data(), n, dtype);
}

// The same, contiguous.
inline Tensor empty(const int64_t* sizes, size_t n, int32_t dtype) {
  std::vector<int64_t> strides(n);
  int64_t stride = 1;
  for (size_t i = n; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return empty_strided(sizes, strides.data(), n, dtype);
}

template <size_t n>
inline Tensor empty(const std::array<int64_t, n>& sizes, int32_t dtype) {
  return empty(sizes.data(), n, dtype);
}

// A block for packed weights, which are streamed through again and again: it starts at a huge page
// where it fills one. Call collapse_to_huge_pages on it once it is written.
inline Tensor empty_block(int64_t bytes) {
  const int64_t slack = bytes >= kHugePage / 2 ? kHugePage : 0;
  Tensor block = empty<1>({bytes + slack}, aoti_torch_dtype_uint8());
  if (slack == 0) return block;
  const int64_t start = -reinterpret_cast<intptr_t>(block.data_ptr()) & (kHugePage - 1);
  prefer_huge_pages(block.data_ptr(), bytes + slack);
  return torch::stable::narrow(block, 0, start, bytes);
}

inline int32_t dtype_of(Format f) {
  return f == Format::kFloat32    ? aoti_torch_dtype_float32()
         : f == Format::kBfloat16 ? aoti_torch_dtype_bfloat16()
         : f == Format::kFloat16  ? aoti_torch_dtype_float16()
                                  : aoti_torch_dtype_uint8();
}

// Mixes the elements 0, step, 2 step, ... of a tensor; offset(i) is where element i lies. The
// products do not wait for each other.
template <class Bits, class Offset>
inline uint64_t mix_elements(const char* data, int64_t numel, int64_t step, Offset offset) {
  uint64_t sum = 0, weight = 0x9e3779b97f4a7c15ull;
  for (int64_t at = 0; at < numel; at += step) {
    Bits value;
    std::memcpy(&value, data + offset(at) * static_cast<int64_t>(sizeof(Bits)), sizeof(Bits));
    const uint64_t mixed = (uint64_t{value} ^ weight) * 0xff51afd7ed558ccdull;
    sum += (mixed ^ (mixed >> 32)) * (weight | 1);
    weight = weight * 0xd1342543de82ef95ull + 1;
  }
  return sum;
}

// A number that changes when the values of a tensor do: 64 to 129 elements, spread so that they
// fall into all rows and columns of a matrix, mixed into `hash`. Strides do not matter.
inline uint64_t fingerprint(const Tensor& t, uint64_t hash) {
  const int64_t numel = t.numel();
  if (numel == 0) return hash;
  const int64_t step = numel > 128 ? (numel / 64 - 1) | 1 : 1;
  const bool wide = element_bytes(format_of(t)) == 4;
  const auto mix = [&](auto offset) {
    return wide ? mix_elements<uint32_t>(data(t), numel, step, offset)
                : mix_elements<uint16_t>(data(t), numel, step, offset);
  };
  if (t.is_contiguous()) {
    hash += mix([](int64_t at) { return at; });
  } else {
    const int64_t columns = t.size(t.dim() - 1), column_stride = t.stride(t.dim() - 1);
    const int64_t row_stride = t.dim() == 2 ? t.stride(0) : 0;
    hash +=
        mix([=](int64_t at) { return at / columns * row_stride + at % columns * column_stride; });
  }
  return (hash ^ (hash >> 29)) * 0x94d049bb133111ebull;
}

}  // namespace encdec
