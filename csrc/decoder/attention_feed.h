// What a decoder's step adds to the recurrent kernels' (rnn_forward.h, Feed): the query, its
// attention over the memory, and the context, which becomes a part of the state. Members own
// columns of the query, then sentences.
#pragma once

#include "core/team.h"
#include "decoder/memory_rows.h"
#include "rnn/rnn_weights.h"

namespace encdec::decoder {
namespace ENCDEC_ISA_NAMESPACE {

using attention::ENCDEC_ISA_NAMESPACE::weigh;
using rnn::Cell;
using rnn::ENCDEC_ISA_NAMESPACE::Blocking;

struct FeedPlaces {
  MemoryPlaces memory;
  int64_t query_weight;  // packed W_q
  int64_t feed_weight;   // packed, blocked for the cell
  int64_t fed;           // staged rows [B]: f of the step before
  int64_t q;             // float [B][stride]
  int64_t member;        // of each: what its query needs, scores
  QueryPlaces query;
  int64_t scores, member_bytes;
  int64_t bytes;
};

template <Cell cell, Format format>
inline FeedPlaces feed_places(const Forward& f) {
  using Bl = Blocking<cell>;
  FeedPlaces p{};
  Layout all, member;
  const Memory& m = f.memory;
  p.memory = memory_places(m, f.rnn.shape.B, all);
  const int64_t panel = packed_panel_bytes(format, f.rnn.shape.H, kVectors);
  p.query_weight = all.take(m.query_weight ? panels_of(m.A) * panel : 0);
  p.feed_weight = all.take(Bl::blocks(f.rnn.shape.H) * Bl::kPanels *
                           packed_panel_bytes(format, m.M, Bl::kVectors));
  p.fed = all.take(f.rnn.shape.B * staged_row_bytes(format, m.M));
  p.q = all.take(f.rnn.shape.B * p.memory.stride * 4);
  p.member = all.end();
  p.query = query_places(p.memory, member);
  p.scores = member.take(row_floats(p.memory.padded) * 4);
  p.member_bytes = member.end();
  p.bytes = p.member + f.rnn.threads * p.member_bytes;
  return p;
}

template <Cell cell, Format format>
class AttentionFeed {
  using Bl = Blocking<cell>;

 public:
  static constexpr bool kActive = true;

  AttentionFeed(const Forward& call, Barrier& barrier, int rank, int members)
      : call_(call),
        m_(call.memory),
        B_(call.rnn.shape.B),
        T_(call.rnn.shape.T),
        H_(call.rnn.shape.H),
        dtype_(call.rnn.dtype),
        esize_(element_bytes(call.rnn.dtype)),
        barrier_(barrier),
        rank_(rank),
        members_(members),
        places_(feed_places<cell, format>(call)),
        memory_(m_, dtype_, call.workspace, places_.memory),
        own_(call.workspace + places_.member + rank * places_.member_bytes) {}

  void prepare() {
    // A tile of one query reads no more rows than its own; their pads must be numbers.
    std::memset(own_, 0, static_cast<size_t>(places_.member_bytes));
    for (int64_t b = part(B_, rank_); b < part(B_, rank_ + 1); ++b) {
      memory_.prepare(b);
      stage_row<format>(m_.context0 + b * m_.M * esize_, dtype_, m_.M, fed(b));
    }
    const int64_t vectors = Bl::blocks(H_) * Bl::kWidth;
    rnn::ENCDEC_ISA_NAMESPACE::pack_matrix<cell, format>(
        m_.feed_weight, dtype_, m_.feed_stride, H_, m_.M, call_.workspace,
        MatrixPlace{places_.feed_weight}, part(vectors, rank_), part(vectors, rank_ + 1));
    if (!m_.query_weight) return;
    constexpr int64_t kVector = kLanes * weight_group_bytes(format);
    const int64_t panel = packed_panel_bytes(format, H_, kVectors);
    for (int64_t p = part(panels_of(m_.A), rank_); p < part(panels_of(m_.A), rank_ + 1); ++p) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t a = p * kPanel + v * kLanes;
        const ColumnSource columns{m_.query_weight + a * m_.query_stride * esize_, dtype_,
                                   m_.query_stride, 1, a < m_.A ? lanes_left(a, m_.A) : 0};
        pack_columns<format>(columns, H_,
                             call_.workspace + places_.query_weight + p * panel + v * kVector,
                             kVectors * kVector, nullptr, nullptr);
      }
    }
  }

