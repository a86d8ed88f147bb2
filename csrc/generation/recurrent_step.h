// One step of a recurrent decoder with attention, from tokens to scores, inside one team.
//
// Members own columns of products, then rows: cells, attention, staging. States are written to new
// rows from those of their parents, which is all that reordering beams costs.
#pragma once

#include "decoder/memory_rows.h"
#include "generation/step_team.h"

namespace encdec::generation {
namespace ENCDEC_ISA_NAMESPACE {

using decoder::ENCDEC_ISA_NAMESPACE::memory_places;
using decoder::ENCDEC_ISA_NAMESPACE::MemoryPlaces;
using decoder::ENCDEC_ISA_NAMESPACE::MemoryRows;
using decoder::ENCDEC_ISA_NAMESPACE::query_places;
using decoder::ENCDEC_ISA_NAMESPACE::QueryPlaces;

constexpr bool scores_keys(Attention kind) {
  return kind == Attention::kAdditive || kind == Attention::kDot;
}

inline decoder::Memory memory_of(const RecurrentStep& s) {
  decoder::Memory m{};
  m.score = s.attention_kind == Attention::kDot ? decoder::Score::kDot : decoder::Score::kAdditive;
  m.S = s.S;
  m.A = s.A;
  m.M = s.M;
  m.score_weight = reinterpret_cast<const char*>(s.score);
  m.keys = {const_cast<char*>(reinterpret_cast<const char*>(s.keys)), s.S * s.A * 4, s.A * 4};
  m.lengths = s.memory_lengths;
  return m;
}

inline int64_t recurrent_memory(const RecurrentStep& s) {
  if (!scores_keys(s.attention_kind)) return 0;
  Layout layout;
  memory_places(memory_of(s), s.B, layout);
  return layout.end();
}

inline void prepare_memory(const RecurrentStep& s) {
  if (!scores_keys(s.attention_kind)) return;
  const decoder::Memory memory = memory_of(s);
  Layout layout;
  const MemoryPlaces places = memory_places(memory, s.B, layout);
  auto body = [&](int rank, int size) {
    const MemoryRows rows(memory, Format::kFloat32, s.memory_rows, places);
    for (int64_t b = s.B * rank / size; b < s.B * (rank + 1) / size; ++b) rows.prepare(b);
  };
  run_team(s.threads, body);
}

struct RecurrentPlaces {
  int64_t input, gates, query;  // rows of floats
  int64_t staged, scales, hidden, hidden_scales, scans;
  int64_t input_size, staged_stride, hidden_stride;
  int64_t member;
  QueryPlaces own;
  int64_t scores, member_bytes, bytes;
};

inline RecurrentPlaces recurrent_places(const RecurrentStep& s) {
  RecurrentPlaces p{};
  Layout all, member;
  // The widest of what is staged: inputs of layers, of the location scores, of the output.
  p.input_size = std::max(s.E, s.H) + std::max(s.M, s.H);
  p.input = all.take(s.rows * row_floats(p.input_size) * 4);
  p.gates = all.take(s.rows * row_floats(4 * s.H) * 4);
  p.query = all.take(s.rows * row_floats(std::max(s.A, s.location.N)) * 4);
  p.staged_stride = staged_row_bytes(s.format, p.input_size);
  p.staged = all.take(s.rows * p.staged_stride);
  p.scales = all.take(s.rows * 4);
  p.hidden_stride = staged_row_bytes(s.format, s.H);
  p.hidden = all.take(s.rows * p.hidden_stride);
  p.hidden_scales = all.take(s.rows * 4);
  p.scans = all.take(s.threads * score_bytes(s.rows));
  p.member = all.end();
  Layout unused;
  p.own = query_places(memory_places(memory_of(s), s.B, unused), member);
  p.scores = member.take(row_floats(round_up(std::max(s.S, s.location.N), 16)) * 4);
  p.member_bytes = member.end();
  p.bytes = p.member + s.threads * p.member_bytes;
  return p;
}

template <Format format>
class RecurrentRun {
 public:
  RecurrentRun(const RecurrentStep& step, Barrier& barrier, int rank, int members)
      : s_(step),
        team_(barrier, rank, members),
        places_(recurrent_places(step)),
        memory_(memory_of(step)),
        keys_(memory_, Format::kFloat32, step.memory_rows, memory_places_of(step, memory_)),
        input_(rows_at(places_.input, places_.input_size)),
        gates_(rows_at(places_.gates, 4 * step.H)),
        query_(rows_at(places_.query, std::max(step.A, step.location.N))),
        staged_{step.workspace + places_.staged, places_.staged_stride,
                reinterpret_cast<float*>(step.workspace + places_.scales)},
        hidden_{step.workspace + places_.hidden, places_.hidden_stride,
                reinterpret_cast<float*>(step.workspace + places_.hidden_scales)},
        own_(step.workspace + places_.member + rank * places_.member_bytes) {
    // Tiles of one query read the rows behind it, which must be numbers.
    std::memset(own_, 0, static_cast<size_t>(places_.member_bytes));
  }

