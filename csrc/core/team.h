// Threads that stay together for a whole sequence.
//
// `run_team` opens one OpenMP region (libgomp, the pool that torch uses too); inside it the members
// meet at Barriers, which spin for at most 20 microseconds and then sleep in the kernel, so that a
// team larger than the machine still makes progress.
#pragma once

#include <atomic>
#include <cstdint>

namespace encdec {

class Barrier {
 public:
  // Returns when `members` threads have called it, as many each time. Everything that a member
  // wrote before is visible to all members afterwards.
  void wait(int members);

 private:
  // One line passes from core to core: what the last to arrive writes is what the others wait for.
  // It counts up, never back; no team lives for 2^32 arrivals.
  alignas(64) std::atomic<uint32_t> arrivals_{0};
  alignas(64) std::atomic<uint32_t> sleepers_{0};
};

// Calls body(rank, size, context) on each member. `size` is what OpenMP granted, never just what
// was asked for: 1 inside another parallel region and in a forked child, whose OpenMP pool is gone.
void run_team(int wanted, void (*body)(int rank, int size, void* context), void* context);

// The same for any callable: body(rank, size).
template <class Body>
inline void run_team(int wanted, Body& body) {
  run_team(
      wanted, [](int rank, int size, void* context) { (*static_cast<Body*>(context))(rank, size); },
      &body);
}

}  // namespace encdec