  // Adds the products of what was fed to the input products of a block of units, for some rows.
  void add_products(int64_t block, int64_t row, int rows, float* out) const {
    const PackedView w =
        view(call_.workspace, MatrixPlace{places_.feed_weight}, format, m_.M, Bl::kVectors);
    const int64_t stride = staged_row_bytes(format, m_.M);
    for (int p = 0; p < Bl::kPanels; ++p) {
      multiply_rows<format, Bl::kVectors>(rows, w, block * Bl::kPanels + p, {fed(row), stride},
                                          out + p * Bl::kVectors * kLanes, Bl::kWidth * kLanes,
                                          true);
    }
  }

  // state: the staged rows of h_t.
  void after_step(int64_t t, RowsView state) {
    queries(t, state);
    barrier_.wait(members_);
    for (int64_t b = part(B_, rank_); b < part(B_, rank_ + 1); ++b) attend(b, t);
  }

 private:
  int64_t part(int64_t n, int i) const { return n * i / members_; }
  float* mine(int64_t place) const { return reinterpret_cast<float*>(own_ + place); }
  float* q(int64_t b) const {
    return reinterpret_cast<float*>(call_.workspace + places_.q) + b * memory_.stride();
  }

  char* fed(int64_t b) const {
    return call_.workspace + places_.fed + b * staged_row_bytes(format, m_.M);
  }

  // This member's columns of every row's query; without W_q its rows.
  void queries(int64_t t, RowsView state) const {
    if (!m_.query_weight) {
      constexpr Format kStored = format == Format::kBfloat16 ? Format::kBfloat16 : Format::kFloat32;
      for (int64_t b = part(B_, rank_); b < part(B_, rank_ + 1); ++b) {
        const char* row = state.data + b * state.stride;
        for (int64_t a = 0; a < m_.A; a += kLanes) {
          const int n = lanes_left(a, m_.A);
          put_query(b, t, a, load_as(kStored, row + a * element_bytes(kStored), n), n);
        }
      }
      return;
    }
    constexpr int kRows = tile_room(format, kVectors);
    alignas(64) float tile[kRows * kPanel];
    PackedView w;
    w.data = call_.workspace + places_.query_weight;
    w.groups = round_up(H_, group_size(format)) / group_size(format);
    w.panel_bytes = packed_panel_bytes(format, H_, kVectors);
    const RowTiles tiles(B_, tile_rows(format, kVectors));
    for (int64_t p = part(panels_of(m_.A), rank_); p < part(panels_of(m_.A), rank_ + 1); ++p) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i), end = tiles.begin(i + 1);
        multiply_rows<format, kVectors>(static_cast<int>(end - row), w, p, state.from(row), tile,
                                        kPanel);
        for (int64_t b = row; b < end; ++b) {
          for (int v = 0; v < kVectors && p * kPanel + v * kLanes < m_.A; ++v) {
            const int64_t a = p * kPanel + v * kLanes;
            put_query(b, t, a, load(tile + (b - row) * kPanel + v * kLanes), lanes_left(a, m_.A));
          }
        }
      }
    }
  }

  // The query as it is seen outside, in the call's dtype.
  void put_query(int64_t b, int64_t t, int64_t a, Float x, int lanes) const {
    const Float seen = first_lanes(rounded_to(dtype_, x), lanes);
    store(q(b) + a, seen);
    if (!call_.queries) return;
    store_as(dtype_, call_.queries + ((b * T_ + t) * m_.A + a) * esize_, seen, lanes);
  }

  void attend(int64_t b, int64_t t) const {
    const int64_t n = m_.keys_of(b);
    float* const scores = mine(places_.scores);
    if (n > 0) memory_.attend(b, q(b), own_, places_.query, scores);
    float* const to = call_.weights + (b * T_ + t) * m_.S;
    std::memcpy(to, scores, static_cast<size_t>(n * 4));
    std::memset(to + n, 0, static_cast<size_t>((m_.S - n) * 4));
    const rnn::StepTensor& rows = call_.rnn.direction[0].output;
    char* const output = rows.at(call_.rnn.sequences, t, b) + H_ * esize_;
    const auto run = [&](auto constant) {
      weigh<decltype(constant)::value>(
          1, scores, 0, 1, n, m_.values.at(b, 0), m_.values.row_stride, m_.M,
          [&](int64_t, int64_t column, Float sum, int lanes) {
            // What the next step reads is what the caller sees, and zeros behind it.
            store_as(dtype_, output + column * esize_, sum, lanes);
            const Float seen = format == Format::kFloat16 ? rounded_to(dtype_, sum) : sum;
            stage_vector<format>(staged_at<format>(fed(b), column), first_lanes(seen, lanes));
          });
    };
    with_dtype(dtype_, run);
  }

  const Forward& call_;
  const Memory& m_;
  const int64_t B_, T_, H_;
  const Format dtype_;
  const int esize_;
  Barrier& barrier_;
  const int rank_, members_;
  const FeedPlaces places_;
  const MemoryRows memory_;
  char* const own_;
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::decoder
