// What a member of the team keeps of one direction's forward, and what a step makes of its
// products: gates, the next state, what backward will read. rnn_forward.h walks the steps.
#pragma once

#include "core/math.h"
#include "rnn/rnn_weights.h"

namespace encdec::rnn {
namespace ENCDEC_ISA_NAMESPACE {

// Rows staged at a time for the input product: they are read once per block, from L2.
constexpr int64_t kStageBytes = 192 * 1024;

// Saved gates of a call from this size on are written past the caches.
constexpr int64_t kStreamedGates = 8 << 20;

// The form in which members hand states to each other. int8 states travel as floats: their scale is
// searched for anew in each row and step, which is what keeps small states exact, and NaN in its
// row.
template <Format format>
constexpr Format kExchanged = format == Format::kInt8 ? Format::kFloat32 : format;

// The buffers of one direction, as offsets into its workspace.
struct ForwardPlaces {
  int64_t state;  // float [blocks][B][units]: c of an LSTM, h of a GRU
  int64_t h[2];   // staged rows [B] of the state before and after a step
  int64_t m;      // staged rows [B]: the cell's output before the projection
  // Per member: staged input rows, their scales, staged states, their scales, a block of W_ih.
  int64_t member;
  int64_t member_bytes, member_scale, member_h, member_h_scale, member_block;
  int64_t gates;  // float [blocks][chunk rows][width]: input products
  int64_t bytes;
  int64_t stage_rows;
};

template <Cell cell, Format format>
inline ForwardPlaces forward_places(const Forward& f) {
  using Bl = Blocking<cell>;
  const Shape& s = f.shape;
  const int64_t blocks = Bl::blocks(s.H), B = s.B;
  const bool int8 = format == Format::kInt8;
  ForwardPlaces p{};
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t here = at;
    at += round_up(bytes, 64);
    return here;
  };
  p.state = take(cell == Cell::kLstm || cell == Cell::kGru ? blocks * B * Bl::kUnits * 4 : 0);
  for (int i = 0; i < 2; ++i) p.h[i] = take(B * staged_row_bytes(kExchanged<format>, s.P));
  p.m = take(s.projected ? B * staged_row_bytes(kExchanged<format>, s.H) : 0);
  const int64_t row = staged_row_bytes(format, s.I);
  p.stage_rows = kStageBytes / row;
  if (p.stage_rows < 16) p.stage_rows = 16;
  const bool packs_input = f.direction[0].unpacked;  // for all rows together
  if (p.stage_rows > f.chunk_rows || packs_input) p.stage_rows = f.chunk_rows;
  p.member = at;
  p.member_scale = round_up(p.stage_rows * row, 64);
  p.member_h = p.member_scale + round_up(p.stage_rows * 4, 64);
  const int64_t widest = s.projected && s.H > s.P ? s.H : s.P;
  p.member_h_scale = p.member_h + (int8 ? B * staged_row_bytes(format, widest) : 0);
  p.member_block = p.member_h_scale + round_up(B * 4, 64);
  const int64_t block = Bl::kPanels * packed_panel_bytes(format, s.I, Bl::kVectors);
  p.member_bytes = p.member_block + (packs_input ? block : 0);
  take(p.member_bytes * f.threads);
  p.gates = take(blocks * f.chunk_rows * Bl::kWidth * kLanes * 4);
  p.bytes = at;
  return p;
}

template <Cell cell, Format format>
class ForwardCells {
 protected:
  using Bl = Blocking<cell>;
  static constexpr int NV = Bl::kVectors;
  static constexpr int kRowFloats = Bl::kWidth * kLanes;
  static constexpr Format kExchange = kExchanged<format>;
  static constexpr bool kLstmCell = cell == Cell::kLstm;
  static constexpr bool kGruCell = cell == Cell::kGru;

  ForwardCells(const Forward& call, const Direction& dir, char* workspace, int rank, int members)
      : call_(call),
        s_(call.shape),
        q_(call.sequences),
        dir_(dir),
        rank_(rank),
        members_(members),
        header_(*reinterpret_cast<const PackedHeader*>(dir.packed)),
        ih_(input_weights()),
        hh_(view(dir.packed, header_.hh, format, s_.P, NV)),
        places_(forward_places<cell, format>(call)),
        work_(workspace),
        first_(part(Bl::blocks(s_.H), rank)),
        last_(part(Bl::blocks(s_.H), rank + 1)),
        esize_(element_bytes(call.dtype)),
        saved_(saved_layout<cell>(s_, call.dtype, q_.rows())),
        stream_gates_(can_stream_gates()),
        in_place_(dir.gates && saved_.as_products && !stream_gates_ && q_.every == 1 &&
                  call.beside_rows == 0 && reinterpret_cast<uintptr_t>(dir.gates) % 64 == 0) {
    place_gates(0);
  }

