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
  m.coverage_weight = reinterpret_cast<const char*>(s.coverage_weight);
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

struct StagedPlaces {
  int64_t rows, stride, scales;

  StagedRows at(char* workspace) const {
    return {workspace + rows, stride, reinterpret_cast<float*>(workspace + scales)};
  }
};

struct RecurrentPlaces {
  int64_t input, gates, query, first_weights, contexts;  // rows of floats
  StagedPlaces staged, context, hidden;
  int64_t scans, input_size;
  int64_t member;
  QueryPlaces own;
  int64_t member_bytes, bytes;
};

inline RecurrentPlaces recurrent_places(const RecurrentStep& s) {
  RecurrentPlaces p{};
  Layout all, member;
  const auto staged = [&](int64_t size) {
    const int64_t stride = staged_row_bytes(s.format, size);
    return StagedPlaces{all.take(s.rows * stride), stride, all.take(s.rows * 4)};
  };
  // The widest of what is staged beside contexts: embeddings, states, what location scores are of.
  p.input_size = s.location.N > 0 ? s.E + s.H : std::max(s.E, s.H);
  p.input = all.take(s.rows * row_floats(p.input_size) * 4);
  p.gates = all.take(s.rows * row_floats(4 * s.H) * 4);
  p.query = all.take(s.rows * row_floats(std::max(s.A, s.location.N)) * 4);
  p.first_weights = all.take(s.rows * s.weights_stride * 4);
  p.contexts = all.take(s.rows * row_floats(s.attentional.N > 0 ? s.M : 0) * 4);
  p.staged = staged(p.input_size);
  p.context = staged(s.multiplies_context || s.attentional.N > 0 ? std::max(s.M, s.F) : 0);
  p.hidden = staged(s.H);
  p.scans = all.take(s.threads * score_bytes(s.rows));
  p.member = all.end();
  Layout unused;
  p.own = query_places(memory_places(memory_of(s), s.B, unused), member);
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
        first_weights_{reinterpret_cast<float*>(step.workspace + places_.first_weights),
                       step.weights_stride},
        contexts_(step.attentional.N > 0 ? rows_at(places_.contexts, step.M)
                                         : FloatRows{step.context, step.F}),
        staged_(places_.staged.at(step.workspace)),
        staged_contexts_(places_.context.at(step.workspace)),
        hidden_(places_.hidden.at(step.workspace)),
        own_(step.workspace + places_.member + rank * places_.member_bytes) {
    // Tiles of one query read the rows behind it, which must be numbers.
    std::memset(own_, 0, static_cast<size_t>(places_.member_bytes));
  }

  void run() {
    if (s_.attention_kind == Attention::kLocation) locate();
    for (int64_t l = 0; l < s_.layer_count; ++l) {
      team_.each(s_.rows, [&](int64_t r) {
        l == 0 ? first_input(r) : next_input(l, r);
        team_.stage(before(s_.h_before, l, r), s_.H, hidden_, r);
      });
      team_.wait();
      add_gates(l);
      team_.wait();
      team_.each(s_.rows, [&](int64_t r) { update(l, r); });
      if (l == 0 && scores_keys(s_.attention_kind)) attend();
      if (l == 0 && s_.attentional.N > 0) make_attentional();
      // The next layer's rows are staged by the members that own them; nobody reads them before.
    }
    team_.each(s_.rows, [&](int64_t r) {
      team_.stage(after(s_.h, s_.layer_count - 1, r), s_.H, staged_, r);
      if (multiplies(s_.output.context, kOutput)) stage_context(s_.context, r, r);
    });
    team_.wait();
    team_.score(s_.output, staged_, s_.rows, s_.scores, s_.workspace + places_.scans,
                [&](const Panels& panels, const auto& put) {
                  add_context(s_.output.context, kOutput, weights(), panels, put);
                });
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

  // Whether weights of the context are multiplied with it (kernels.h, ContextRows).
  bool multiplies(const Projection& weights, ContextReader reader) const {
    return weights.N > 0 && !s_.context_rows[reader].data;
  }
  static ContextReader reader_of(int64_t l) { return l == 0 ? kFirstLayer : kSecondLayer; }
  // What stands in the context's place in row `from`, which row r reads.
  void stage_context(const float* contexts, int64_t from, int64_t r) const {
    team_.stage(contexts + from * s_.F, s_.F, staged_contexts_, r);
  }
  // What stands in for a context without attention is the same in all steps.
  bool constant() const { return s_.attention_kind == Attention::kNone; }
  bool located() const { return s_.attention_kind == Attention::kLocation; }
  int64_t positions_of(int64_t sentence) const {
    return constant() ? 0 : s_.memory_lengths[sentence];
  }
  FloatRows weights() const { return {s_.weights, s_.weights_stride}; }

  // The token, and the context of the step before or, by location, of this one.
  void first_input(int64_t r) const {
    const RecurrentLayer& layer = s_.layers[0];
    if (layer.token_gates) {
      const int64_t size = rnn::gate_count(layer.cell) * s_.H;
      copy(layer.token_gates + s_.tokens[r] * size, size, gates_.at(r));
    } else {
      copy_row(s_.embedding, s_.tokens[r], s_.E, 1.0f, input_.at(r));
      team_.stage(input_.at(r), s_.E, staged_, r);
    }
    const int64_t parent = s_.parents[r];
    if (!located()) {  // rows of a sentence side by side, whatever their parents; what stays, stays
      const float* const from = s_.weights_before + parent * s_.weights_stride;
      const int64_t count = 1 + positions_of(s_.sentences[r]);
      if (s_.context_rows[kFirstLayer].data) copy(from, count, first_weights_.at(r));
      if (constant()) copy(from, count, weights().at(r));
      if (constant() && s_.multiplies_context) {
        copy(s_.context_before + parent * s_.F, s_.F, s_.context + r * s_.F);
      }
    }
    if (multiplies(layer.context, kFirstLayer)) {
      located() ? stage_context(s_.context, r, r) : stage_context(s_.context_before, parent, r);
    }
  }

  void next_input(int64_t l, int64_t r) const {
    team_.stage(after(s_.h, l - 1, r), s_.H, staged_, r);
    if (multiplies(s_.layers[l].context, reader_of(l))) stage_context(s_.context, r, r);
  }

  // What token or state, context and the state before give; of a GRU's new gate the last stays
  // apart. A member has the same columns of all products.
  void add_gates(int64_t l) const {
    const RecurrentLayer& w = s_.layers[l];
    const auto add_to =
        [&](int64_t r, int64_t c, Float y, int lanes)
            __attribute__((always_inline)) { add_lanes(gates_.at(r) + c, y, lanes); };
    if (l > 0 || !w.token_gates) {
      team_.multiply(w.input, staged_, s_.rows,
                     [&](int64_t r, int64_t c, Float y, int lanes) __attribute__((always_inline)) {
                       store_lanes(gates_.at(r) + c, y, lanes);
                     });
    }
    const bool first = l == 0 && !located();
    add_context(w.context, reader_of(l), first ? first_weights_ : weights(),
                team_.own_panels(w.context.N), add_to);
    const bool gru = w.cell == rnn::Cell::kGru;
    team_.multiply(w.hidden, hidden_, s_.rows,
                   [&](int64_t r, int64_t c, Float y, int lanes) __attribute__((always_inline)) {
                     const int64_t joined = gru ? 2 * s_.H - c : lanes;
                     if (joined >= lanes) {
                       add_to(r, c, y, lanes);
                     } else if (joined <= 0) {
                       store_lanes(gates_.at(r) + c + s_.H, y, lanes);
                     } else {
                       put_apart(gates_.at(r) + c, y, lanes, static_cast<int>(joined));
                     }
                   });
  }

  // put(row, column, a vector of W c, how many of its lanes count), for columns of some panels.
  template <class Put>
  void add_context(const Projection& p, ContextReader reader, const FloatRows& weights,
                   const Panels& panels, const Put& put) const {
    if (p.N == 0) return;
    if (multiplies(p, reader)) {
      team_.multiply(p, staged_contexts_, s_.rows, panels, put);
      return;
    }
    const ContextRows& rows = s_.context_rows[reader];
    const int64_t column = panels.first * kPanel;
    const int64_t width = std::min(panels.end * kPanel, p.N) - column;
    for (int64_t r = 0; r < s_.rows;) {  // the rows of a sentence together
      const int32_t sentence = s_.sentences[r];
      int64_t count = 1;
      while (r + count < s_.rows && s_.sentences[r + count] == sentence) ++count;
      const float* const from = rows.data + s_.first_rows[sentence] * rows.stride + column;
      weigh<Format::kFloat32>(
          count, weights.at(r), weights.stride, 1, 1 + positions_of(sentence),
          reinterpret_cast<const char*>(from), rows.stride * 4, width,
          [&](int64_t i, int64_t c, Float y, int lanes)
              __attribute__((always_inline)) { put(r + i, column + c, y, lanes); });
      r += count;
    }
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
      const int64_t sentence = s_.sentences[r], n = positions_of(sentence);
      float* const own = position_weights(r);
      const int64_t covered = s_.coverage_weight ? s_.parents[r] * s_.weights_stride : 0;
      const float* const sums = s_.coverage_weight ? s_.coverage_before + covered : nullptr;
      if (n > 0) keys_.attend(sentence, query, own_, places_.own, own, sums);
      for (int64_t i = 0; s_.coverage_weight && i < n; ++i) {
        s_.coverage[r * s_.weights_stride + i] = sums[i] + own[i];
      }
      read_memory(r, own, n);
    });
  }

  // tanh(W [c; h]). A row's context and state are staged by the member that has written them; all
  // have read what was staged before.
  void make_attentional() const {
    team_.each(s_.rows, [&](int64_t r) {
      team_.stage(after(s_.h, 0, r), s_.H, hidden_, r);
      if (multiplies(s_.attentional, kAttentional)) {
        team_.stage(contexts_.at(r), s_.M, staged_contexts_, r);
      }
    });
    team_.wait();
    const FloatRows to{s_.context, s_.F};
    team_.multiply(s_.attentional_state, hidden_, s_.rows,
                   [&](int64_t r, int64_t c, Float y, int lanes)
                       __attribute__((always_inline)) { store_lanes(to.at(r) + c, y, lanes); });
    add_context(s_.attentional, kAttentional, weights(), team_.own_panels(s_.F),
                [&](int64_t r, int64_t c, Float y, int lanes) __attribute__((always_inline)) {
                  store_lanes(to.at(r) + c, tanh(add(load_lanes(to.at(r) + c, lanes), y)), lanes);
                });
    team_.wait();
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
      const int64_t n = positions_of(s_.sentences[r]);
      float* const own = position_weights(r);
      copy(query_.at(r), n, own);
      if (n > 0) softmax_row(own, n, 1.0f);
      read_memory(r, own, n);
    });
  }

  // Row r's, of the positions. What stood in for the first context has been read.
  float* position_weights(int64_t r) const {
    float* const own = weights().at(r);
    own[0] = 0.0f;
    return own + 1;
  }

  void read_memory(int64_t r, const float* weights, int64_t n) const {
    if (s_.scores.attention) {
      float* const to = s_.scores.attention + r * s_.S;
      copy(weights, n, to);
      std::memset(to + n, 0, static_cast<size_t>((s_.S - n) * 4));
    }
    if (!s_.multiplies_context) return;
    const float* const values = s_.values + s_.sentences[r] * s_.S * s_.M;
    weigh<Format::kFloat32>(1, weights, 0, 1, n, reinterpret_cast<const char*>(values), s_.M * 4,
                            s_.M, [&](int64_t, int64_t c, Float sum, int lanes) {
                              store_lanes(contexts_.at(r) + c, sum, lanes);
                            });
  }

  const RecurrentStep& s_;
  const StepTeam<format> team_;
  const RecurrentPlaces places_;
  const decoder::Memory memory_;
  const MemoryRows keys_;
  const FloatRows input_, gates_, query_, first_weights_, contexts_;
  const StagedRows staged_, staged_contexts_, hidden_;
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
