// What a member of the team keeps of one direction's backward, and what a step makes of the state's
// gradients: those of the gates, and what stays with the cell. rnn_backward.h walks the steps.
//
// A row of dG is laid out in segments of `padded` units: LSTM i f g o. The GRU's new gate has two
// gradients, one for x's side and one, times r, for h's: segments n r z n', so that either product
// reads three neighbouring ones.
#pragma once

#include "core/math.h"
#include "core/weight_grad.h"
#include "rnn/rnn_weights.h"

namespace encdec::rnn {
namespace ENCDEC_ISA_NAMESPACE {

template <Cell cell>
struct Segments {
  static constexpr int kGates = gate_count(cell);
  static constexpr int kCount = cell == Cell::kGru ? 4 : kGates;
  static constexpr int kFirstOfH = kCount - kGates;  // h's product reads [kFirstOfH, kCount)
  // torch's gate of segment `first + i` of the product of x (first 0) or h.
  static constexpr int gate_of_x(int i) { return cell == Cell::kGru ? (i + 2) % 3 : i; }
  static constexpr int gate_of_h(int i) { return i; }
};

// Parts in which W_ih is packed and multiplied: gates, where sums can be added to in memory.
template <Cell cell, Format format>
constexpr int kInputParts = format == Format::kFloat32 ? gate_count(cell) : 1;

// The sum of a segment's gradients over a member's rows: Kahan's, for there may be a hundred
// thousand rows, of plain sums over kRows rows of a step.
struct alignas(64) BiasSums {
  static constexpr int kRows = 8;
  float sum[kLanes], error[kLanes], rows[kLanes];

  // Takes in a row, which is the first or the last of its plain sum, or both.
  ENCDEC_INLINE void take(Float v, bool first, bool last) {
    if (!first) v = add(load(rows), v);
    if (!last) return store(rows, v);
    const Float start = load(sum), wanted = sub(v, load(error)), after = add(start, wanted);
    store(error, sub(sub(after, start), wanted));
    store(sum, after);
  }
};

struct BackwardPlaces {
  int64_t padded;            // units per segment
  int64_t row_bytes;         // of dG
  int64_t w_hh, w_ih;        // packed, k over gates
  int64_t part_bytes;        // of W_ih
  bool one_chunk;            // every part of W_ih is needed once: they take turns in one place
  int64_t gate_grads;        // staged rows of dG [chunk rows]
  int64_t dh, dc;            // float [B][padded]
  int64_t bias, bias_bytes;  // BiasSums [padded / kLanes][segments]; per member
  int64_t sum_ih, sum_hh;    // float sums of weight gradients, where those are not float
  int64_t pointers;          // const char* [chunk rows]: inputs, previous states, grad_input
  int64_t zeros;             // a row of zeros, for an absent h0
  int64_t products;          // WeightGrad's
  int64_t bytes;
};

// Of the rows that meet the gates' gradients in a weight's.
inline int64_t widest_rows(const Backward& f) {
  const int64_t own = f.shape.I > f.shape.P ? f.shape.I : f.shape.P;
  return own > f.fed ? own : f.fed;
}

template <Cell cell, Format format>
inline BackwardPlaces backward_places(const Backward& f) {
  using Sg = Segments<cell>;
  const Shape& s = f.shape;
  BackwardPlaces p{};
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t here = at;
    at += round_up(bytes, 64);
    return here;
  };
  const int64_t widest = widest_rows(f);
  p.padded = round_up(s.H, PlainBlocking::kUnits);
  p.row_bytes = staged_row_bytes(format, Sg::kCount * p.padded);
  const int64_t panel = packed_panel_bytes(format, Sg::kGates * p.padded, PlainBlocking::kVectors);
  p.w_hh = take(PlainBlocking::blocks(s.P) * panel);
  constexpr int kParts = kInputParts<cell, format>;
  p.one_chunk = f.sequences.rows() <= f.chunk_rows;
  p.part_bytes =
      PlainBlocking::blocks(s.I) *
      packed_panel_bytes(format, Sg::kGates / kParts * p.padded, PlainBlocking::kVectors);
  p.w_ih = take((p.one_chunk ? 1 : kParts) * p.part_bytes);
  p.gate_grads = take(f.chunk_rows * p.row_bytes);
  p.dh = take(s.B * p.padded * 4);
  p.dc = take(cell == Cell::kLstm ? s.B * p.padded * 4 : 0);
  p.bias_bytes = p.padded / kLanes * Sg::kCount * static_cast<int64_t>(sizeof(BiasSums));
  p.bias = take((f.apart ? f.threads : 1) * p.bias_bytes);
  const bool sums = f.dtype != Format::kFloat32;
  p.sum_ih = take(sums ? Sg::kGates * s.H * s.I * 4 : 0);
  p.sum_hh = take(sums ? Sg::kGates * s.H * s.P * 4 : 0);
  p.pointers = take(3 * f.chunk_rows * static_cast<int64_t>(sizeof(char*)));
  p.zeros = take(s.P * 4);
  p.products = take(WeightGrad<format>::bytes(f.chunk_rows, widest, p.row_bytes, f.threads));
  p.bytes = at;
  return p;
}

template <Cell cell, Format format>
class BackwardCells {
 protected:
  using Sg = Segments<cell>;
  using Pl = PlainBlocking;

