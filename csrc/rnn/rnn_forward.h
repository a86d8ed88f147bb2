// Forward of one direction, by the members of a team.
//
// Time is cut into chunks. For each chunk a member first multiplies the chunk's input rows by its
// own blocks of W_ih (a large product, at full speed), then walks the steps: its own blocks of W_hh
// times the state of the step before, gates, next state, barrier. A member owns the same blocks
// throughout, so its share of W_hh stays in its caches, and input products are never shared between
// members.
//
// One sequence alone is another matter: reading W_hh from L2 and beyond takes all of a step's time,
// and the multiply-add units wait. Then the input products of the next few rows are multiplied
// beside the steps of these (core/gemm.h, multiply_beside), a panel at a time.
#pragma once

#include "rnn/rnn_forward_cells.h"

namespace encdec::rnn {
namespace ENCDEC_ISA_NAMESPACE {

// States up to this size are prefetched as a whole.
constexpr int64_t kFetchedState = 16 * 1024;

// Weights of a direction that are larger than this do not stay in a usual L3: a block of them is
// asked for while the one before it is multiplied. Of smaller ones that costs 1 % (performance.md).
constexpr int64_t kFromMemory = int64_t{24} << 20;

// What else enters a step beside its input and the state, made from the state of the step before.
struct NoFeed {
  static constexpr bool kActive = false;
};

template <Cell cell, Format format, class Feed = NoFeed>
class ForwardRun : ForwardCells<cell, format> {
  using Base = ForwardCells<cell, format>;
  using Base::call_, Base::s_, Base::q_, Base::dir_, Base::rank_, Base::members_, Base::header_;
  using Base::ih_, Base::hh_, Base::places_, Base::first_, Base::last_, Base::esize_;
  using Base::input_bias;
  using Base::NV, Base::kRowFloats, Base::kExchange;
  using Base::part, Base::member, Base::gates, Base::h_row, Base::m_row, Base::row_scale;
  using Base::place_gates, Base::in_place_;
  using Base::prepare, Base::cell_update, Base::put_state, Base::finish;
  using typename Base::Bl;
  static constexpr int kTileRoom = tile_room(format, NV);

 public:
  ForwardRun(const Forward& call, const Direction& dir, char* workspace, Barrier& barrier, int rank,
             int members, Feed* feed = nullptr)
      : Base(call, dir, workspace, rank, members),
        feed_(feed),
        barrier_(barrier),
        beside_(call.beside_rows > 0),
        asks_(header_.bytes > kFromMemory) {}

  void run() {
    prepare();
    if constexpr (Feed::kActive) feed_->prepare();
    barrier_.wait(members_);
    if constexpr (Feed::kActive) feed_->start({h_row(0, 0), staged_row_bytes(kExchange, s_.P)});
    int now = 0;
    bool started = false;
    Chunk chunk = chunk_after({first_step(), first_step(), 0, 0});
    input_products(chunk);
    if (dir_.unpacked) pack_state_weights();
    while (chunk.begin < chunk.end) {
      const Chunk next = chunk_after(chunk);
      if (beside_) begin_ahead(next);
      int64_t gate_row = chunk.gate_row + (dir_.reverse ? chunk.rows : 0);
      for (int64_t i = 0; i < chunk.end - chunk.begin; ++i) {
        const int64_t t = dir_.reverse ? chunk.end - 1 - i : chunk.begin + i;
        if (dir_.reverse) gate_row -= q_.active(t);
        const bool h_is_zero = !started && !dir_.h0;
        if (beside_ && !h_is_zero) {
          step_beside(t, gate_row, now);
        } else {
          step(t, gate_row, now, h_is_zero);
        }
        end_step(t, now ^ 1);
        if (!dir_.reverse) gate_row += q_.active(t);
        started = true;
        now ^= 1;
      }
      if (beside_) {
        while (ahead_.panel < last_ * Bl::kPanels) multiply_ahead();
      } else {
        input_products(next);
      }
      chunk = next;
    }
    finish();
  }

 private:
  // Steps [begin, end), and where their rows' input products are in gates().
  struct Chunk {
    int64_t begin, end, gate_row, rows;
  };
  int64_t first_step() const { return dir_.reverse ? q_.T : 0; }

