#include "core/probe.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "core/team.h"

namespace encdec {
namespace {

// Rounds of some 20 ms: the clock of the first moments does not last.
constexpr int64_t kProducts = 6000000;

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

// The best of several rounds, in amounts a nanosecond: amount(rank) does one round's work.
template <class Prepare, class Amount>
double best_rate(int threads, Prepare prepare, Amount amount) {
  using Clock = std::chrono::steady_clock;
  constexpr int kRounds = 15;
  Barrier barrier;
  double best = 0.0;
  std::vector<double> amounts(static_cast<size_t>(threads));
  auto body = [&](int rank, int size) {
    auto own = prepare();
    for (int round = 0; round < kRounds; ++round) {
      barrier.wait(size);
      const auto start = Clock::now();
      amounts[static_cast<size_t>(rank)] = amount(own);
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

struct Buffer {
  explicit Buffer(int64_t bytes)
      : data(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(bytes)))) {
    if (!data) throw std::bad_alloc();
    std::memset(data, 1, static_cast<size_t>(bytes));
  }
  Buffer(Buffer&& other) : data(other.data) { other.data = nullptr; }
  ~Buffer() { std::free(data); }
  char* data;
};

}  // namespace

double measure_peak(Format format, int threads) {
  const Probes& probes = chosen();
  return 2.0 * best_rate(
                   threads, [] { return 0; },
                   [&](int) { return static_cast<double>(probes.multiply(format, kProducts)); });
}

double measure_read_bandwidth(int64_t bytes_per_thread, int threads) {
  const Probes& probes = chosen();
  const int64_t bytes = round_up(std::max<int64_t>(bytes_per_thread, 1024), 1024);
  const int64_t repeats = std::max<int64_t>(1, (int64_t{256} << 20) / bytes);
  return best_rate(
      threads, [&] { return Buffer(bytes); },
      [&](const Buffer& buffer) {
        for (int64_t i = 0; i < repeats; ++i) probes.read(buffer.data, bytes);
        return static_cast<double>(bytes * repeats);
      });
}

}  // namespace encdec