  BackwardCells(const Backward& call, const BackwardDirection& dir, int rank, int members)
      : call_(call),
        s_(call.shape),
        q_(call.sequences),
        dir_(dir),
        rank_(rank),
        members_(members),
        places_(backward_places<cell, format>(call)),
        work_(call.workspace),
        first_(part(Pl::blocks(s_.H), rank) * Pl::kUnits),
        last_(smaller(part(Pl::blocks(s_.H), rank + 1) * Pl::kUnits, s_.H)),
        apart_(call.apart && members == call.threads),
        own_(apart_ ? OwnPart{rank, members, 0, s_.H} : OwnPart{0, 1, first_, last_}),
        esize_(element_bytes(call.dtype)),
        saved_(saved_layout<cell>(s_, call.dtype, q_.rows())) {}

  // What a member does of each step: every `every`-th row from `row` on, units [begin, end).
  struct OwnPart {
    int64_t row, every, begin, end;
  };
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  int64_t part(int64_t n, int i) const { return n * i / members_; }
  float* floats(int64_t place) const { return reinterpret_cast<float*>(work_ + place); }
  // Of the vector of units from u on.
  BiasSums* bias_sums(int segment, int64_t u, int64_t member) const {
    return reinterpret_cast<BiasSums*>(work_ + places_.bias + member * places_.bias_bytes) +
           u / kLanes * Sg::kCount + segment;
  }
  float* bias_sum(int segment, int64_t u, int64_t member) const {
    return bias_sums(segment, u, member)->sum;
  }
  int64_t bias_owner() const { return apart_ ? rank_ : 0; }
  char* grad_row(int64_t row) const { return work_ + places_.gate_grads + row * places_.row_bytes; }
  float* dh(int64_t r) const { return floats(places_.dh) + r * places_.padded; }
  float* dc(int64_t r) const { return floats(places_.dc) + r * places_.padded; }
  // Tensors have the dtype that the products are computed in.
  static Float read(const char* p, int n) { return load_as(format, p, n); }

  // The row that the state had one step earlier; null at the first step without an initial state.
  const char* previous(const StepTensor& tensor, const char* initial, int64_t size, int64_t t,
                       int64_t r) const {
    const int64_t before = dir_.reverse ? t + 1 : t - 1;
    const bool first = before < 0 || before >= q_.T || r >= q_.active(before);
    if (!first) return tensor.at(q_, before, r);
    return initial ? initial + q_.position(r) * size * esize_ : nullptr;
  }

  // The gradients of the last states, and zeros where sums begin.
  void begin_gradients() {
    if (rank_ == 0) std::memset(work_ + places_.zeros, 0, static_cast<size_t>(s_.P * 4));
    for (int64_t u = own_.begin; u < own_.end; u += kLanes) {
      std::memset(bias_sums(0, u, bias_owner()), 0, sizeof(BiasSums) * Sg::kCount);
    }
    for (int64_t u = first_; u < last_; u += kLanes) {
      const int n = lanes_left(u, s_.H);
      for (int64_t r = 0; r < s_.B; ++r) {
        const int64_t at = (q_.position(r) * s_.H + u) * esize_;
        store(dh(r) + u, dir_.grad_h_n ? read(dir_.grad_h_n + at, n) : zero());
        if constexpr (cell == Cell::kLstm) {
          store(dc(r) + u, dir_.grad_c_n ? read(dir_.grad_c_n + at, n) : zero());
        }
      }
    }
    // Units past the last real one, up to the end of a segment, are zero in every row.
    for (int64_t row = part(call_.chunk_rows, rank_); row < part(call_.chunk_rows, rank_ + 1);
         ++row) {
      for (int i = 0; i < Sg::kCount; ++i) {
        for (int64_t u = round_up(s_.H, kLanes); u < places_.padded; u += kLanes) {
          stage_vector<format>(staged_at<format>(grad_row(row), i * places_.padded + u), zero());
        }
      }
    }
  }

