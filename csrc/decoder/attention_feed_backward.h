// The gradients of what attention_feed.h does, before each step of the recurrent kernels' backward:
// from the context's to the query's, and through W_q to the state's. With g the gradients of the
// scores and r as in attention/additive_factors.h:
//
//     g = w (dW - sum(w dW)),    dW = d_context values' + grad_weights
//     d_query = 4 v sum_s g (r - r^2)  or  scale g keys  or, of location, g,    dh += d_query W_q
//
// With W_o, before all that: d [context; h] = ((1 - f^2) df) W_o.
//
// The gradients of W_q, W_o, keys, values and v are sums over all steps: W_q's and W_o's are
// products at the end, and the others are those of attention over the whole sequence, whose
// gradients of the contexts are left in grad_context.
#pragma once

#include "core/team.h"
#include "decoder/feed_backward_scores.h"

namespace encdec::decoder {
namespace ENCDEC_ISA_NAMESPACE {

template <Cell cell, Format format>
class AttentionFeedBackward : FeedBackwardScores<cell, format> {
  using Base = FeedBackwardScores<cell, format>;
  using Base::call_, Base::m_, Base::s_, Base::dtype_, Base::esize_, Base::rank_, Base::members_;
  using Base::coverage_grads, Base::context_grads, Base::context, Base::fed_grads, Base::output;
  using Base::output_gradients, Base::sentence;
  using Base::part, Base::mine, Base::value, Base::d_query, Base::d_output, Base::key_grads;
  using Base::places_, Base::memory_, Base::own_;

 public:
  static constexpr bool kActive = true;

  AttentionFeedBackward(const Backward& call, Barrier& barrier, int rank, int members)
      : Base(call, rank, members), barrier_(barrier) {}

  // What was fed's columns of W_ih, packed with k over the gates.
  char* packed() const { return call_.workspace + places_.feed_weight; }

  // pack(matrix, row stride, columns) packs this member's part of a matrix there.
  template <class Pack>
  void prepare(const Pack& pack) {
    pack(m_.feed_weight, m_.feed_stride, m_.F);
    std::memset(own_, 0, static_cast<size_t>(places_.member_bytes));
    const int64_t padded = places_.memory.padded;
    for (int64_t b = part(s_.B, rank_); b < part(s_.B, rank_ + 1); ++b) {
      memory_.prepare(b);
      if (m_.covered()) {
        const int64_t bytes = padded * 4;
        std::memset(key_grads(b), 0, static_cast<size_t>(memory_.stride() * bytes));
        std::memset(coverage_grads(b), 0, static_cast<size_t>(bytes));
      }
      std::memset(fed_grads(b), 0, static_cast<size_t>(places_.fed_row * 4));
      for (int64_t s = 0; s < padded; ++s) {
        float_row(s < m_.keys_of(b) ? m_.values.at(b, s) : nullptr, dtype_, m_.M, value(b, s));
      }
    }
    if (m_.query_weight) {
      pack_columns_of(m_.query_weight, m_.query_stride, m_.A, s_.H, places_.query_weight);
    }
    if (m_.output_weight) {
      const char* const of_state = m_.output_weight + m_.M * esize_;
      pack_columns_of(m_.output_weight, m_.output_stride, m_.F, m_.M, places_.output_context);
      pack_columns_of(of_state, m_.output_stride, m_.F, s_.H, places_.output_state);
    }
  }

  // state_grads: the gradients of [h_t; f_t] by the steps after t, a row for each sentence. Those
  // of f_t, or of location of f_{t+1}, go over into those of h_t.
  void before_step(int64_t t, float* state_grads, int64_t stride) {
    const int64_t next = m_.located() ? t + 1 : t;
    if (next < s_.T) attend_backward(next, state_grads, stride);
  }

  // The same of the first state, once all members have its gradients.
  void after_last(float* state_grads, int64_t stride) {
    if (!m_.located()) return;
    barrier_.wait(members_);
    attend_backward(0, state_grads, stride);
    barrier_.wait(members_);
  }