  // Steps whose input products are made before them, beside nothing: what whole chunks leave over,
  // and never so few that a row's sums would be split (gemm_cpu.cpp).
  int64_t first_beside() const {
    constexpr int64_t kRows = kBesideRows<NV>, kLeast = (kEnoughSums + NV - 1) / NV;
    static_assert(split_sums(kLeast * NV) == 1 && kLeast <= kRows);
    const int64_t over = q_.T % kRows;
    return over < kLeast ? kRows : over;
  }

  // The chunk behind this one in the direction of time; empty behind the last.
  Chunk chunk_after(const Chunk& chunk) const {
    const int64_t at = dir_.reverse ? chunk.begin : chunk.end;
    const int64_t most = !beside_             ? call_.chunk_rows
                         : at == first_step() ? first_beside()
                                              : kBesideRows<NV>;
    Chunk next{at, at, beside_ && chunk.gate_row == 0 ? kBesideRows<NV> : 0, 0};
    while (dir_.reverse ? next.begin > 0 : next.end < q_.T) {
      const int64_t more = q_.active(dir_.reverse ? next.begin - 1 : next.end);
      if (next.rows > 0 && next.rows + more > most) break;
      next.rows += more;
      dir_.reverse ? --next.begin : ++next.end;
    }
    return next;
  }

  // `n` exchanged rows of k numbers as the product reads them: as they are, or for int8 in this
  // member's own copy, with each row's scale.
  RowsView staged_states(const char* rows, int64_t n, int64_t k) {
    const int64_t exchanged = staged_row_bytes(kExchange, k);
    if constexpr (format != Format::kInt8) {
      return {rows, exchanged};
    } else {
      const int64_t stride = staged_row_bytes(format, k);
      char* own = member() + places_.member_h;
      for (int64_t r = 0; r < n; ++r) {
        row_scale()[r] =
            stage_row<format>(rows + r * exchanged, Format::kFloat32, k, own + r * stride);
      }
      return {own, stride};
    }
  }

  char* staged_input() const { return member(); }
  float* input_scale() const { return reinterpret_cast<float*>(member() + places_.member_scale); }

  // Stages rows of the input from row r of step t on, up to step `end` or as many as there is room
  // for, and moves t and r behind them.
  int64_t stage_input(int64_t& t, int64_t& r, int64_t end) {
    const int64_t stride = staged_row_bytes(format, s_.I);
    int64_t n = 0;
    while (n < places_.stage_rows && t < end) {
      if (r == q_.active(t)) {  // at once where none of a member's own sequences runs any more
        ++t, r = 0;
        continue;
      }
      input_scale()[n] = stage_row<format>(call_.input.at(q_, t, r), call_.dtype, s_.I,
                                           staged_input() + n * stride);
      ++n, ++r;
    }
    return n;
  }

  // Makes of a tile's products of bytes, by one panel of W_ih, what gates() holds: staged row `row`
  // is their first. Sums of floats have begun with the bias.
  void scale_products(int64_t panel, int64_t row, int rows, float* out) const {
    if constexpr (format == Format::kInt8) {
      for (int v = 0; v < NV; ++v) {
        const Float column = load(ih_.scale + (panel * NV + v) * kLanes);
        const Float bias = load(input_bias() + (panel * NV + v) * kLanes);
        for (int j = 0; j < rows; ++j) {
          float* const at = out + j * kRowFloats + v * kLanes;
          store(at, add(mul(load(at), mul(column, set1(input_scale()[row + j]))), bias));
        }
      }
    }
  }

  // Where gates() holds a row's input products by one panel.
  float* panel_gates(int64_t panel, int64_t row) const {
    return gates(panel / Bl::kPanels, row) + panel % Bl::kPanels * NV * kLanes;
  }

  // A block of W_ih. In training it may be packed only now, into a place that it has for as long as
  // all rows of the call pass over it.
  PackedView input_block(int64_t b) {
    PackedView w = ih_;
    w.data += b * Bl::kPanels * w.panel_bytes;
    if (w.bias) w.bias += b * kRowFloats;
    if (w.start) w.start += b * kRowFloats;
    if (dir_.unpacked) {
      char* const own = member() + places_.member_block;
      pack_block<cell, format>(dir_.unpacked->ih, call_.dtype, dir_.unpacked->ih_stride, s_.H, s_.I,
                               own, b);
      w.data = own;
    }
    return w;
  }

