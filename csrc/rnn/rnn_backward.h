// Backward of one direction through time, by the members of a team.
//
// A member owns blocks of hidden units. Per step, latest first: the gates' gradients of its units,
// a barrier, then its columns of (gates' gradients) x W_hh, which is what reaches the state one
// step earlier. Or a member does that for rows of its own and all units, without a barrier, as
// forward does (rnn_plan.cpp, `apart`). The gates' gradients of a chunk of time are kept; from them
// come, as large products,
//     grad_input = dG W_ih,    grad W_ih += dG' X,    grad W_hh += dG' H_previous.
#pragma once

#include "rnn/rnn_backward_cells.h"

namespace encdec::rnn {
namespace ENCDEC_ISA_NAMESPACE {

// The gradients of what else entered a step (rnn_forward.h, Feed).
struct NoFeedBackward {
  static constexpr bool kActive = false;
};

template <Cell cell, Format format, class Feed = NoFeedBackward>
class BackwardRun : BackwardCells<cell, format> {
  using Base = BackwardCells<cell, format>;
  using Base::add_bias_sums, Base::finish;
  using Base::begin_gradients, Base::gate_gradients, Base::previous;
  using Base::call_, Base::s_, Base::q_, Base::dir_, Base::rank_, Base::members_, Base::places_;
  using Base::part, Base::smaller, Base::floats, Base::grad_row, Base::dh, Base::read;
  using Base::work_, Base::own_, Base::apart_, Base::esize_;
  using typename Base::Sg, typename Base::Pl;
  static constexpr int NV = Pl::kVectors;
  static constexpr int kTileRoom = tile_room(format, NV);

 public:
  BackwardRun(const Backward& call, const BackwardDirection& dir, bool first_direction,
              Barrier& barrier, int rank, int members, Feed* feed = nullptr)
      : Base(call, dir, rank, members),
        feed_(feed),
        first_direction_(first_direction),
        barrier_(barrier) {}

  void run() {
    prepare();
    if constexpr (Feed::kActive) {
      feed_->prepare([&](const char* src, int64_t row_stride, int64_t n) {
        pack_transposed(src, row_stride, n, 0, Sg::kGates, feed_->packed(),
                        [](int i) { return Sg::gate_of_x(i); });
      });
    }
    barrier_.wait(members_);
    // Steps run against the direction of forward.
    const bool falling = !dir_.reverse;
    int64_t done = 0;
    while (done < q_.T) {
      int64_t begin = falling ? q_.T - done : done, end = begin, rows = 0;
      while (falling ? begin > 0 : end < q_.T) {
        const int64_t more = q_.active(falling ? begin - 1 : end);
        if (rows > 0 && rows + more > call_.chunk_rows) break;
        rows += more;
        falling ? --begin : ++end;
      }
      for (int64_t i = 0; i < end - begin; ++i) {
        const int64_t t = falling ? end - 1 - i : begin + i;
        step(t, q_.row_start(t) - q_.row_start(begin));
      }
      chunk_products(begin, end, rows, done == 0, done + end - begin == q_.T);
      done += end - begin;
    }
    if (apart_) {
      barrier_.wait(members_);
      add_bias_sums();
    }
    if constexpr (Feed::kActive) feed_->after_last(dh(0), places_.padded);
    finish();
    if constexpr (Feed::kActive) feed_->finish();
  }

 private:
  void prepare() {
    pack_transposed(dir_.weights.hh, dir_.weights.hh_stride, s_.P, 0, Sg::kGates,
                    work_ + places_.w_hh, [](int i) { return Sg::gate_of_h(i); });
    begin_gradients();
  }

  // This member's columns of gates [first, first + gates) of a matrix (gates * H, n), packed with k
  // over the gates' segments.
  template <class GateOf>
  void pack_transposed(const char* src, int64_t row_stride, int64_t n, int first, int gates,
                       char* packed, GateOf gate_of) {
    constexpr int64_t kStep = NV * kLanes * weight_group_bytes(format);
    const int64_t segment = places_.padded;
    const int64_t panel = packed_panel_bytes(format, gates * segment, NV);
    const int64_t begin = part(Pl::blocks(n), rank_), end = part(Pl::blocks(n), rank_ + 1);
    if (s_.H < segment) {
      std::memset(packed + begin * panel, 0, static_cast<size_t>((end - begin) * panel));
    }
    for (int i = 0; i < gates; ++i) {
      pack_rows<format, NV>(src + gate_of(first + i) * s_.H * row_stride * esize_, call_.dtype,
                            row_stride, s_.H, n, begin, end,
                            packed + i * segment / group_size(format) * kStep, panel);
    }
  }