  // The gradients of f_{t-1} from those of step t's gates.
  void after_step(const PackedView& w, RowsView gate_grads) {
    const RowTiles tiles(s_.B, format, kVectors);
    for (int64_t p = part(panels_of(m_.F), rank_); p < part(panels_of(m_.F), rank_ + 1); ++p) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i);
        multiply_rows<format, kVectors>(static_cast<int>(tiles.begin(i + 1) - row), w, p,
                                        gate_grads.from(row), fed_grads(row) + p * kPanel,
                                        places_.fed_row);
      }
    }
  }

  // The gradient of what was fed's columns of W_ih, of the chunk of `rows` rows from step `begin`
  // on. add(rows, width, sums) adds their product with the gates' gradients.
  template <class Add>
  void add_weight_gradient(int64_t begin, int64_t rows, bool last, const Add& add) {
    const char** const fed = reinterpret_cast<const char**>(call_.workspace + places_.fed_rows);
    for (int64_t i = part(rows, rank_); i < part(rows, rank_ + 1); ++i) {
      const int64_t t = m_.located() ? begin + i / s_.B : begin + i / s_.B - 1, b = i % s_.B;
      fed[i] = t >= 0 ? output(t, b) + s_.H * esize_ : m_.context0 + b * m_.F * esize_;
    }
    barrier_.wait(members_);
    const bool sums = dtype_ != Format::kFloat32;
    float* const target = reinterpret_cast<float*>(sums ? call_.workspace + places_.fed_sums
                                                        : call_.grad_feed_weight);
    add(fed, m_.F, target);
    if (last && sums)
      round_sums(target, rnn::gate_count(cell) * s_.H, m_.F, call_.grad_feed_weight);
  }

  // The gradients of the first context, W_q and W_o; all members call it.
  void finish() {
    for (int64_t b = part(s_.B, rank_); b < part(s_.B, rank_ + 1); ++b) {
      for (int64_t c = 0; c < m_.F; c += kLanes) {
        const Float first = m_.located() ? zero() : load(fed_grads(b) + c);
        store_as(dtype_, call_.grad_context0 + (b * m_.F + c) * esize_, first, lanes_left(c, m_.F));
      }
    }
    if (m_.covered()) finish_coverage();
    if (m_.query_weight) {
      const int64_t before = m_.located() ? 1 : 0;
      weight_gradient(d_query(0, 0), places_.d_query_row, m_.A, s_.H, call_.grad_query_weight,
                      [&](int64_t t, int64_t b) {
                        if (t >= before) return output(t - before, b);
                        return call_.rnn.direction[0].h0 + b * s_.H * esize_;
                      });
    }
    if (m_.output_weight) {
      weight_gradient(d_output(0, 0), places_.d_output_row, m_.F, m_.M, call_.grad_output_context,
                      [&](int64_t t, int64_t b) { return context(t, b); });
      weight_gradient(d_output(0, 0), places_.d_output_row, m_.F, s_.H, call_.grad_output_state,
                      [&](int64_t t, int64_t b) { return output(t, b); });
    }
  }

 private:
  // The gradients of keys, v, the first coverage and u.
  void finish_coverage() const {
    for (int64_t b = part(s_.B, rank_); b < part(s_.B, rank_ + 1); ++b) {
      for (int64_t s = 0; s < m_.S; ++s) {
        put_row(key_grads(b) + s * memory_.stride(), m_.A,
                call_.grad_keys + (b * m_.S + s) * m_.A * esize_);
      }
      put_row(coverage_grads(b), m_.S, call_.grad_coverage + b * m_.S * esize_);
    }
    barrier_.wait(members_);
    if (rank_ > 0) return;
    for (const int64_t place : {places_.d_v, places_.d_u}) {
      for (int member = 1; member < members_; ++member) {
        const char* const others = own_ + member * places_.member_bytes + place;
        for (int64_t a = 0; a < m_.A; a += kLanes) {
          float* const sum = mine(place) + a;
          store(sum, add(load(sum), load(reinterpret_cast<const float*>(others) + a)));
        }
      }
      put_row(mine(place), m_.A,
              place == places_.d_v ? call_.grad_score_weight : call_.grad_coverage_weight);
    }
  }

  void put_row(const float* from, int64_t count, char* to) const {
    for (int64_t i = 0; i < count; i += kLanes) {
      store_as(dtype_, to + i * esize_, load(from + i), lanes_left(i, count));
    }
  }

  // The gradient (columns, k) of a matrix that made `grads`, staged rows [T][B], of the rows that
  // row(t, b) gives.
  template <class Row>
  void weight_gradient(const char* grads, int64_t row_bytes, int64_t columns, int64_t k, char* to,
                       const Row& row) const {
    const int64_t rows = s_.T * s_.B;
    const char** const inputs = reinterpret_cast<const char**>(call_.workspace + places_.rows);
    for (int64_t i = part(rows, rank_); i < part(rows, rank_ + 1); ++i) {
      inputs[i] = row(i / s_.B, i % s_.B);
    }
    barrier_.wait(members_);
    const bool sums = dtype_ != Format::kFloat32;
    const WeightGrad<format> product{
        dtype_, grads, row_bytes, rows,  columns,  columns, call_.workspace + places_.products,
        rows,   k,     !sums,     rank_, members_, barrier_};
    float* const target = reinterpret_cast<float*>(sums ? call_.workspace + places_.sums : to);
    product.prepare();
    product.add(inputs, k, 0, 1, [](int gate) { return gate; }, target, true);
    if (!sums) return;
    round_sums(target, columns, k, to);
    barrier_.wait(members_);  // the sums' place is used again
  }

  // This member's columns of a matrix (k, columns), packed with k over its rows.
  void pack_columns_of(const char* matrix, int64_t row_stride, int64_t k, int64_t columns,
                       int64_t place) const {
    const int64_t panels = panels_of(columns);
    pack_rows<format, kVectors>(matrix, dtype_, row_stride, k, columns, part(panels, rank_),
                                part(panels, rank_ + 1), call_.workspace + place,
                                packed_panel_bytes(format, k, kVectors));
  }

  // put(b, column, vector, lanes) takes the products of staged rows [B] of k numbers by this
  // member's panels of a matrix that pack_columns_of packed.
  template <class Put>
  void each_product(const char* rows, int64_t row_bytes, int64_t place, int64_t k, int64_t columns,
                    const Put& put) const {
    alignas(64) float tile[tile_room(format, kVectors) * kPanel];
    const PackedView w = view(call_.workspace, MatrixPlace{place}, format, k, kVectors);
    const RowTiles tiles(s_.B, format, kVectors);
    const int64_t panels = panels_of(columns);
    for (int64_t p = part(panels, rank_); p < part(panels, rank_ + 1); ++p) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i), end = tiles.begin(i + 1);
        multiply_rows<format, kVectors>(static_cast<int>(end - row), w, p,
                                        {rows + row * row_bytes, row_bytes}, tile, kPanel);
        for (int64_t b = row; b < end; ++b) {
          for (int v = 0; v < kVectors && p * kPanel + v * kLanes < columns; ++v) {
            const int64_t column = p * kPanel + v * kLanes;
            const int lanes = lanes_left(column, columns);
            const Float x = load(tile + (b - row) * kPanel + v * kLanes);
            put(b, column, first_lanes(x, lanes), lanes);
          }
        }
      }
    }
  }

  // From the gradients of f of step t to those of the state that it was made of.
  void attend_backward(int64_t t, float* state_grads, int64_t stride) const {
    const auto onto_state = [&](int64_t b, int64_t column, Float x, int) {
      float* const to = state_grads + b * stride + column;
      store(to, add(load(to), x));
    };
    if (m_.output_weight) {
      for (int64_t b = part(s_.B, rank_); b < part(s_.B, rank_ + 1); ++b) output_gradients(t, b);
      barrier_.wait(members_);
      const char* const rows = d_output(t, 0);
      each_product(
          rows, places_.d_output_row, places_.output_context, m_.F, m_.M,
          [&](int64_t b, int64_t column, Float x, int) { store(context_grads(b) + column, x); });
      each_product(rows, places_.d_output_row, places_.output_state, m_.F, s_.H, onto_state);
      barrier_.wait(members_);
    }
    for (int64_t b = part(s_.B, rank_); b < part(s_.B, rank_ + 1); ++b) {
      sentence(t, b, state_grads + b * stride);
    }
    if (!m_.query_weight) return;
    barrier_.wait(members_);
    each_product(d_query(t, 0), places_.d_query_row, places_.query_weight, m_.A, s_.H, onto_state);
  }

  // This member's rows of sums into a matrix of the call's dtype.
  void round_sums(const float* sums, int64_t rows, int64_t width, char* to) const {
    for (int64_t i = part(rows, rank_); i < part(rows, rank_ + 1); ++i) {
      for (int64_t c = 0; c < width; c += kLanes) {
        const int n = lanes_left(c, width);
        const char* from = reinterpret_cast<const char*>(sums + i * width + c);
        store_as(dtype_, to + (i * width + c) * esize_, load_as(Format::kFloat32, from, n), n);
      }
    }
  }

  Barrier& barrier_;
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::decoder
