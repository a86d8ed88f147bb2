// Memory that kernels stream through: in huge pages where the system has them.
//
// With 4 KB pages a matrix of 16 MB takes more page-table entries than a core keeps, and hardware
// prefetching stops at every page's end; 2 MB pages remove both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace encdec {

constexpr int64_t kHugePage = int64_t{2} << 20;

// Asks for huge pages in those 2 MB pieces of the block that it fills. Call it before the block is
// first written. A system without them changes nothing.
void prefer_huge_pages(void* block, int64_t bytes);

// The same for a block that has been written: its pages are moved together now.
void collapse_to_huge_pages(void* block, int64_t bytes);

// A block of memory that is kept from use to use and grows where it is too small; its contents are
// lost then. It starts at a cache line, or where it is large at a huge page.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  AlignedBuffer(AlignedBuffer&& other) noexcept { swap(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~AlignedBuffer();
  // Whether there was enough memory. Throws nothing.
  bool grow(int64_t bytes);
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void swap(AlignedBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace encdec