  void run() {
    if (s_.attention_kind == Attention::kLocation) locate();
    for (int64_t l = 0; l < s_.layer_count; ++l) {
      team_.each(s_.rows, [&](int64_t r) {
        const int64_t size = l == 0 ? first_input(r) : next_input(l, r);
        team_.stage(input_.at(r), size, staged_, r);
        team_.stage(before(s_.h_before, l, r), s_.H, hidden_, r);
      });
      team_.wait();
      add_gates(s_.layers[l]);
      team_.wait();
      team_.each(s_.rows, [&](int64_t r) { update(l, r); });
      if (l == 0 && scores_keys(s_.attention_kind)) attend();
      // The next layer's rows are staged by the members that own them; nobody reads them before.
    }
    team_.each(s_.rows, [&](int64_t r) {
      const int64_t size = output_row(r);
      team_.stage(input_.at(r), size, staged_, r);
    });
    team_.wait();
    team_.score(s_.output, staged_, s_.rows, s_.scores, s_.workspace + places_.scans);
  }

 private:
  static MemoryPlaces memory_places_of(const RecurrentStep& s, const decoder::Memory& m) {
    Layout layout;
    return memory_places(m, s.B, layout);
  }
  FloatRows rows_at(int64_t place, int64_t size) const {
    return {reinterpret_cast<float*>(s_.workspace + place), row_floats(size)};
  }
  // A state of row r's parent, and of row r.
  const float* before(const float* states, int64_t l, int64_t r) const {
    return states + (l * s_.state_rows + s_.parents[r]) * s_.H;
  }
  float* after(float* states, int64_t l, int64_t r) const {
    return states + (l * s_.state_rows + r) * s_.H;
  }
  static void copy(const float* from, int64_t size, float* to) {
    std::memcpy(to, from, static_cast<size_t>(size * 4));
  }

  // [embedding; context], the context of the step before or, by location, of this one.
  int64_t first_input(int64_t r) const {
    float* const to = input_.at(r);
    copy_row(s_.embedding, s_.tokens[r], s_.E, 1.0f, to);
    const bool now = s_.attention_kind == Attention::kLocation;
    if (!now) copy(s_.context_before + s_.parents[r] * s_.M, s_.M, s_.context + r * s_.M);
    copy(s_.context + r * s_.M, s_.M, to + s_.E);
    return s_.E + s_.M;
  }

  int64_t next_input(int64_t l, int64_t r) const {
    copy(after(s_.h, l - 1, r), s_.H, input_.at(r));
    if (l > 1 || s_.attention_kind == Attention::kNone) return s_.H;
    copy(s_.context + r * s_.M, s_.M, input_.at(r) + s_.H);
    return s_.H + s_.M;
  }

  int64_t output_row(int64_t r) const {
    copy(after(s_.h, s_.layer_count - 1, r), s_.H, input_.at(r));
    if (!s_.context_in_output) return s_.H;
    copy(s_.context + r * s_.M, s_.M, input_.at(r) + s_.H);
    return s_.H + s_.M;
  }

  // What the input and the state before give; of a GRU's new gate they stay apart.
  void add_gates(const RecurrentLayer& w) const {
    team_.multiply(w.input, staged_, s_.rows,
                   [&](int64_t r, int64_t c, Float y, int lanes)
                       __attribute__((always_inline)) { store_lanes(gates_.at(r) + c, y, lanes); });
    // A member has the same columns of both products.
    const bool gru = w.cell == rnn::Cell::kGru;
    team_.multiply(w.hidden, hidden_, s_.rows,
                   [&](int64_t r, int64_t c, Float y, int lanes) __attribute__((always_inline)) {
                     float* const to = gates_.at(r) + c;
                     const int64_t joined = gru ? 2 * s_.H - c : lanes;
                     if (joined >= lanes) {
                       store_lanes(to, add(load(to), y), lanes);
                     } else if (joined <= 0) {
                       store_lanes(to + s_.H, y, lanes);
                     } else {
                       put_apart(to, y, lanes, static_cast<int>(joined));
                     }
                   });
  }

  // The first `joined` lanes are added, the others go one H further on.
  void put_apart(float* to, Float y, int lanes, int joined) const {
    alignas(64) float values[kLanes];
    store(values, y);
    for (int i = 0; i < joined; ++i) to[i] += values[i];
    for (int i = joined; i < lanes; ++i) to[s_.H + i] = values[i];
  }