  void step(int64_t t, int64_t chunk_row) {
    const int64_t n = q_.active(t);
    if constexpr (Feed::kActive) {
      barrier_.wait(members_);  // the state's gradients are there, and what was fed's
      feed_->before_step(t, dh(0), places_.padded);
      barrier_.wait(members_);
    }
    const int64_t own_rows = rows_apart(n, own_.row, own_.every);
    for (int64_t i = 0; i < own_rows; ++i) {
      const int64_t r = own_.row + i * own_.every;
      gate_gradients(t, r, chunk_row + r, i, own_rows);
    }
    if (!apart_) barrier_.wait(members_);
    if (t == (dir_.reverse ? q_.T - 1 : 0) && !dir_.grad_h0) return;
    alignas(64) float products[kTileRoom * Pl::kUnits];
    const PackedView w = packed(work_ + places_.w_hh, Sg::kGates);
    const RowTiles tiles(own_rows, format, NV);
    const int64_t first = own_.begin / Pl::kUnits;
    const int64_t blocks = (own_.end - own_.begin + Pl::kUnits - 1) / Pl::kUnits;
    for (int64_t i_block = 0; i_block < blocks; ++i_block) {
      // Back and forth, as in forward: what was read last is still in L2.
      const int64_t b = first + (t % 2 ? blocks - 1 - i_block : i_block);
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = own_.row + tiles.begin(i) * own_.every;
        const int rows = static_cast<int>(tiles.begin(i + 1) - tiles.begin(i));
        const char* x =
            staged_at<format>(grad_row(chunk_row + row), Sg::kFirstOfH * places_.padded);
        multiply_rows<format, NV>(rows, w, b, {x, own_.every * places_.row_bytes}, products,
                                  Pl::kUnits);
        for (int j = 0; j < rows; ++j) {
          for (int v = 0; v < NV; ++v) {
            float* to = dh(row + j * own_.every) + b * Pl::kUnits + v * kLanes;
            const Float product = load(products + j * Pl::kUnits + v * kLanes);
            store(to, cell == Cell::kGru ? add(load(to), product) : product);
          }
        }
      }
    }
    if constexpr (Feed::kActive) {
      feed_->after_step(packed(feed_->packed(), Sg::kGates),
                        {grad_row(chunk_row), places_.row_bytes});
    }
  }

  PackedView packed(const char* data, int gates) const {
    PackedView v;
    v.data = data;
    v.groups = gates * places_.padded / group_size(format);
    v.panel_bytes = packed_panel_bytes(format, gates * places_.padded, NV);
    return v;
  }

