// The product, by the members of a team, a chunk of staged rows at a time. With many rows each
// member has its own and takes them through all panels of output features; with few, each has its
// own panels and takes all rows through them. A norm needs whole rows: the chunk's results wait as
// floats until they are complete, and are then normalised row by row.
#pragma once

#include <cmath>

#include "core/gemm.h"
#include "core/math.h"
#include "core/panels.h"
#include "core/team.h"
#include "linear/linear.h"

namespace encdec::linear {
namespace ENCDEC_ISA_NAMESPACE {

using namespace encdec::ENCDEC_ISA_NAMESPACE;

inline PackedHeader layout(int64_t N, int64_t K, Format format) {
  PackedHeader h{};
  h.magic = PackedHeader::kMagic;
  h.isa = kIsa;
  h.format = format;
  h.N = N;
  h.K = K;
  h.bytes = sizeof(PackedHeader);
  h.weight = place_weight(format, N, K, &h.bytes);
  return h;
}

template <Format format>
inline void pack(const Weight& w, int threads, char* packed) {
  const PackedHeader h = layout(w.N, w.K, format);
  auto body = [&](int rank, int size) { pack_weight<format>(w, rank, size, packed, h.weight); };
  run_team(threads, body);
  *reinterpret_cast<PackedHeader*>(packed) = h;
}

struct Places {
  int64_t row, rows, scales;  // a staged row; of a member: its staged rows, their scales
  int64_t member_bytes;
  int64_t results;  // where a norm follows: float [chunk rows][stride], of all or of each member
  int64_t stride;
  int64_t bytes;
};

template <Format format>
inline Places places(const Linear& f) {
  Places p{};
  p.row = staged_row_bytes(format, f.K);
  p.scales = round_up(f.plan.chunk_rows * p.row, 64);
  p.member_bytes = p.scales + round_up(f.plan.chunk_rows * 4, 64);
  p.results = p.member_bytes * f.plan.threads;
  p.stride = staged_row_bytes(Format::kFloat32, panels_of(f.N) * kPanel) / 4;
  const int64_t chunks = f.norm == Norm::kNone ? 0 : f.plan.split_rows ? f.plan.threads : 1;
  p.bytes = p.results + chunks * f.plan.chunk_rows * p.stride * 4;
  return p;
}

ENCDEC_INLINE Float activated(Activation activation, Float x) {
  switch (activation) {
    case Activation::kRelu:
      return max(zero(), x);  // with the variable second NaN stays
    case Activation::kGelu:
      return mul(mul(set1(0.5f), x), add(set1(1.0f), erf(mul(x, set1(0.70710678118654752f)))));
    case Activation::kGeluTanh: {
      const Float inner = fma(mul(mul(x, x), x), set1(0.044715f), x);
      return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(mul(inner, set1(0.79788456080286536f)))));
    }
    case Activation::kSilu:
      return mul(x, sigmoid(x));
    default:
      return x;
  }
}

