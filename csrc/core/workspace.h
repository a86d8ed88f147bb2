// Scratch memory of a call. For *_binding.cpp only: it reports failure as torch does.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>

#include "core/format.h"
#include "core/memory.h"

namespace encdec {

// A block of memory that a thread keeps from call to call, unless it was large.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    thread_local Block kept;
    if (bytes > kKeptBytes) {
      large_.grow(bytes);
      data_ = large_.data;
    } else {
      kept.grow(bytes);
      data_ = kept.data;
    }
  }
  char* data() const { return data_; }

 private:
  static constexpr int64_t kKeptBytes = 64 << 20;
  struct Block {
    char* data = nullptr;
    int64_t bytes = 0;
    void grow(int64_t wanted) {
      if (wanted <= bytes) return;
      std::free(data);
      bytes = 0;
      const int64_t alignment = wanted >= kHugePage ? kHugePage : 64;
      const int64_t size = round_up(wanted, alignment);
      data = static_cast<char*>(
          std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(size)));
      STD_TORCH_CHECK(data != nullptr, "out of memory: a workspace of ", wanted, " bytes");
      prefer_huge_pages(data, size);
      bytes = wanted;
    }
    ~Block() { std::free(data); }
  };
  Block large_;
  char* data_;
};

}  // namespace encdec
