#include "core/team.h"

#include <linux/futex.h>
#include <omp.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>

#include "core/amx.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace encdec {
namespace {

std::atomic<bool> forked{false};

// libgomp's workers do not survive fork(): a parallel region in the child waits for them for ever.
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

void futex(std::atomic<uint32_t>* word, int operation, uint32_t value) {
  // A wait returns early when the word has changed or a signal came: callers look again.
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation | FUTEX_PRIVATE_FLAG, value,
          nullptr, nullptr, 0);
}

}  // namespace

void Barrier::wait(int members) {
  if (members <= 1) return;
  const uint32_t n = static_cast<uint32_t>(members);
  const uint32_t before = arrivals_.fetch_add(1, std::memory_order_seq_cst);
  const uint32_t complete = before - before % n + n;
  if (before + 1 == complete) {
    if (sleepers_.load(std::memory_order_seq_cst) != 0) futex(&arrivals_, FUTEX_WAKE, INT_MAX);
    return;
  }
  // Most waits end within a microsecond; the clock is read only once that has passed.
  for (int i = 0; i < 256; ++i) {
    if (arrivals_.load(std::memory_order_acquire) >= complete) return;
    relax();
  }
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::microseconds(20);
  while (Clock::now() < deadline) {
    for (int i = 0; i < 16; ++i) {
      if (arrivals_.load(std::memory_order_acquire) >= complete) return;
      relax();
    }
  }
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  for (;;) {
    const uint32_t now = arrivals_.load(std::memory_order_seq_cst);
    if (now >= complete) break;
    futex(&arrivals_, FUTEX_WAIT, now);
  }
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

void run_team(int wanted, void (*body)(int rank, int size, void* context), void* context) {
  (void)fork_handler;
  if (wanted <= 1 || omp_in_parallel() || forked.load(std::memory_order_relaxed)) {
    body(0, 1, context);
    amx_release();
    return;
  }
  // Members meet once more before the region ends: OpenMP's own wait there spins for milliseconds,
  // and where the system has put two members on one core, the one that spins keeps the other from
  // running.
  Barrier end;
#pragma omp parallel num_threads(wanted)
  {
    const int size = omp_get_num_threads();
    body(omp_get_thread_num(), size, context);
    amx_release();
    end.wait(size);
  }
}

}  // namespace encdec