// Calls visit with the activation as a constant.
template <class Visit>
inline void with_activation(Activation activation, const Visit& visit) {
  switch (activation) {
    case Activation::kRelu:
      return visit(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return visit(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return visit(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu:
      return visit(std::integral_constant<Activation, Activation::kSilu>{});
    default:
      return visit(std::integral_constant<Activation, Activation::kNone>{});
  }
}

// How a row is normalised: (x - mean) scale.
struct RowNorm {
  Float mean, scale;
  ENCDEC_INLINE Float of(Float x) const { return mul(sub(x, mean), scale); }
};

// n numbers, of which whole vectors are read. LayerNorm: Ba, Kiros and Hinton, 2016
// (arXiv:1607.06450); RMSNorm, without the mean: Zhang and Sennrich, 2019 (arXiv:1910.07467).
inline RowNorm row_norm(const float* x, int64_t n, Norm kind, float eps) {
  const float count = static_cast<float>(n);
  float mean = 0.0f;
  if (kind == Norm::kLayer) {
    Float sum = zero();
    for (int64_t c = 0; c < n; c += kLanes) {
      sum = add(sum, first_lanes(load(x + c), lanes_left(c, n)));
    }
    mean = reduce_add(sum) / count;
  }
  Float squares = zero();
  for (int64_t c = 0; c < n; c += kLanes) {
    const Float d = first_lanes(sub(load(x + c), set1(mean)), lanes_left(c, n));
    squares = fma(d, d, squares);
  }
  return {set1(mean), set1(1.0f / std::sqrt(reduce_add(squares) / count + eps))};
}

template <Format format>
class LinearRun {
 public:
  LinearRun(const Linear& call, Barrier& barrier, int rank, int members)
      : call_(call),
        barrier_(barrier),
        rank_(rank),
        members_(members),
        weight_(view(call.packed, reinterpret_cast<const PackedHeader*>(call.packed)->weight,
                     format, call.K, kVectors)),
        places_(places<format>(call)),
        own_(call.workspace + rank * places_.member_bytes),
        esize_(element_bytes(call.dtype)),
        past_caches_(worth_past_caches(call.dtype, call.output, call.output_stride,
                                       call.M * call.N * element_bytes(call.dtype))) {}

  void run() {
    const bool split = call_.plan.split_rows;
    const int64_t begin = split ? part(call_.M, rank_) : 0;
    const int64_t end = split ? part(call_.M, rank_ + 1) : call_.M;
    for (int64_t first = begin; first < end; first += call_.plan.chunk_rows) {
      const int64_t rows =
          end - first < call_.plan.chunk_rows ? end - first : call_.plan.chunk_rows;
      for (int64_t r = 0; r < rows; ++r) {
        scales()[r] = stage_row<format>(call_.input + (first + r) * call_.input_stride, call_.dtype,
                                        call_.K, own_ + r * places_.row);
      }
      products(first, rows);
      if (call_.norm == Norm::kNone) continue;
      if (split) {
        for (int64_t r = 0; r < rows; ++r) normalise(first, r);
        continue;
      }
      barrier_.wait(members_);
      for (int64_t r = part(rows, rank_); r < part(rows, rank_ + 1); ++r) normalise(first, r);
      barrier_.wait(members_);
    }
  }

 private:
  int64_t part(int64_t n, int i) const { return n * i / members_; }
  float* scales() const { return reinterpret_cast<float*>(own_ + places_.scales); }
  float* results(int64_t r) const {
    const int64_t chunk = call_.plan.split_rows ? rank_ * call_.plan.chunk_rows : 0;
    return reinterpret_cast<float*>(call_.workspace + places_.results) +
           (chunk + r) * places_.stride;
  }

  void products(int64_t first, int64_t rows) {
    constexpr int kRows = tile_room(format, kVectors);
    alignas(64) float tile[kRows * kPanel];
    const RowTiles tiles(rows, format, kVectors);
    const int64_t panels = panels_of(call_.N);
    const int64_t begin = call_.plan.split_rows ? 0 : part(panels, rank_);
    const int64_t end = call_.plan.split_rows ? panels : part(panels, rank_ + 1);
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t i = 0; i < tiles.count; ++i) {
        const int64_t row = tiles.begin(i);
        const int n = static_cast<int>(tiles.begin(i + 1) - row);
        multiply_rows<format, kVectors>(n, weight_, p, {own_ + row * places_.row, places_.row},
                                        tile, kPanel, false, {i, tiles.count});
        finish(first, row, n, p * kPanel, tile);
      }
    }
  }

  // What follows the product, for n rows of the panel at `column`.
  void finish(int64_t first, int64_t row, int n, int64_t column, const float* tile) const {
    with_dtype(call_.dtype, [&](auto dtype) {
      with_activation(call_.activation, [&](auto activation) {
        constexpr Format d = decltype(dtype)::value;
        constexpr Activation a = decltype(activation)::value;
        if (column + kPanel <= call_.N) {
          finish_rows<d, a, true>(first, row, n, column, tile);
        } else {
          finish_rows<d, a, false>(first, row, n, column, tile);
        }
      });
    });
  }

  // Compiled for each dtype and activation, for in this loop branches cost as much as arithmetic.
  // What a row needs is read once: a store might change it, for all that the compiler knows.
  template <Format dtype, Activation activation, bool whole>
  __attribute__((noinline)) void finish_rows(int64_t first, int64_t row, int n, int64_t column,
                                             const float* tile) const {
    int lanes[kVectors];
    Float bias[kVectors], scale[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = column + v * kLanes;
      lanes[v] = whole ? kLanes : c < call_.N ? lanes_left(c, call_.N) : 0;
      const char* const at = call_.bias + c * element_bytes(dtype);
      bias[v] = call_.bias && lanes[v] > 0 ? load_as(dtype, at, lanes[v]) : zero();
      scale[v] = format == Format::kInt8 ? load(weight_.scale + c) : zero();
    }
    const float* const row_scales = scales() + row;
    const bool normed = call_.norm != Norm::kNone, past_caches = past_caches_;
    const int64_t from_stride = call_.residual_stride, to_stride = call_.output_stride;
    const int64_t result_stride = places_.stride;
    const char* from = call_.residual;
    if (from) from += (first + row) * from_stride + column * element_bytes(dtype);
    char* to = call_.output + (first + row) * to_stride + column * element_bytes(dtype);
    float* result = normed ? results(row) + column : nullptr;
    for (int r = 0; r < n; ++r, tile += kPanel) {
      Float x[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        x[v] = load(tile + v * kLanes);
        if constexpr (format == Format::kInt8) x[v] = mul(x[v], mul(scale[v], set1(row_scales[r])));
        x[v] = activated(activation, add(x[v], bias[v]));
        if (from && lanes[v] > 0) {
          x[v] = add(x[v], load_as(dtype, from + v * kLanes * element_bytes(dtype), lanes[v]));
        }
        if (normed) store(result + v * kLanes, x[v]);
      }
      if (from) from += from_stride;
      if (normed) {
        result += result_stride;
        continue;
      }
      if constexpr (whole) {
        store_pair_as(dtype, to, x[0], x[1], past_caches);
      } else {
        for (int v = 0; v < kVectors && lanes[v] > 0; ++v) {
          store_as(dtype, to + v * kLanes * element_bytes(dtype), x[v], lanes[v]);
        }
      }
      to += to_stride;
    }
  }

  void normalise(int64_t first, int64_t r) const {
    const float* x = results(r);
    const RowNorm norm = row_norm(x, call_.N, call_.norm, call_.norm_eps);
    for (int64_t c = 0; c < call_.N; c += kLanes) {
      const int lanes = lanes_left(c, call_.N);
      const auto of = [&](const char* p, float otherwise) {
        return p ? load_as(call_.dtype, p + c * esize_, lanes) : set1(otherwise);
      };
      store_as(call_.dtype, call_.output + (first + r) * call_.output_stride + c * esize_,
               fma(norm.of(load(x + c)), of(call_.norm_weight, 1.0f), of(call_.norm_bias, 0.0f)),
               lanes);
    }
  }

  const Linear& call_;
  Barrier& barrier_;
  const int rank_, members_;
  const PackedView weight_;
  const Places places_;
  char* const own_;
  const int esize_;
  const bool past_caches_;
};

template <Format format>
inline void run_linear(const Linear& f) {
  Barrier barrier;
  auto body = [&](int rank, int size) { LinearRun<format>(f, barrier, rank, size).run(); };
  run_team(f.plan.threads, body);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::linear
