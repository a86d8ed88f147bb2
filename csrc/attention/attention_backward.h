// Attention's gradients. A unit is a key head of a sentence with all queries that it serves, so
// that each of its sums has one owner. Per tile of queries the weights are computed again, row for
// row as forward did; nothing of theirs was stored. With P the weights before and R after dropout,
// dR what their users give and M what dropout multiplied by:
//
//     dV += R' dO      dP = M (dO V' + dR)      dE = P (dP - rowsum(P dP))
//     dQ = scale dE K  dK += scale dE' Q        dBias += dE
//
// Dao et al., FlashAttention, 2022 (arXiv:2205.14135), appendix B.
#pragma once

#include <algorithm>

#include "attention/attention_scores.h"
#include "attention/units.h"
#include "core/team.h"

namespace encdec::attention {
namespace ENCDEC_ISA_NAMESPACE {

struct BackwardPlaces {
  int64_t keys, values, key_rows;                       // a head, packed for the three products
  int64_t grad_key, grad_value;                         // its gradients, float
  int64_t q, grad_out;                                  // a tile: staged rows
  int64_t q_packed, grad_packed;                        // and packed rows
  int64_t weights, grads;                               // float: P; R, then dP and dE
  int64_t staged;                                       // dE where the product takes no floats
  int64_t columns;                                      // R or dE by columns, likewise
  int64_t q_row, grad_out_row, scores_row, staged_row;  // bytes
  int64_t column_row;
  int64_t grad_key_row, grad_value_row;
  int64_t member_bytes;
  int64_t bias;  // float: each member's sums, where the bias's gradient is wanted
  int64_t bytes;
};

template <Format format>
inline BackwardPlaces backward_places(const AttentionBackward& call) {
  const Attention& f = call.forward;
  BackwardPlaces p{};
  const int64_t keys = round_up(f.S, kPanel), rows = f.query_rows;
  p.q_row = staged_row_bytes(format, f.D);
  p.grad_out_row = staged_row_bytes(format, f.V);
  p.scores_row = staged_row_bytes(Format::kFloat32, keys);
  p.staged_row = staged_row_bytes(format, keys);
  p.grad_key_row = staged_row_bytes(Format::kFloat32, round_up(f.D, kPanel));
  p.grad_value_row = staged_row_bytes(Format::kFloat32, round_up(f.V, kPanel));
  Layout member;
  p.keys = member.take(panels_bytes(format, f.D, f.S));
  p.values = member.take(panels_bytes(format, f.V, f.S));
  p.key_rows = member.take(panels_bytes(format, keys, f.D));
  p.grad_key = member.take(keys * p.grad_key_row);
  p.grad_value = member.take(keys * p.grad_value_row);
  p.q = member.take(rows * p.q_row);
  p.grad_out = member.take(rows * p.grad_out_row);
  p.q_packed = member.take(panels_bytes(format, rows, f.D));
  p.grad_packed = member.take(panels_bytes(format, rows, f.V));
  p.weights = member.take(rows * p.scores_row);
  p.grads = member.take(rows * p.scores_row);
  p.staged = member.take(kStaged<format> ? rows * p.staged_row : 0);
  p.column_row = staged_row_bytes(format, rows);
  p.columns = member.take(kStaged<format> ? keys * p.column_row : 0);
  p.member_bytes = member.end();
  p.bias = f.threads * p.member_bytes;
  p.bytes = p.bias + (call.grad_bias ? f.threads * round_up(call.grad_bias_size * 4, 64) : 0);
  return p;
}

template <Format format>
class AttentionBackwardRun : private Scores {
 public:
  AttentionBackwardRun(const AttentionBackward& call, int rank)
      : Scores(call.forward),
        backward_(call),
        call_(call.forward),
        places_(backward_places<format>(call)),
        own_(call.workspace + rank * places_.member_bytes),
        esize_(element_bytes(call.forward.dtype)),
        past_caches_(written_past_caches(call)),
        bias_(bias_sums(call, rank)),
        keys_(own_ + places_.keys, call_.D, call_.S),
        values_(own_ + places_.values, call_.V, call_.S),
        key_rows_(own_ + places_.key_rows, round_up(call_.S, kPanel), call_.D),
        q_packed_(own_ + places_.q_packed, call_.query_rows, call_.D),
        grad_packed_(own_ + places_.grad_packed, call_.query_rows, call_.V) {}

  void run(int64_t b, int64_t g) {
    const int64_t n = call_.keys_of(b), queries = call_.queries_of(b), group = call_.H / call_.G;
    const Heads &k = call_.key, &v = call_.value;
    keys_.pack_as_columns(k.at(b, g, 0), call_.dtype, k.row_stride, n, call_.D);
    key_rows_.pack_as_rows(k.at(b, g, 0), call_.dtype, k.row_stride, n, call_.D);
    values_.pack_as_columns(v.at(b, g, 0), call_.dtype, v.row_stride, n, call_.V);
    const int64_t whole = round_up(n, kPanel);
    std::memset(grad_key(0), 0, static_cast<size_t>(whole * places_.grad_key_row));
    std::memset(grad_value(0), 0, static_cast<size_t>(whole * places_.grad_value_row));
    const int64_t tiles = (queries + call_.query_rows - 1) / call_.query_rows;
    for (int64_t h = 0; h < group; ++h) {
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t first = queries * i / tiles;
        run({b, g, h * queries + first, queries * (i + 1) / tiles - first, queries});
      }
    }
    for (int64_t s = 0; s < call_.S; ++s) {
      put(s < n ? grad_key(s) : nullptr, 0, call_.D, call_.scale, backward_.grad_key.at(b, g, s));
      put(s < n ? grad_value(s) : nullptr, 0, call_.V, 1.0f, backward_.grad_value.at(b, g, s));
    }
  }