  void update(int64_t l, int64_t r) const {
    const rnn::Cell cell = s_.layers[l].cell;
    const float* const g = gates_.at(r);
    const float* const h0 = before(s_.h_before, l, r);
    float* const h = after(s_.h, l, r);
    const int64_t H = s_.H;
    for (int64_t u = 0; u < H; u += kLanes) {
      const int n = lanes_left(u, H);
      const auto gate = [&](int64_t i) { return load_lanes(g + i * H + u, n); };
      switch (cell) {
        case rnn::Cell::kLstm: {
          const float* const c0 = before(s_.c_before, l, r);
          const Float kept = mul(sigmoid(gate(1)), load_lanes(c0 + u, n));
          const Float c = add(kept, sigmoid_tanh(gate(0), gate(2)));
          store_lanes(after(s_.c, l, r) + u, c, n);
          store_lanes(h + u, sigmoid_tanh(gate(3), c), n);
          break;
        }
        case rnn::Cell::kGru: {
          const Float z = sigmoid(gate(1));
          const Float fresh = tanh(fma(sigmoid(gate(0)), gate(3), gate(2)));
          store_lanes(h + u, fma(z, sub(load_lanes(h0 + u, n), fresh), fresh), n);
          break;
        }
        case rnn::Cell::kTanh:
          store_lanes(h + u, tanh(gate(0)), n);
          break;
        default:
          store_lanes(h + u, max(zero(), gate(0)), n);
      }
    }
  }

  // Queries of the lowest layer's states, and their contexts.
  void attend() const {
    if (s_.query.N > 0) {
      team_.each(s_.rows, [&](int64_t r) { team_.stage(after(s_.h, 0, r), s_.H, hidden_, r); });
      team_.wait();
      team_.multiply(s_.query, hidden_, s_.rows,
                     [&](int64_t r, int64_t c, Float y, int lanes) __attribute__((always_inline)) {
                       store_lanes(query_.at(r) + c, y, lanes);
                     });
      team_.wait();
    }
    team_.each(s_.rows, [&](int64_t r) {
      float* const query = query_.at(r);
      if (s_.query.N == 0) copy(after(s_.h, 0, r), s_.H, query);
      for (int64_t a = s_.A; a < round_up(s_.A, kLanes); ++a) query[a] = 0.0f;
      float* const weights = reinterpret_cast<float*>(own_ + places_.scores);
      const int64_t sentence = s_.sentences[r], n = s_.memory_lengths[sentence];
      if (n > 0) keys_.attend(sentence, query, own_, places_.own, weights);
      read_memory(r, weights, n);
    });
  }

  // Weights that depend on the place alone: of [embedding; state before], over the first positions.
  void locate() const {
    team_.each(s_.rows, [&](int64_t r) {
      copy_row(s_.embedding, s_.tokens[r], s_.E, 1.0f, input_.at(r));
      copy(before(s_.h_before, 0, r), s_.H, input_.at(r) + s_.E);
      team_.stage(input_.at(r), s_.E + s_.H, staged_, r);
    });
    team_.wait();
    team_.multiply(s_.location, staged_, s_.rows,
                   [&](int64_t r, int64_t c, Float y, int lanes)
                       __attribute__((always_inline)) { store_lanes(query_.at(r) + c, y, lanes); });
    team_.wait();
    team_.each(s_.rows, [&](int64_t r) {
      const int64_t n = s_.memory_lengths[s_.sentences[r]];
      float* const weights = reinterpret_cast<float*>(own_ + places_.scores);
      copy(query_.at(r), n, weights);
      if (n > 0) softmax_row(weights, n, 1.0f);
      read_memory(r, weights, n);
    });
  }

  void read_memory(int64_t r, const float* weights, int64_t n) const {
    if (s_.scores.attention) {
      float* const to = s_.scores.attention + r * s_.S;
      copy(weights, n, to);
      std::memset(to + n, 0, static_cast<size_t>((s_.S - n) * 4));
    }
    const float* const values = s_.values + s_.sentences[r] * s_.S * s_.M;
    weigh<Format::kFloat32>(1, weights, 0, 1, n, reinterpret_cast<const char*>(values), s_.M * 4,
                            s_.M, [&](int64_t, int64_t c, Float sum, int lanes) {
                              store_lanes(s_.context + r * s_.M + c, sum, lanes);
                            });
  }

  const RecurrentStep& s_;
  const StepTeam<format> team_;
  const RecurrentPlaces places_;
  const decoder::Memory memory_;
  const MemoryRows keys_;
  const FloatRows input_, gates_, query_;
  const StagedRows staged_, hidden_;
  char* const own_;
};

template <Format format>
inline void run_recurrent_step(const RecurrentStep& s) {
  Barrier barrier;
  auto body = [&](int rank, int size) { RecurrentRun<format>(s, barrier, rank, size).run(); };
  run_team(s.threads, body);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::generation
