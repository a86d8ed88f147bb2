// Places of a workspace, one behind the other, each at a cache line.
#pragma once

#include "core/format.h"

namespace encdec {

class Layout {
 public:
  // The offset of `bytes` more bytes.
  int64_t take(int64_t bytes) {
    const int64_t here = end_;
    end_ += round_up(bytes, 64);
    return here;
  }
  int64_t end() const { return end_; }

 private:
  int64_t end_ = 0;
};

}  // namespace encdec
