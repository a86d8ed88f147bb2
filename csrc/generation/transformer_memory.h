// Keys and values of a memory for every layer of a Transformer decoder: once, before the first
// step.
#pragma once

#include "generation/step_team.h"

namespace encdec::generation {
namespace ENCDEC_ISA_NAMESPACE {

// Rows of the memory that are staged at a time: they stay in cache while all weights pass by.
constexpr int64_t kMemoryRows = 128;

struct TransformerMemoryPlaces {
  int64_t staged_stride, staged, scales, bytes;
};

inline TransformerMemoryPlaces transformer_memory_places(const TransformerMemory& m) {
  TransformerMemoryPlaces p{};
  Layout all;
  p.staged_stride = staged_row_bytes(m.format, m.size);
  p.staged = all.take(kMemoryRows * p.staged_stride);
  p.scales = all.take(kMemoryRows * 4);
  p.bytes = all.end();
  return p;
}

template <Format format>
inline void run_transformer_memory(const TransformerMemory& m) {
  constexpr Format kKept = kept_format(format);
  const TransformerMemoryPlaces places = transformer_memory_places(m);
  const StagedRows staged{m.workspace + places.staged, places.staged_stride,
                          reinterpret_cast<float*>(m.workspace + places.scales)};
  Barrier barrier;
  auto body = [&](int rank, int size) {
    const StepTeam<format> team(barrier, rank, size);
    for (int64_t first = 0; first < m.rows; first += kMemoryRows) {
      const int64_t rows = std::min(kMemoryRows, m.rows - first);
      team.each(rows,
                [&](int64_t r) { team.stage(m.memory + (first + r) * m.size, m.size, staged, r); });
      team.wait();
      for (int64_t i = 0; i < m.count; ++i) {
        char* const to = m.to + (i * m.rows + first) * m.width * element_bytes(kKept);
        team.multiply(m.projections[i], staged, rows,
                      [&](int64_t r, int64_t c, Float y, int lanes) __attribute__((always_inline)) {
                        store_as(kKept, to + (r * m.width + c) * element_bytes(kKept), y, lanes);
                      });
      }
      team.wait();
    }
  };
  run_team(m.threads, body);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::generation
