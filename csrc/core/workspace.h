// Scratch memory of a call. For *_binding.cpp only: it reports failure as torch does.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "core/memory.h"

namespace encdec {

// A block of memory that a thread keeps from call to call, unless it was large.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    thread_local AlignedBuffer kept;
    AlignedBuffer& block = bytes > kKeptBytes ? large_ : kept;
    STD_TORCH_CHECK(block.grow(bytes), "out of memory: a workspace of ", bytes, " bytes");
    data_ = block.data();
  }
  char* data() const { return data_; }

 private:
  static constexpr int64_t kKeptBytes = 64 << 20;
  AlignedBuffer large_;
  char* data_;
};

}  // namespace encdec