  // What the gates' gradients of steps [begin, end) contribute to the input and the weights.
  void chunk_products(int64_t begin, int64_t end, int64_t rows, bool first, bool last) {
    const char** x_rows = reinterpret_cast<const char**>(work_ + places_.pointers);
    const char** h_rows = x_rows + call_.chunk_rows;
    const char** grad_rows = h_rows + call_.chunk_rows;
    if (rank_ == 0) {
      int64_t i = 0;
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t r = 0; r < q_.active(t); ++r, ++i) {
          x_rows[i] = call_.input.at(q_, t, r);
          grad_rows[i] = call_.grad_input.at(q_, t, r);
          const char* h = previous(dir_.output, dir_.h0, s_.P, t, r);
          h_rows[i] = h ? h : work_ + places_.zeros;
        }
      }
    }
    barrier_.wait(members_);
    input_gradients(rows, grad_rows, first);
    const WeightGrad<format> products{call_.dtype,
                                      grad_row(0),
                                      places_.row_bytes,
                                      rows,
                                      places_.padded,
                                      s_.H,
                                      work_ + places_.products,
                                      call_.chunk_rows,
                                      widest_rows(call_),
                                      last && call_.dtype == Format::kFloat32,
                                      rank_,
                                      members_,
                                      barrier_};
    products.prepare();
    const bool sums = call_.dtype != Format::kFloat32;
    const auto target = [&](int64_t place, char* grad) {
      return sums ? floats(place) : reinterpret_cast<float*>(grad);
    };
    products.add(
        x_rows, s_.I, 0, Sg::kGates, [](int i) { return Sg::gate_of_x(i); },
        target(places_.sum_ih, dir_.grad_ih), first);
    // Before the first step there was no state: its rows add nothing.
    const bool starts = begin == 0 && !dir_.reverse && !dir_.h0;
    const int64_t none = starts && format == Format::kFloat32 ? q_.active(0) : 0;
    WeightGrad<format> of_states = products;
    if (none < rows) of_states.grads = grad_row(none), of_states.rows = rows - none, h_rows += none;
    of_states.add(
        h_rows, s_.P, Sg::kFirstOfH, Sg::kGates, [](int i) { return Sg::gate_of_h(i); },
        target(places_.sum_hh, dir_.grad_hh), first);
    if constexpr (Feed::kActive) {
      feed_->add_weight_gradient(
          begin, rows, last, [&](const char* const* fed, int64_t width, float* sums) {
            products.add(
                fed, width, 0, Sg::kGates, [](int i) { return Sg::gate_of_x(i); }, sums, first);
          });
    }
    if (last && sums) {
      round_sums(places_.sum_ih, dir_.grad_ih, Sg::kGates * s_.H * s_.I);
      round_sums(places_.sum_hh, dir_.grad_hh, Sg::kGates * s_.H * s_.P);
    }
  }

  void round_sums(int64_t place, char* to, int64_t size) {
    const int64_t vectors = (size + kLanes - 1) / kLanes;
    for (int64_t i = part(vectors, rank_) * kLanes;
         i < smaller(part(vectors, rank_ + 1) * kLanes, size); i += kLanes) {
      const int n = lanes_left(i, size);
      const float* from = floats(place) + i;
      store_as(call_.dtype, to + i * esize_, n == kLanes ? load(from) : load_partial(from, n), n);
    }
  }

  // grad_input = dG W_ih, W_ih in parts: sums of floats grow part by part where they belong, so
  // that a part, packed in the first chunk just before it is read, may stay in L2 while all rows
  // pass.
  void input_gradients(int64_t rows, const char* const* to, bool first_chunk) {
    constexpr int kGates = Sg::kGates / kInputParts<cell, format>;
    for (int i = 0; i < kInputParts<cell, format>; ++i) {
      char* const w = work_ + places_.w_ih + (places_.one_chunk ? 0 : i * places_.part_bytes);
      if (first_chunk) {
        pack_transposed(dir_.weights.ih, dir_.weights.ih_stride, s_.I, i * kGates, kGates, w,
                        [](int gate) { return Sg::gate_of_x(gate); });
      }
      add_input_gradients(packed(w, kGates), i * kGates * places_.padded, rows, to,
                          !first_direction_ || i > 0);
    }
  }

  // The products of a part, whose gates' gradients begin at number `k` of each row of dG.
  void add_input_gradients(const PackedView& w, int64_t k, int64_t rows, const char* const* to,
                           bool onto) {
    alignas(64) float products[kTileRoom * Pl::kUnits];
    const int64_t begin = part(Pl::blocks(s_.I), rank_), end = part(Pl::blocks(s_.I), rank_ + 1);
    const RowTiles tiles(rows, format, NV);
    // Either all panels stay in L2, or so many rows do.
    const bool panels_stay = (end - begin) * w.panel_bytes <= within_l2(512 * 1024);
    const int64_t group =
        panels_stay ? 1 : rows_in_l2(kTileRoom, w.groups * group_size(format) * 4) / kTileRoom;
    for (int64_t start = 0; start < tiles.count; start += group) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t i = start; i < smaller(start + group, tiles.count); ++i) {
          const int64_t row = tiles.begin(i);
          const int count = static_cast<int>(tiles.begin(i + 1) - row);
          multiply_rows<format, NV>(count, w, b,
                                    {staged_at<format>(grad_row(row), k), places_.row_bytes},
                                    products, Pl::kUnits);
          for (int j = 0; j < count; ++j) {
            for (int v = 0; v < NV && b * Pl::kUnits + v * kLanes < s_.I; ++v) {
              const int64_t column = b * Pl::kUnits + v * kLanes;
              const int lanes = lanes_left(column, s_.I);
              char* p = const_cast<char*>(to[row + j]) + column * esize_;
              Float sum = load(products + j * Pl::kUnits + v * kLanes);
              if (onto) sum = add(sum, read(p, lanes));
              store_as(call_.dtype, p, sum, lanes);
            }
          }
        }
      }
    }
  }

  Feed* const feed_;
  const bool first_direction_;
  Barrier& barrier_;
};

template <Cell cell, Format format>
inline void run_backward(const Backward& f) {
  Barrier barrier;
  auto body = [&](int rank, int size) {
    for (int d = 0; d < f.directions; ++d) {
      // The second direction adds to the first one's input gradients, with the same cut.
      if (d > 0) barrier.wait(size);
      BackwardRun<cell, format>(f, f.direction[d], d == 0, barrier, rank, size).run();
    }
  };
  run_team(f.threads, body);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::rnn
