#include "core/memory.h"

#include <sys/mman.h>

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

}  // namespace encdec