  const float* input_bias() const {
    return reinterpret_cast<const float*>(dir_.packed + header_.input_bias);
  }
  // W_ih; sums of floats start from the bias.
  PackedView input_weights() const {
    PackedView w = view(dir_.packed, header_.ih, format, s_.I, NV);
    if constexpr (format != Format::kInt8) w.bias = input_bias();
    return w;
  }

  // Gates that will have left the caches before backward comes need not pass through them.
  bool can_stream_gates() const {
    const int64_t bytes = q_.rows() * 4 * s_.H * esize_;
    return dir_.gates && call_.dtype == Format::kFloat32 && bytes >= kStreamedGates &&
           s_.H % kLanes == 0 && reinterpret_cast<uintptr_t>(dir_.gates) % 64 == 0;
  }
  int64_t part(int64_t n, int i) const { return n * i / members_; }
  char* member() const { return work_ + places_.member + rank_ * places_.member_bytes; }
  float* state(int64_t block, int64_t row) const {
    return reinterpret_cast<float*>(work_ + places_.state) + (block * s_.B + row) * Bl::kUnits;
  }
  // Input products, which are at home in the workspace, or where the gates that they become will be
  // saved: with fewer lines to write. There a chunk has its rows from `first` on.
  void place_gates(int64_t first) {
    char* const to = in_place_ ? dir_.gates : work_ + places_.gates;
    gates_ = reinterpret_cast<float*>(to) + (in_place_ ? first : 0) * kRowFloats;
    gates_rows_ = in_place_ ? q_.rows() : call_.chunk_rows;
  }
  float* gates(int64_t block, int64_t row) const {
    return gates_ + (block * gates_rows_ + row) * kRowFloats;
  }
  char* h_row(int i, int64_t r) const {
    return work_ + places_.h[i] + r * staged_row_bytes(kExchange, s_.P);
  }
  char* m_row(int64_t r) const { return work_ + places_.m + r * staged_row_bytes(kExchange, s_.H); }

  float* row_scale() const { return reinterpret_cast<float*>(member() + places_.member_h_scale); }

  // The initial state into the buffers. With unequal lengths and reversed time rows join later, at
  // either buffer's turn, so both start with it.
  void prepare() {
    for (int64_t r = part(s_.B, rank_); r < part(s_.B, rank_ + 1); ++r) {
      const char* h0 = dir_.h0 ? dir_.h0 + q_.position(r) * s_.P * esize_ : nullptr;
      for (int i = 0; i < 2; ++i) {
        put_row(h0, s_.P, h_row(i, r));
        if (!(dir_.reverse && q_.sizes)) break;
      }
    }
    if constexpr (kLstmCell || kGruCell) {
      const char* first = kLstmCell ? dir_.c0 : dir_.h0;
      for (int64_t b = first_; b < last_; ++b) {
        const int n = lanes_left(b * Bl::kUnits, s_.H);
        for (int64_t r = 0; r < s_.B; ++r) {
          const int64_t at = q_.position(r) * s_.H + b * Bl::kUnits;
          store(state(b, r), first ? load_as(call_.dtype, first + at * esize_, n) : zero());
        }
      }
    }
  }

  // A row of the initial state (null: zeros) in its exchanged form.
  void put_row(const char* src, int64_t k, char* dst) {
    for (int64_t i = 0; i < k; i += kLanes) {
      const Float v = src ? load_as(call_.dtype, src + i * esize_, lanes_left(i, k)) : zero();
      stage_vector<kExchange>(staged_at<kExchange>(dst, i), v);
    }
  }

  Float recurrent(const float* products, int64_t block, int64_t row, int v) const {
    Float x = load(products + v * kLanes);
    if constexpr (format == Format::kInt8) {
      const Float column = load(hh_.scale + block * kRowFloats + v * kLanes);
      x = mul(x, mul(column, set1(row_scale()[row])));
    }
    return x;
  }