  // What a member sums up for the bias's gradient.
  static float* bias_sums(const AttentionBackward& call, int rank) {
    if (!call.grad_bias) return nullptr;
    const int64_t stride = round_up(call.grad_bias_size * 4, 64);
    const int64_t place = backward_places<format>(call).bias + rank * stride;
    return reinterpret_cast<float*>(call.workspace + place);
  }

 private:
  static bool written_past_caches(const AttentionBackward& call) {
    const Attention& f = call.forward;
    const auto worth = [&](const Heads& x, int64_t heads, int64_t rows, int64_t size) {
      return worth_past_caches(f.dtype, x.data, x.batch_stride | x.head_stride | x.row_stride,
                               f.B * heads * rows * size * element_bytes(f.dtype));
    };
    return worth(call.grad_query, f.H, f.Tq, f.D) && worth(call.grad_key, f.G, f.S, f.D) &&
           worth(call.grad_value, f.G, f.S, f.V);
  }

  float* floats(int64_t place, int64_t row, int64_t row_bytes) const {
    return reinterpret_cast<float*>(own_ + place + row * row_bytes);
  }
  float* grad_key(int64_t s) const { return floats(places_.grad_key, s, places_.grad_key_row); }
  float* grad_value(int64_t s) const {
    return floats(places_.grad_value, s, places_.grad_value_row);
  }
  float* weights(int64_t r) const { return floats(places_.weights, r, places_.scores_row); }
  float* grads(int64_t r) const { return floats(places_.grads, r, places_.scores_row); }

  // Columns [first, end) of a row of floats times `by` into a row of a gradient; null: zeros.
  void put(const float* row, int64_t first, int64_t end, float by, char* to) const {
    const auto at = [&](int64_t c) { return row ? mul(set1(by), load(row + c)) : zero(); };
    int64_t c = first;
    for (; c + kPanel <= end; c += kPanel) {
      store_pair_as(call_.dtype, to + c * esize_, at(c), at(c + kLanes), past_caches_);
    }
    for (; c < end; c += kLanes) {
      store_as(call_.dtype, to + c * esize_, at(c), lanes_left(c, end));
    }
  }

  // The rows of a tile, which belong to one head.
  void run(const QueryTile& t) {
    const int64_t n = keys_seen(t);
    const auto [h, first] = row_at(t, 0);
    for (int64_t r = 0; r < t.rows; ++r) {
      stage_row<format>(row_of(call_.query, t, r), call_.dtype, call_.D,
                        own_ + places_.q + r * places_.q_row);
    }
    keys_.multiply_into({own_ + places_.q, places_.q_row}, t.rows, call_.D, n, weights(0),
                        places_.scores_row / 4);
    for (int64_t r = 0; r < t.rows; ++r) {
      const float factor = soften(t, row_at(t, r), weights(r), n, InPlace{weights(r)});
      scale_row(weights(r), round_up(n, kPanel), factor, weights(r));
    }
    if (backward_.grad_output.data) {
      grad_packed_.pack_as_rows(backward_.grad_output.at(t.b, h, first), call_.dtype,
                                backward_.grad_output.row_stride, t.rows, call_.V);
      grad_packed_.multiply_into(columns_of(dropped(t, n), t.rows, n), n, t.rows, call_.V,
                                 grad_value(0), places_.grad_value_row / 4, true);
      for (int64_t r = 0; r < t.rows; ++r) {
        stage_row<format>(row_of(backward_.grad_output, t, r), call_.dtype, call_.V,
                          own_ + places_.grad_out + r * places_.grad_out_row);
      }
      values_.multiply_into({own_ + places_.grad_out, places_.grad_out_row}, t.rows, call_.V, n,
                            grads(0), places_.scores_row / 4);
    } else {
      std::memset(grads(0), 0, static_cast<size_t>(t.rows * places_.scores_row));
    }
    for (int64_t r = 0; r < t.rows; ++r) through_softmax(t, r, n);

    RowsView rows{reinterpret_cast<const char*>(grads(0)), places_.scores_row};
    if constexpr (kStaged<format>) {
      rows = {own_ + places_.staged, places_.staged_row};
      for (int64_t r = 0; r < t.rows; ++r) {
        stage_row<format>(reinterpret_cast<const char*>(grads(r)), Format::kFloat32, n,
                          own_ + places_.staged + r * places_.staged_row);
      }
    }
    key_rows_.multiply(rows, t.rows, n, [&](int64_t p, int64_t row, int count, const float* tile) {
      const int64_t column = p * kPanel, end = std::min(column + kPanel, call_.D);
      for (int64_t r = row; r < row + count; ++r, tile += kPanel) {
        put(tile - column, column, end, call_.scale, backward_.grad_query.at(t.b, h, first + r));
      }
    });
    q_packed_.pack_as_rows(call_.query.at(t.b, h, first), call_.dtype, call_.query.row_stride,
                           t.rows, call_.D);
    q_packed_.multiply_into(columns_of(grads(0), t.rows, n), n, t.rows, call_.D, grad_key(0),
                            places_.grad_key_row / 4, true);
  }

