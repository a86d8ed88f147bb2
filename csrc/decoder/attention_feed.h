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
  int64_t query_weight;                  // packed W_q
  int64_t feed_weight;                   // packed, blocked for the cell
  int64_t output_context, output_state;  // packed W_o: the columns that meet the context, and h
  int64_t contexts;                      // staged rows [B], for W_o
  int64_t fed;                           // staged rows [B]: f of the step before
  int64_t q;                             // float [B][stride]
  int64_t member;                        // of each: what its query needs, scores
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
                           packed_panel_bytes(format, m.F, Bl::kVectors));
  const int64_t outputs = m.output_weight ? panels_of(m.F) : 0;
  p.output_context = all.take(outputs * packed_panel_bytes(format, m.M, kVectors));
  p.output_state = all.take(outputs * panel);
  p.contexts = all.take(m.output_weight ? f.rnn.shape.B * staged_row_bytes(format, m.M) : 0);
  p.fed = all.take(f.rnn.shape.B * staged_row_bytes(format, m.F));
  p.q = all.take(f.rnn.shape.B * p.memory.stride * 4);
  p.member = all.end();
  p.query = query_places(p.memory, member);
  p.scores = member.take(scores_floats(m, p.memory) * 4);
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
      if (!m_.located()) stage_row<format>(m_.context0 + b * m_.F * esize_, dtype_, m_.F, fed(b));
    }
    const int64_t vectors = Bl::blocks(H_) * Bl::kWidth;
    rnn::ENCDEC_ISA_NAMESPACE::pack_matrix<cell, format>(
        m_.feed_weight, dtype_, m_.feed_stride, H_, m_.F, call_.workspace,
        MatrixPlace{places_.feed_weight}, part(vectors, rank_), part(vectors, rank_ + 1));
    if (m_.query_weight) pack(m_.query_weight, m_.query_stride, m_.A, H_, places_.query_weight);
    if (m_.output_weight) {
      pack(m_.output_weight, m_.output_stride, m_.F, m_.M, places_.output_context);
      pack(m_.output_weight + m_.M * esize_, m_.output_stride, m_.F, H_, places_.output_state);
    }
  }

  // The context that enters the first step, of location; h: the staged rows of the first state.
  void start(RowsView h) {
    if (!m_.located()) return;
    attend_all(0, h);
    barrier_.wait(members_);
  }

  // Adds the products of what was fed to the input products of a block of units, for some rows.
  void add_products(int64_t block, int64_t row, int rows, float* out) const {
    const PackedView w =
        view(call_.workspace, MatrixPlace{places_.feed_weight}, format, m_.F, Bl::kVectors);
    const int64_t stride = staged_row_bytes(format, m_.F);
    for (int p = 0; p < Bl::kPanels; ++p) {
      multiply_rows<format, Bl::kVectors>(rows, w, block * Bl::kPanels + p, {fed(row), stride},
                                          out + p * Bl::kVectors * kLanes, Bl::kWidth * kLanes,
                                          true);
    }
  }

  // state: the staged rows of h_t.
  void after_step(int64_t t, RowsView state) {
    const int64_t next = m_.located() ? t + 1 : t;
    if (next < T_) attend_all(next, state);
  }

 private:
  // f of step t, of all sentences.
  void attend_all(int64_t t, RowsView state) const {
    queries(t, state);
    barrier_.wait(members_);
    for (int64_t b = part(B_, rank_); b < part(B_, rank_ + 1); ++b) attend(b, t);
    if (!m_.output_weight) return;
    barrier_.wait(members_);
    outputs(t, state);
  }

  // This member's panels of a matrix (columns, k) of torch's.
  void pack(const char* matrix, int64_t row_stride, int64_t columns, int64_t k,
            int64_t place) const {
    pack_weight<format>(Weight{dtype_, matrix, row_stride, columns, k}, rank_, members_,
                        call_.workspace, MatrixPlace{place});
  }
  PackedView packed(int64_t place, int64_t k) const {
    return view(call_.workspace, MatrixPlace{place}, format, k, kVectors);
  }

  int64_t part(int64_t n, int i) const { return n * i / members_; }
  float* mine(int64_t place) const { return reinterpret_cast<float*>(own_ + place); }
  float* q(int64_t b) const {
    return reinterpret_cast<float*>(call_.workspace + places_.q) + b * memory_.stride();
  }

  char* fed(int64_t b) const {
    return call_.workspace + places_.fed + b * staged_row_bytes(format, m_.F);
  }
  char* context(int64_t b) const {
    return call_.workspace + places_.contexts + b * staged_row_bytes(format, m_.M);
  }
  // Where a row's f is seen outside.
  char* output(int64_t b, int64_t t) const {
    return call_.rnn.direction[0].output.at(call_.rnn.sequences, t, b) + H_ * esize_;
  }
  // What the next step reads is what the caller sees, and zeros behind it.
  void stage_seen(char* row, int64_t column, Float x, int lanes) const {
    const Float seen = format == Format::kFloat16 ? rounded_to(dtype_, x) : x;
    stage_vector<format>(staged_at<format>(row, column), first_lanes(seen, lanes));
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
    const PackedView w = packed(places_.query_weight, H_);
    each_tile(
        m_.A,
        [&](int rows, int64_t row, int64_t panel, float* tile) {
          multiply_rows<format, kVectors>(rows, w, panel, state.from(row), tile, kPanel);
        },
        [&](int64_t b, int64_t a, Float x, int lanes) { put_query(b, t, a, x, lanes); });
  }

  // f = tanh(W_o [context; h]), this member's columns of every row.
  void outputs(int64_t t, RowsView state) const {
    const PackedView of_context = packed(places_.output_context, m_.M);
    const PackedView of_state = packed(places_.output_state, H_);
    const RowsView contexts{context(0), staged_row_bytes(format, m_.M)};
    each_tile(
        m_.F,
        [&](int rows, int64_t row, int64_t panel, float* tile) {
          multiply_rows<format, kVectors>(rows, of_context, panel, contexts.from(row), tile,
                                          kPanel);
          multiply_rows<format, kVectors>(rows, of_state, panel, state.from(row), tile, kPanel,
                                          true);
        },
        [&](int64_t b, int64_t column, Float x, int lanes) {
          const Float f = tanh(x);
          store_as(dtype_, output(b, t) + column * esize_, f, lanes);
          stage_seen(fed(b), column, f, lanes);
        });
  }

  // Products of all rows by this member's panels of `columns` columns: multiply(rows, row, panel,
  // tile) makes a tile, put(b, column, vector, lanes) takes its vectors.
  template <class Multiply, class Put>
  void each_tile(int64_t columns, const Multiply& multiply, const Put& put) const {
    alignas(64) float tile[tile_room(format, kVectors) * kPanel];
    const RowTiles tiles(B_, format, kVectors);
    const int64_t panels = panels_of(columns);
    for (int64_t p = part(panels, rank_); p < part(panels, rank_ + 1); ++p) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i), end = tiles.begin(i + 1);
        multiply(static_cast<int>(end - row), row, p, tile);
        for (int64_t b = row; b < end; ++b) {
          for (int v = 0; v < kVectors && p * kPanel + v * kLanes < columns; ++v) {
            const int64_t column = p * kPanel + v * kLanes;
            put(b, column, load(tile + (b - row) * kPanel + v * kLanes),
                lanes_left(column, columns));
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

  // Adds a step's weights to a sentence's coverage, whose rows backward reads.
  void cover(int64_t b, int64_t t, int64_t n, const float* weights) const {
    float* const c = memory_.coverage(b);
    if (call_.coverages) {
      float* const to = call_.coverages + (b * T_ + t) * m_.S;
      std::memcpy(to, c, static_cast<size_t>(n * 4));
      std::memset(to + n, 0, static_cast<size_t>((m_.S - n) * 4));
    }
    for (int64_t s = 0; s < n; ++s) c[s] += weights[s];
  }

  void attend(int64_t b, int64_t t) const {
    const int64_t n = m_.weights_of(b), size = m_.weights_size();
    float* const scores = mine(places_.scores);
    if (n > 0 && m_.located()) {
      const char* const given = m_.positions.at(b, t);
      for (int64_t a = 0; a < n; a += kLanes) {
        const Float own = load_as(dtype_, given + a * esize_, lanes_left(a, n));
        store(scores + a, add(own, load(q(b) + a)));
      }
      softmax_row(scores, n, 1.0f);
    } else if (n > 0) {
      memory_.attend(b, q(b), own_, places_.query, scores, memory_.coverage(b));
    }
    if (m_.covered()) cover(b, t, n, scores);
    float* const to = call_.weights + (b * T_ + t) * size;
    std::memcpy(to, scores, static_cast<size_t>(n * 4));
    std::memset(to + n, 0, static_cast<size_t>((size - n) * 4));
    char* const shown = !m_.output_weight ? output(b, t)
                        : call_.contexts  ? call_.contexts + (b * T_ + t) * m_.M * esize_
                                          : nullptr;
    char* const staged = m_.output_weight ? context(b) : fed(b);
    const auto run = [&](auto constant) {
      weigh<decltype(constant)::value>(1, scores, 0, 1, m_.keys_of(b), m_.values.at(b, 0),
                                       m_.values.row_stride, m_.M,
                                       [&](int64_t, int64_t column, Float sum, int lanes) {
                                         if (shown)
                                           store_as(dtype_, shown + column * esize_, sum, lanes);
                                         stage_seen(staged, column, sum, lanes);
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
