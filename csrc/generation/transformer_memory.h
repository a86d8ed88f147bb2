// Keys and values of a memory for every layer of a Transformer decoder: once, before the first
// step. Those of a sentence and head lie together, the keys as the matrix product reads them.
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

// The keys of a sentence and head: a packed matrix of head_size by S.
constexpr int64_t head_keys_bytes(Format kept, int64_t head_size, int64_t S) {
  return panels_of(S) * packed_panel_bytes(kept, head_size, kVectors);
}

inline TransformerMemorySizes transformer_memory_sizes(const TransformerMemory& m) {
  const Format kept = kept_format(m.format);
  const int64_t heads = m.B * m.heads;
  return {heads * head_keys_bytes(kept, m.head_size, m.S),
          round_up(heads * m.S * m.head_size * element_bytes(kept), 64),
          transformer_memory_places(m).bytes};
}

// Where numbers of a projected memory go, a column after the other.
template <Format kKept>
class HeadColumns {
  static constexpr int kGroup = group_size(kKept), kBytes = element_bytes(kKept);

 public:
  HeadColumns(const TransformerMemory& m, int64_t row, int64_t column)
      : m_(m),
        sentence_(row / m.S),
        s_(row % m.S),
        head_(column / m.head_size),
        d_(column % m.head_size) {}

  // Of the next `lanes` columns: a key's to keys, or a value's to values.
  void put_key(const char* from, int lanes, char* keys) {
    for (int i = 0; i < lanes; ++i, next()) {
      const int64_t vector = (d_ / kGroup * kVectors + s_ % kPanel / kLanes) * kLanes + s_ % kLanes;
      char* const to = keys + head() * head_keys_bytes(kKept, m_.head_size, m_.S) +
                       s_ / kPanel * packed_panel_bytes(kKept, m_.head_size, kVectors) +
                       vector * weight_group_bytes(kKept) + d_ % kGroup * kBytes;
      std::memcpy(to, from + i * kBytes, kBytes);
    }
  }
  void put_value(const char* from, int lanes, char* values) {
    while (lanes > 0) {
      const int64_t n = std::min<int64_t>(lanes, m_.head_size - d_);
      std::memcpy(values + ((head() * m_.S + s_) * m_.head_size + d_) * kBytes, from,
                  static_cast<size_t>(n * kBytes));
      from += n * kBytes;
      lanes -= static_cast<int>(n);
      d_ = 0;
      ++head_;
    }
  }

 private:
  int64_t head() const { return sentence_ * m_.heads + head_; }
  void next() {
    if (++d_ < m_.head_size) return;
    d_ = 0;
    ++head_;
  }

  const TransformerMemory& m_;
  const int64_t sentence_, s_;
  int64_t head_, d_;
};

template <Format format>
inline void run_transformer_memory(const TransformerMemory& m) {
  constexpr Format kKept = kept_format(format);
  const TransformerMemoryPlaces places = transformer_memory_places(m);
  const TransformerMemorySizes sizes = transformer_memory_sizes(m);
  const StagedRows staged{m.workspace + places.staged, places.staged_stride,
                          reinterpret_cast<float*>(m.workspace + places.scales)};
  Barrier barrier;
  auto body = [&](int rank, int size) {
    const StepTeam<format> team(barrier, rank, size);
    // What lies behind the last position and the last number of a head is multiplied too.
    team.each(m.layers, [&](int64_t l) {
      std::memset(m.to + l * (sizes.keys + sizes.values), 0, static_cast<size_t>(sizes.keys));
    });
    for (int64_t first = 0; first < m.B * m.S; first += kMemoryRows) {
      const int64_t rows = std::min(kMemoryRows, m.B * m.S - first);
      team.each(rows,
                [&](int64_t r) { team.stage(m.memory + (first + r) * m.size, m.size, staged, r); });
      team.wait();
      for (int64_t l = 0; l < m.layers; ++l) {
        char* const keys = m.to + l * (sizes.keys + sizes.values);
        alignas(64) char kept[kLanes * 4];
        team.multiply(m.projections[2 * l], staged, rows,
                      [&](int64_t r, int64_t c, Float y, int lanes) {
                        store_as(kKept, kept, y);
                        HeadColumns<kKept>(m, first + r, c).put_key(kept, lanes, keys);
                      });
        team.multiply(
            m.projections[2 * l + 1], staged, rows, [&](int64_t r, int64_t c, Float y, int lanes) {
              store_as(kKept, kept, y);
              HeadColumns<kKept>(m, first + r, c).put_value(kept, lanes, keys + sizes.keys);
            });
      }
      team.wait();
    }
  };
  run_team(m.threads, body);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::generation
