// The gradients of y = x W' + b, a chunk of rows at a time, by the members of a team:
//
//     dx = dy W       W packed as it lies, k over its rows; members own columns
//     dW += dy' x     core/weight_grad.h; db: the columns' sums
#pragma once

#include "core/layout.h"
#include "core/panels.h"
#include "core/weight_grad.h"
#include "linear/linear.h"

namespace encdec::linear {
namespace ENCDEC_ISA_NAMESPACE {

using namespace encdec::ENCDEC_ISA_NAMESPACE;

constexpr Format kFloat = Format::kFloat32;

struct BackwardPlaces {
  int64_t weight;    // packed, k over N
  int64_t grads;     // staged rows of dy
  int64_t row;       // bytes from one to the next
  int64_t pointers;  // to the chunk's rows of x
  int64_t products;  // WeightGrad's
  int64_t bias;      // float: db
  int64_t bytes;
};

inline BackwardPlaces backward_places(const LinearBackward& f) {
  BackwardPlaces p{};
  Layout layout;
  p.weight =
      layout.take(f.grad_input ? panels_of(f.K) * packed_panel_bytes(kFloat, f.N, kVectors) : 0);
  p.row = staged_row_bytes(kFloat, f.N);
  p.grads = layout.take(f.chunk_rows * p.row);
  p.pointers = layout.take(f.chunk_rows * static_cast<int64_t>(sizeof(char*)));
  if (f.grad_weight) {
    p.products = layout.take(WeightGrad<kFloat>::bytes(f.chunk_rows, f.K, p.row, f.threads));
  }
  p.bias = layout.take(round_up(f.N, kLanes) * 4);
  p.bytes = layout.end();
  return p;
}

class LinearBackwardRun {
 public:
  LinearBackwardRun(const LinearBackward& call, Barrier& barrier, int rank, int members)
      : call_(call),
        barrier_(barrier),
        rank_(rank),
        members_(members),
        places_(backward_places(call)),
        esize_(element_bytes(kFloat)) {}

  void run() {
    if (call_.grad_input) pack();
    for (int64_t first = 0; first < call_.M; first += call_.chunk_rows) {
      const int64_t left = call_.M - first;
      const int64_t rows = left < call_.chunk_rows ? left : call_.chunk_rows;
      for (int64_t r = part(rows, rank_); r < part(rows, rank_ + 1); ++r) {
        stage_row<kFloat>(call_.grad + (first + r) * call_.grad_stride, kFloat, call_.N,
                          grad_row(r));
        x_rows()[r] = call_.input + (first + r) * call_.input_stride;
      }
      barrier_.wait(members_);
      if (call_.grad_input) input_gradients(first, rows);
      if (call_.grad_bias) add_to_bias(first, rows);
      if (call_.grad_weight) add_to_weight(first, rows);
      barrier_.wait(members_);
    }
    if (call_.grad_bias) {
      for (int64_t c = own_column(rank_); c < own_column(rank_ + 1); c += kLanes) {
        store_as(kFloat, call_.grad_bias + c * esize_, load(bias() + c), lanes_left(c, call_.N));
      }
    }
  }

 private:
  int64_t part(int64_t n, int i) const { return n * i / members_; }
  char* grad_row(int64_t r) const { return call_.workspace + places_.grads + r * places_.row; }
  const char** x_rows() const {
    return reinterpret_cast<const char**>(call_.workspace + places_.pointers);
  }
  float* bias() const { return reinterpret_cast<float*>(call_.workspace + places_.bias); }
  int64_t own_column(int i) const {
    const int64_t vectors = (call_.N + kLanes - 1) / kLanes;
    return part(vectors, i) * kLanes;
  }

  // This member's panels of W; the first chunk's barrier completes it.
  void pack() const {
    const int64_t panels = panels_of(call_.K);
    pack_rows<kFloat, kVectors>(call_.weight.data, kFloat, call_.weight.row_stride, call_.N,
                                call_.K, part(panels, rank_), part(panels, rank_ + 1),
                                call_.workspace + places_.weight,
                                packed_panel_bytes(kFloat, call_.N, kVectors));
  }

  void input_gradients(int64_t first, int64_t rows) const {
    constexpr int kRows = max_tile_rows(kVectors);
    alignas(64) float tile[kRows * kPanel];
    const PackedView w =
        view(call_.workspace, MatrixPlace{places_.weight}, kFloat, call_.N, kVectors);
    const int64_t group = rows_in_l2(kRows, places_.row);
    for (int64_t start = 0; start < rows; start += group) {
      const RowTiles tiles(rows - start < group ? rows - start : group, kRows, false);
      for (int64_t p = part(panels_of(call_.K), rank_); p < part(panels_of(call_.K), rank_ + 1);
           ++p) {
        for (int64_t i = 0; i < tiles.count; ++i) {
          const int64_t row = start + tiles.begin(i), end = start + tiles.begin(i + 1);
          multiply_rows<kFloat, kVectors>(static_cast<int>(end - row), w, p,
                                          {grad_row(row), places_.row}, tile, kPanel);
          for (int64_t r = row; r < end; ++r) {
            char* const to = call_.grad_input + (first + r) * call_.K * esize_;
            for (int v = 0; v < kVectors && p * kPanel + v * kLanes < call_.K; ++v) {
              const int64_t c = p * kPanel + v * kLanes;
              store_as(kFloat, to + c * esize_, load(tile + (r - row) * kPanel + v * kLanes),
                       lanes_left(c, call_.K));
            }
          }
        }
      }
    }
  }

  // A chunk's sum by itself first: the error of a long sum grows with its length.
  void add_to_bias(int64_t first, int64_t rows) const {
    for (int64_t c = own_column(rank_); c < own_column(rank_ + 1); c += kLanes) {
      const int lanes = lanes_left(c, call_.N);
      const char* from = call_.grad + first * call_.grad_stride + c * esize_;
      Float sum = zero();
      for (int64_t r = 0; r < rows; ++r, from += call_.grad_stride) {
        sum = add(sum, load_as(kFloat, from, lanes));
      }
      store(bias() + c, first == 0 ? sum : add(load(bias() + c), sum));
    }
  }

  void add_to_weight(int64_t first, int64_t rows) const {
    const WeightGrad<kFloat> product{kFloat,
                                     grad_row(0),
                                     places_.row,
                                     rows,
                                     call_.N,
                                     call_.N,
                                     call_.workspace + places_.products,
                                     call_.chunk_rows,
                                     call_.K,
                                     first + rows == call_.M,
                                     rank_,
                                     members_,
                                     barrier_};
    product.prepare();
    product.add(
        x_rows(), call_.K, 0, 1, [](int gate) { return gate; },
        reinterpret_cast<float*>(call_.grad_weight), first == 0);
  }

  const LinearBackward& call_;
  Barrier& barrier_;
  const int rank_, members_;
  const BackwardPlaces places_;
  const int esize_;
};

inline void run_linear_backward(const LinearBackward& f) {
  Barrier barrier;
  auto body = [&](int rank, int size) { LinearBackwardRun(f, barrier, rank, size).run(); };
  run_team(f.threads, body);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::linear
