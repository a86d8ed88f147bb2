#include "core/memory.h"

#include <sys/mman.h>

#include <cstdlib>

#include "core/format.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1; older kernels answer with an error, which is no harm
#endif

namespace encdec {
namespace {

void advise(void* block, int64_t bytes, int advice) {
  const uintptr_t size = kHugePage, begin = reinterpret_cast<uintptr_t>(block);
  const uintptr_t first = (begin + size - 1) / size * size;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / size * size;
  if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, advice);
}

}  // namespace

void prefer_huge_pages(void* block, int64_t bytes) { advise(block, bytes, MADV_HUGEPAGE); }

void collapse_to_huge_pages(void* block, int64_t bytes) { advise(block, bytes, MADV_COLLAPSE); }

AlignedBuffer::~AlignedBuffer() { std::free(data_); }

bool AlignedBuffer::grow(int64_t bytes) {
  if (bytes <= bytes_) return true;
  std::free(data_);
  bytes_ = 0;
  const int64_t alignment = bytes >= kHugePage ? kHugePage : 64;
  const int64_t size = round_up(bytes, alignment);
  data_ = static_cast<char*>(
      std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(size)));
  if (!data_) return false;
  prefer_huge_pages(data_, size);
  bytes_ = bytes;
  return true;
}

}  // namespace encdec
