// Memory that kernels stream through: in huge pages where the system has them.
//
// With 4 KB pages a matrix of 16 MB takes more page-table entries than a core keeps, and hardware
// prefetching stops at every page's end; 2 MB pages remove both.
#pragma once

#include <cstddef>
#include <cstdint>

namespace encdec {

constexpr int64_t kHugePage = int64_t{2} << 20;

// Asks for huge pages in those 2 MB pieces of the block that it fills. Call it before the block is
// first written. A system without them changes nothing.
void prefer_huge_pages(void* block, int64_t bytes);

// The same for a block that has been written: its pages are moved together now.
void collapse_to_huge_pages(void* block, int64_t bytes);

}  // namespace encdec