  // Gradients before the activations, of one row and this member's units; `i` is the row's number
  // among this member's `n` of the step. Pointers are taken once per row: a store might change what
  // they are computed from, for all that the compiler knows.
  void gate_gradients(int64_t t, int64_t r, int64_t chunk_row, int64_t i, int64_t n) {
    const bool first = i % BiasSums::kRows == 0;
    const bool last = i + 1 == n || (i + 1) % BiasSums::kRows == 0;
    constexpr int64_t kBytes = element_bytes(format);
    const int64_t padded = places_.padded, width = s_.H, end = own_.end;
    const SavedGates layout = saved_;
    const char* gates =
        dir_.gates +
        ((q_.row_start(t) + r) * layout.row + own_.begin / kLanes * layout.vector) * kBytes;
    const char* const grad_output = dir_.grad_output.data ? dir_.grad_output.at(q_, t, r) : nullptr;
    const char* const grad_cells =
        cell == Cell::kLstm && dir_.grad_cells.data ? dir_.grad_cells.at(q_, t, r) : nullptr;
    const bool lstm = cell == Cell::kLstm;
    const char* const now = (lstm ? dir_.cells : dir_.output).at(q_, t, r);
    const char* const before = lstm ? previous(dir_.cells, dir_.c0, width, t, r)
                                    : previous(dir_.output, dir_.h0, width, t, r);
    float* const dh_row = dh(r);
    float* const dc_row = lstm ? dc(r) : nullptr;
    char* const grads = grad_row(chunk_row);
    BiasSums* bias = bias_sums(0, own_.begin, bias_owner());
    const Float one = set1(1.0f);
    for (int64_t u = own_.begin; u < end;
         u += kLanes, gates += layout.vector * kBytes, bias += Sg::kCount) {
      const int lanes = lanes_left(u, width);
      const int64_t at = u * kBytes;
      const auto saved = [&](int gate) __attribute__((always_inline)) {
        return read(gates + gate * layout.gate * kBytes, lanes);
      };
      const auto put = [&](int segment, Float v) __attribute__((always_inline)) {
        stage_vector<format>(staged_at<format>(grads, segment * padded + u), v);
        bias[segment].take(v, first, last);
      };
      Float d_h = load(dh_row + u);
      if (grad_output) d_h = add(d_h, read(grad_output + at, lanes));
      if constexpr (cell == Cell::kLstm) {
        const Float i = saved(0), f = saved(1), g = saved(2), o = saved(3);
        const Float tanh_c = tanh(read(now + at, lanes));
        const Float c_before = before ? read(before + at, lanes) : zero();
        Float d_c = fma(mul(d_h, o), fnma(tanh_c, tanh_c, one), load(dc_row + u));
        if (grad_cells) d_c = add(d_c, read(grad_cells + at, lanes));
        store(dc_row + u, mul(d_c, f));
        put(0, mul(mul(d_c, g), mul(i, sub(one, i))));
        put(1, mul(mul(d_c, c_before), mul(f, sub(one, f))));
        put(2, mul(mul(d_c, i), fnma(g, g, one)));
        put(3, mul(mul(d_h, tanh_c), mul(o, sub(one, o))));
      } else if constexpr (cell == Cell::kGru) {
        const Float reset = saved(0), update = saved(1), fresh = saved(2), inner = saved(3);
        const Float h_before = before ? read(before + at, lanes) : zero();
        const Float d_fresh = mul(mul(d_h, sub(one, update)), fnma(fresh, fresh, one));
        put(0, d_fresh);
        put(1, mul(mul(d_fresh, inner), mul(reset, sub(one, reset))));
        put(2, mul(mul(d_h, sub(h_before, fresh)), mul(update, sub(one, update))));
        put(3, mul(d_fresh, reset));
        store(dh_row + u, mul(d_h, update));
      } else {
        const Float h = read(now + at, lanes);
        put(0, cell == Cell::kTanh ? mul(d_h, fnma(h, h, one)) : where_positive(h, d_h));
      }
    }
  }

  // Of this member's units, over the rows of all members.
  void add_bias_sums() {
    for (int64_t u = first_; u < last_; u += kLanes) {
      for (int segment = 0; segment < Sg::kCount; ++segment) {
        Float sum = load(bias_sum(segment, u, 0));
        for (int64_t m = 1; m < members_; ++m) sum = add(sum, load(bias_sum(segment, u, m)));
        store(bias_sum(segment, u, 0), sum);
      }
    }
  }

  void finish() {
    const auto put_bias = [&](char* to, int gate, int segment, int64_t u) {
      if (!to) return;
      store_as(call_.dtype, to + (gate * s_.H + u) * esize_, load(bias_sum(segment, u, 0)),
               lanes_left(u, s_.H));
    };
    for (int64_t u = first_; u < last_; u += kLanes) {
      const int n = lanes_left(u, s_.H);
      for (int i = 0; i < Sg::kGates; ++i) {
        put_bias(dir_.grad_b_ih, Sg::gate_of_x(i), i, u);
        put_bias(dir_.grad_b_hh, Sg::gate_of_h(i), Sg::kFirstOfH + i, u);
      }
      for (int64_t r = 0; r < s_.B; ++r) {
        const int64_t at = (q_.position(r) * s_.H + u) * esize_;
        if (dir_.grad_h0) store_as(call_.dtype, dir_.grad_h0 + at, load(dh(r) + u), n);
        if (cell == Cell::kLstm && dir_.grad_c0) {
          store_as(call_.dtype, dir_.grad_c0 + at, load(dc(r) + u), n);
        }
      }
    }
  }

  const Backward& call_;
  const Shape& s_;
  const Sequences& q_;
  const BackwardDirection& dir_;
  const int rank_, members_;
  const BackwardPlaces places_;
  char* const work_;
  const int64_t first_, last_;  // own hidden units
  const bool apart_;
  const OwnPart own_;
  const int esize_;
  const SavedGates saved_;
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::rnn