  // Asks for a share of what is read to pack a block of a matrix of k columns.
  ENCDEC_INLINE void ask_for_block(const char* matrix, int64_t row_stride, int64_t k, int64_t b,
                                   int64_t share, int64_t shares) const {
    constexpr int64_t kRows = Bl::kWidth * kLanes;
    for (int64_t i = kRows * share / shares; i < kRows * (share + 1) / shares; ++i) {
      const ColumnRange rows = columns_of<cell>(s_.H, b * Bl::kWidth + i / kLanes);
      if (i % kLanes >= rows.lanes) continue;
      const char* const row = matrix + (rows.first + i % kLanes) * row_stride * esize_;
      for (int64_t at = 0; at < k * esize_; at += 64) _mm_prefetch(row + at, _MM_HINT_T1);
    }
  }

  // In training: this member's blocks of W_hh.
  void pack_state_weights() const {
    const Weights& w = *dir_.unpacked;
    pack_matrix<cell, format>(w.hh, call_.dtype, w.hh_stride, s_.H, s_.P,
                              const_cast<char*>(dir_.packed), header_.hh, first_ * Bl::kWidth,
                              last_ * Bl::kWidth);
  }

  // gates(block, row) = x W_ih' + bias for the chunk's rows and this member's blocks.
  void input_products(const Chunk& chunk) {
    const int64_t stride = staged_row_bytes(format, s_.I);
    int64_t t = chunk.begin, r = 0, done = chunk.gate_row;
    place_gates(q_.row_start(chunk.begin));
    while (t < chunk.end) {
      const int64_t n = stage_input(t, r, chunk.end);
      const RowTiles tiles(n, format, NV);
      const int64_t asking = asks_ && !dir_.unpacked ? tiles.count : 0;
      for (int64_t b = first_; b < last_; ++b) {
        const PackedView w = input_block(b);
        for (int64_t i = 0; i < tiles.count; ++i) {
          const int64_t row = tiles.begin(i);
          const int rows = static_cast<int>(tiles.begin(i + 1) - row);
          if (dir_.unpacked) {
            const Weights& own = *dir_.unpacked;
            if (b + 1 < last_) ask_for_block(own.ih, own.ih_stride, s_.I, b + 1, i, tiles.count);
            ask_for_block(own.hh, own.hh_stride, s_.P, b, i, tiles.count);
          }
          for (int p = 0; p < Bl::kPanels; ++p) {
            const int64_t panel = b * Bl::kPanels + p;
            float* const out = panel_gates(panel, done + row);
            multiply_rows<format, NV>(rows, w, p, {staged_input() + row * stride, stride}, out,
                                      kRowFloats, false, {i, asking, Bl::kPanels});
            scale_products(panel, row, rows, out);
          }
        }
      }
      done += n;
    }
  }

  // The input products that are made beside steps: of these rows, from this panel on.
  struct Ahead {
    int64_t gate_row, rows, panel;
  };

  void begin_ahead(const Chunk& next) {
    int64_t t = next.begin, r = 0;
    ahead_ = {next.gate_row, stage_input(t, r, next.end), first_ * Bl::kPanels};
    if (ahead_.rows == 0) ahead_.panel = last_ * Bl::kPanels;
  }

  // The next panel of these products: with `products`, beside those of state h by kBesidePanels
  // panels of W_hh from `panel` on.
  void multiply_ahead(int64_t panel = 0, const char* h = nullptr, float* products = nullptr) {
    // A last chunk has fewer rows: what stands behind them is multiplied too, and nobody reads it.
    const int64_t stride = staged_row_bytes(format, s_.I);
    float* const out = panel_gates(ahead_.panel, ahead_.gate_row);
    const RowsView rows{staged_input(), stride};
    if (products) {
      multiply_beside<format, NV>(hh_, panel, h, products,
                                  {ih_, ahead_.panel, rows, out, kRowFloats});
    } else {
      multiply_rows<format, NV>(kBesideRows<NV>, ih_, ahead_.panel, rows, out, kRowFloats);
    }
    scale_products(ahead_.panel, 0, static_cast<int>(ahead_.rows), out);
    ++ahead_.panel;
  }