  // The gates of one row and block, from x's and h's products.
  ENCDEC_INLINE void cell_update(int64_t b, int64_t t, int64_t r, const float* gx, const float* gh,
                                 int next) {
    const int64_t unit = b * Bl::kUnits;
    const auto pre = [&](int v) __attribute__((always_inline)) {
      return add(load(gx + v * kLanes), recurrent(gh, b, r, v));
    };
    if constexpr (kLstmCell) {
      const int n = lanes_left(unit, s_.H);
      const Float f = sigmoid(pre(1)), before = load(state(b, r));
      Float c, h;
      if (dir_.gates) {
        const Float i = sigmoid(pre(0)), g = tanh(pre(2)), o = sigmoid(pre(3));
        c = fma(f, before, mul(i, g));
        h = mul(o, tanh(c));
        save_gates(t, r, unit, n, i, f, g, o);
      } else {  // nobody asks for the gates: two divisions less
        c = fma(f, before, sigmoid_tanh(pre(0), pre(2)));
        h = sigmoid_tanh(pre(3), c);
      }
      store(state(b, r), c);
      if (dir_.cells.data) store_as(call_.dtype, dir_.cells.at(q_, t, r) + unit * esize_, c, n);
      put_output(t, r, unit, n, h, next);
    } else if constexpr (kGruCell) {
      const int n = lanes_left(unit, s_.H);
      const float* bias = reinterpret_cast<const float*>(dir_.packed + header_.recurrent_bias);
      const Float reset = sigmoid(pre(0)), update = sigmoid(pre(1));
      const Float inner = add(recurrent(gh, b, r, 2), load(bias + unit));
      const Float fresh = tanh(fma(reset, inner, load(gx + 2 * kLanes)));
      const Float h = fma(update, sub(load(state(b, r)), fresh), fresh);
      store(state(b, r), h);
      if (dir_.gates) save_gates(t, r, unit, n, reset, update, fresh, inner);
      put_output(t, r, unit, n, h, next);
    } else {
      for (int v = 0; v < Bl::kUnitVectors && unit + v * kLanes < s_.H; ++v) {
        const Float x = pre(v);
        // max with the variable second keeps NaN
        const Float h = cell == Cell::kTanh ? tanh(x) : max(zero(), x);
        put_output(t, r, unit + v * kLanes, lanes_left(unit + v * kLanes, s_.H), h, next);
      }
    }
  }

  void save_gates(int64_t t, int64_t r, int64_t unit, int n, Float a, Float b, Float c, Float d) {
    const int64_t row = q_.row_start(t) + q_.row(r);
    char* const p = dir_.gates + (row * saved_.row + unit / kLanes * saved_.vector) * esize_;
    const auto put = [&](int64_t gate, Float x) __attribute__((always_inline)) {
      char* to = p + gate * saved_.gate * esize_;
      if (stream_gates_) {
        store_past_caches(reinterpret_cast<float*>(to), x);
      } else {
        store_as(call_.dtype, to, x, n);
      }
    };
    put(0, a);
    put(1, b);
    put(2, c);
    put(3, d);
  }

  // The cell's output: to the projection, or to the caller and the next step.
  void put_output(int64_t t, int64_t r, int64_t unit, int n, Float h, int next) {
    if (s_.projected) {
      stage_vector<kExchange>(staged_at<kExchange>(m_row(r), unit), first_lanes(h, n));
    } else {
      put_state(t, r, unit, n, h, next);
    }
  }

  void put_state(int64_t t, int64_t r, int64_t unit, int n, Float h, int next) {
    store_as(call_.dtype, dir_.output.at(q_, t, r) + unit * esize_, h, n);
    // What the next step reads is what the caller sees, and zeros behind the last unit: an infinite
    // input makes those NaN, and they may share a word with the last one.
    const Float seen = format == Format::kFloat16 ? rounded_to(call_.dtype, h) : h;
    stage_vector<kExchange>(staged_at<kExchange>(h_row(next, r), unit), first_lanes(seen, n));
  }

  // Final states: h from the output at each row's last step, c from its own buffer.
  void finish() {
    for (int64_t r = part(s_.B, rank_); r < part(s_.B, rank_ + 1); ++r) {
      int64_t t = dir_.reverse ? 0 : q_.T - 1;
      while (t > 0 && q_.active(t) <= r) --t;
      std::memcpy(dir_.h_n + q_.position(r) * s_.P * esize_, dir_.output.at(q_, t, r),
                  static_cast<size_t>(s_.P * esize_));
    }
    if constexpr (kLstmCell) {
      for (int64_t b = first_; b < last_; ++b) {
        const int n = lanes_left(b * Bl::kUnits, s_.H);
        for (int64_t r = 0; r < s_.B; ++r) {
          const int64_t at = q_.position(r) * s_.H + b * Bl::kUnits;
          store_as(call_.dtype, dir_.c_n + at * esize_, load(state(b, r)), n);
        }
      }
    }
  }

  const Forward& call_;
  const Shape& s_;
  const Sequences& q_;
  const Direction& dir_;
  const int rank_, members_;
  const PackedHeader& header_;
  const PackedView ih_, hh_;
  const ForwardPlaces places_;
  char* const work_;
  const int64_t first_, last_;  // own blocks
  const int esize_;
  const SavedGates saved_;
  const bool stream_gates_, in_place_;
  float* gates_;
  int64_t gates_rows_;
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::rnn
