// Units of work that the members of a team take one at a time: sentences differ in length.
#pragma once

#include <atomic>
#include <cstdint>

namespace encdec::attention {
namespace ENCDEC_ISA_NAMESPACE {

class Units {
 public:
  // The next of `count` units, or -1 when there is none.
  int64_t take(int64_t count) {
    const int64_t unit = next_.fetch_add(1, std::memory_order_relaxed);
    return unit < count ? unit : -1;
  }
  // Starts anew; a barrier must lie on either side of it.
  void reset() { next_.store(0, std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> next_{0};
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::attention