  // The state of `n` rows as the product reads it. Part of a small one was just written by other
  // cores: all of it is asked for at once.
  RowsView fetched_state(int now, int64_t n) {
    const char* const h = h_row(now, 0);
    const int64_t bytes = n * staged_row_bytes(kExchange, s_.P);
    if (bytes <= kFetchedState) {
      for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(h + at, _MM_HINT_T0);
    }
    return staged_states(h, n, s_.P);
  }

  // step() of one sequence: some blocks at a time, with a panel of the input products ahead.
  void step_beside(int64_t t, int64_t gate_row, int now) {
    constexpr int kBlocks = kBesidePanels<NV> / Bl::kPanels;
    const RowsView h = fetched_state(now, 1);
    alignas(64) float products[kBlocks * kRowFloats];
    const int64_t groups = (last_ - first_ + kBlocks - 1) / kBlocks;
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t begin = first_ + (now ? groups - 1 - i : i) * kBlocks;
      const int64_t end = begin + kBlocks < last_ ? begin + kBlocks : last_;
      for (int64_t b = begin; b < end; ++b) {
        for (int v = 0; v < Bl::kWidth; ++v) {
          _mm_prefetch(gates(b, gate_row) + v * kLanes, _MM_HINT_T0);
        }
      }
      if (end - begin == kBlocks && ahead_.panel < last_ * Bl::kPanels) {
        multiply_ahead(begin * Bl::kPanels, h.data, products);
      } else {
        for (int64_t p = 0; p < (end - begin) * Bl::kPanels; ++p) {
          multiply_rows<format, NV>(1, hh_, begin * Bl::kPanels + p, h, products + p * NV * kLanes,
                                    kRowFloats);
        }
      }
      for (int64_t b = begin; b < end; ++b) {
        cell_update(b, t, 0, gates(b, gate_row), products + (b - begin) * kRowFloats, now ^ 1);
      }
    }
  }

  // One step: state `now` to state `now ^ 1`. `gate_row` is the step's first row of input products.
  void step(int64_t t, int64_t gate_row, int now, bool h_is_zero) {
    const int64_t n = q_.active(t);
    const RowsView h = h_is_zero ? RowsView{h_row(now, 0), 0} : fetched_state(now, n);
    alignas(64) float products[kTileRoom * kRowFloats];
    if (h_is_zero) {
      std::memset(products, 0, sizeof(products));
      for (int64_t r = 0; format == Format::kInt8 && r < n; ++r) row_scale()[r] = 0.0f;
    }
    const RowTiles tiles(n, format, NV);
    for (int64_t i_block = 0; i_block < last_ - first_; ++i_block) {
      // Every other step goes through the blocks backwards: it starts with those that are still in
      // L2 where a member's share of W_hh is larger than that.
      const int64_t b = now ? last_ - 1 - i_block : first_ + i_block;
      const int64_t asking = asks_ && i_block + 1 < last_ - first_ ? tiles.count : 0;
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i);
        const int rows = static_cast<int>(tiles.begin(i + 1) - row);
        if (in_place_) {
          const float* const own = gates(b, gate_row + row);
          for (int at = 0; at < rows * kRowFloats; at += 16) __builtin_prefetch(own + at, 1);
        }
        if (!h_is_zero) {
          for (int p = 0; p < Bl::kPanels; ++p) {
            multiply_rows<format, NV>(rows, hh_, b * Bl::kPanels + p, h.from(row),
                                      products + p * NV * kLanes, kRowFloats, false,
                                      {i, asking, now ? -Bl::kPanels : Bl::kPanels});
          }
        }
        if constexpr (Feed::kActive) feed_->add_products(b, row, rows, gates(b, gate_row + row));
        for (int j = 0; j < rows; ++j) {
          cell_update(b, t, row + j, gates(b, gate_row + row + j), products + j * kRowFloats,
                      now ^ 1);
        }
      }
    }
  }

  // What follows once every member has its part of a step's state.
  void end_step(int64_t t, int next) {
    barrier_.wait(members_);
    if (s_.projected) project(t, q_.active(t), next);
    if constexpr (Feed::kActive) {
      feed_->after_step(t, {h_row(next, 0), staged_row_bytes(kExchange, s_.P)});
      barrier_.wait(members_);
    }
  }

  // h = W_hr m for this member's share of the projection's columns.
  void project(int64_t t, int64_t n, int next) {
    using Pl = PlainBlocking;
    const PackedView hr = view(dir_.packed, header_.hr, format, s_.H, Pl::kVectors);
    const RowsView m = staged_states(m_row(0), n, s_.H);
    alignas(64) float products[tile_room(format, Pl::kVectors) * Pl::kUnits];
    const RowTiles tiles(n, format, Pl::kVectors);
    const int64_t blocks = Pl::blocks(s_.P);
    for (int64_t b = part(blocks, rank_); b < part(blocks, rank_ + 1); ++b) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i);
        const int rows = static_cast<int>(tiles.begin(i + 1) - row);
        multiply_rows<format, Pl::kVectors>(rows, hr, b, m.from(row), products, Pl::kUnits);
        for (int j = 0; j < rows; ++j) {
          for (int v = 0; v < Pl::kVectors && b * Pl::kUnits + v * kLanes < s_.P; ++v) {
            const int64_t unit = b * Pl::kUnits + v * kLanes;
            Float h = load(products + j * Pl::kUnits + v * kLanes);
            if constexpr (format == Format::kInt8) {
              h = mul(h, mul(load(hr.scale + unit), set1(row_scale()[row + j])));
            }
            put_state(t, row + j, unit, lanes_left(unit, s_.P), h, next);
          }
        }
      }
    }
    barrier_.wait(members_);
  }

  Feed* const feed_;
  Barrier& barrier_;
  const bool beside_;
  const bool asks_;
  Ahead ahead_{};
};

