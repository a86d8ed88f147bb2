#include "core/probe.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "core/amx.h"
#include "core/team.h"

namespace encdec {
namespace {

// Rounds of some 20 ms: the clock of the first moments does not last.
constexpr int64_t kProducts = 6000000;
constexpr int64_t kAmxProducts = 800000;

const Probes& chosen() {
  switch (chosen_isa()) {
    case Isa::kAvx2:
      return avx2::kProbes;
    case Isa::kAvx512:
      return avx512::kProbes;
    default:
      return avx512_bf16::kProbes;
  }
}

// The best of several rounds, in amounts a nanosecond: prepare(rank) once, then amount(rank) does
// one round's work.
template <class Prepare, class Amount>
double best_rate(int threads, Prepare prepare, Amount amount) {
  using Clock = std::chrono::steady_clock;
  constexpr int kRounds = 15;
  Barrier barrier;
  double best = 0.0;
  std::vector<double> amounts(static_cast<size_t>(threads));
  auto body = [&](int rank, int size) {
    prepare(rank);
    for (int round = 0; round < kRounds; ++round) {
      barrier.wait(size);
      const auto start = Clock::now();
      amounts[static_cast<size_t>(rank)] = amount(rank);
      barrier.wait(size);
      if (rank == 0) {
        const double ns = std::chrono::duration<double, std::nano>(Clock::now() - start).count();
        double sum = 0.0;
        for (int i = 0; i < size; ++i) sum += amounts[static_cast<size_t>(i)];
        best = std::max(best, sum / ns);
      }
    }
  };
  run_team(threads, body);
  return best;
}

using Buffer = std::unique_ptr<char, void (*)(void*)>;

}  // namespace

double measure_peak(Format format, int threads) {
  const Probes& probes = chosen();
  const bool int8 = format == Format::kInt8;
  const bool amx = amx_multiplies(format);
  const auto products = [&](int) {
    return static_cast<double>(amx ? amx_probe(int8, kAmxProducts)
                                   : probes.multiply(format, kProducts));
  };
  return 2.0 * best_rate(threads, [](int) {}, products);
}

double measure_read_bandwidth(int64_t bytes_per_thread, int threads) {
  const Probes& probes = chosen();
  const int64_t bytes = round_up(std::max<int64_t>(bytes_per_thread, 1024), 1024);
  const int64_t repeats = std::max<int64_t>(1, (int64_t{256} << 20) / bytes);
  // Allocated out here, where there is somebody to catch what it throws; touched by its own thread.
  std::vector<Buffer> buffers;
  for (int i = 0; i < threads; ++i) {
    void* const block = std::aligned_alloc(64, static_cast<size_t>(bytes));
    if (!block) throw std::bad_alloc();
    buffers.emplace_back(static_cast<char*>(block), std::free);
  }
  const auto own = [&](int rank) { return buffers[static_cast<size_t>(rank)].get(); };
  return best_rate(
      threads, [&](int rank) { std::memset(own(rank), 1, static_cast<size_t>(bytes)); },
      [&](int rank) {
        for (int64_t i = 0; i < repeats; ++i) probes.read(own(rank), bytes);
        return static_cast<double>(bytes * repeats);
      });
}

double measure_barrier(int threads) {
  using Clock = std::chrono::steady_clock;
  constexpr int kMeetings = 5000;
  Barrier barrier;
  double ns = 0.0;
  auto body = [&](int rank, int size) {
    barrier.wait(size);
    const auto start = Clock::now();
    for (int i = 0; i < kMeetings; ++i) barrier.wait(size);
    if (rank == 0) ns = std::chrono::duration<double, std::nano>(Clock::now() - start).count();
  };
  run_team(threads, body);
  return ns / kMeetings;
}

}  // namespace encdec