  // The weights as the values met them.
  float* dropped(const QueryTile& t, int64_t n) const {
    if (!drops()) return weights(0);
    for (int64_t r = 0; r < t.rows; ++r) {
      scale_row(weights(r), round_up(n, kPanel), 1.0f, grads(r));
      drop(t, row_at(t, r), grads(r), n);
    }
    return grads(0);
  }

  // A row of dO V' becomes dE.
  void through_softmax(const QueryTile& t, int64_t r, int64_t n) const {
    float *const row = grads(r), *const weight = weights(r);
    const QueryRow at = row_at(t, r);
    if (backward_.grad_weights) {
      const float* const given = backward_.grad_weights + weights_row(t, at);
      const Float by = set1(call_.average ? 1.0f / static_cast<float>(call_.H) : 1.0f);
      for (int64_t s = 0; s < n; s += kLanes) {
        const char* from = reinterpret_cast<const char*>(given + s);
        const Float own = load_as(Format::kFloat32, from, lanes_left(s, n));
        store(row + s, fma(by, own, load(row + s)));
      }
    }
    if (drops()) drop(t, at, row, n);
    const int64_t whole = round_up(n, kPanel);
    Float sum = zero();
    for (int64_t s = 0; s < n; s += kLanes) sum = fma(load(weight + s), load(row + s), sum);
    const Float mean = set1(reduce_add(sum));
    for (int64_t s = 0; s < whole; s += kLanes) {
      store(row + s, mul(load(weight + s), sub(load(row + s), mean)));
    }
    if (bias_) add_to_bias(t.b, at, row, n);
  }

  void add_to_bias(int64_t b, QueryRow at, const float* row, int64_t n) const {
    float* const to = bias_ + b * backward_.bias_batch + at.head * backward_.bias_head +
                      at.query * backward_.bias_row;
    if (backward_.bias_key == 1) {
      for (int64_t s = 0; s < n; ++s) to[s] += row[s];
    } else {
      for (int64_t s = 0; s < n; ++s) to[s * backward_.bias_key] += row[s];
    }
  }

  // A tile of floats by columns: row s of the view is column s of `rows` rows.
  RowsView columns_of(const float* tile, int64_t rows, int64_t n) const {
    if constexpr (!kStaged<format>) {
      return {reinterpret_cast<const char*>(tile), 4, places_.scores_row};
    }
    const int64_t stride = places_.scores_row / 4;
    for (int64_t r = 0; r < rows; r += 2 * kLanes) {
      for (int64_t s = 0; s < n; s += kLanes) {
        const auto half = [&](int64_t row) {
          return to_product_bf16(row < rows ? load(tile + row * stride + s) : zero());
        };
        stage_columns([&](int i) { return pair_halves(half(r + 2 * i), half(r + 2 * i + 1)); },
                      own_ + places_.columns + s * places_.column_row + r * 2, places_.column_row);
      }
    }
    return {own_ + places_.columns, places_.column_row};
  }

  const AttentionBackward& backward_;
  const Attention& call_;
  const BackwardPlaces places_;
  char* const own_;
  const int esize_;
  const bool past_caches_;
  float* const bias_;
  PackedRows<format> keys_, values_, key_rows_, q_packed_, grad_packed_;
};

template <Format format>
inline void run_attention_backward(const AttentionBackward& call) {
  const Attention& f = call.forward;
  const int64_t heads = f.B * f.G;
  Units work;
  int members = 1;
  auto body = [&](int rank, int size) {
    AttentionBackwardRun<format> own(call, rank);
    if (rank == 0) members = size;
    if (call.grad_bias) {  // the order of its sums must not depend on who is faster
      std::memset(own.bias_sums(call, rank), 0, static_cast<size_t>(call.grad_bias_size * 4));
      for (int64_t u = heads * rank / size; u < heads * (rank + 1) / size; ++u) {
        own.run(u / f.G, u % f.G);
      }
    } else {
      for (int64_t u = work.take(heads); u >= 0; u = work.take(heads)) own.run(u / f.G, u % f.G);
    }
  };
  run_team(f.threads, body);
  for (int m = 0; call.grad_bias && m < members; ++m) {
    const float* const own = AttentionBackwardRun<format>::bias_sums(call, m);
    for (int64_t i = 0; i < call.grad_bias_size; ++i) {
      call.grad_bias[i] = m == 0 ? own[i] : call.grad_bias[i] + own[i];
    }
  }
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::attention