// The part of a call that one of `members` does by itself where sequences are what is shared out.
inline Forward own_sequences(const Forward& f, int rank, int members) {
  Forward own = f;
  own.sequences.first = rank;
  own.sequences.every = members;
  own.shape.B = rows_apart(f.shape.B, rank, members);
  own.threads = 1;
  own.chunk_rows = f.chunk_rows / members;
  if (own.chunk_rows < own.shape.B) own.chunk_rows = own.shape.B;
  return own;
}

template <Cell cell, Format format>
inline int64_t forward_workspace(const Forward& f) {
  const int64_t whole = forward_places<cell, format>(f).bytes;
  if (f.apart) {
    // OpenMP may grant fewer threads, and then hidden units are shared out after all.
    const Forward largest = own_sequences(f, 0, f.threads);
    const int64_t parts = f.threads * forward_places<cell, format>(largest).bytes;
    return parts > whole ? parts : whole;
  }
  return f.directions == 2 && f.threads > 1 ? 2 * whole : whole;
}

template <Cell cell, Format format>
inline void run_forward(const Forward& f) {
  const int64_t stride = forward_places<cell, format>(f).bytes;
  Barrier barriers[2];
  auto body = [&](int rank, int size) {
    if (f.apart && size == f.threads) {
      const Forward own = own_sequences(f, rank, size);
      const int64_t largest = forward_places<cell, format>(own_sequences(f, 0, size)).bytes;
      for (int d = 0; d < f.directions; ++d) {
        char* const workspace = f.workspace + rank * largest;
        ForwardRun<cell, format>(own, own.direction[d], workspace, barriers[0], 0, 1).run();
      }
      return;
    }
    // Two directions side by side need no barrier between them: half of the team each.
    if (f.directions == 2 && size > 1) {
      const int half = size / 2, d = rank >= half;
      ForwardRun<cell, format>(f, f.direction[d], f.workspace + d * stride, barriers[d],
                               d ? rank - half : rank, d ? size - half : half)
          .run();
      return;
    }
    for (int d = 0; d < f.directions; ++d) {
      ForwardRun<cell, format>(f, f.direction[d], f.workspace, barriers[0], rank, size).run();
    }
  };
  run_team(f.threads, body);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::rnn
