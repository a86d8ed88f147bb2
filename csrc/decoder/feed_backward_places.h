// The workspace of a decoder's backward (attention_feed_backward.h), as offsets into it.
#pragma once

#include "core/weight_grad.h"
#include "decoder/memory_rows.h"
#include "rnn/rnn_weights.h"

namespace encdec::decoder {
namespace ENCDEC_ISA_NAMESPACE {

using rnn::Cell;
using Plain = rnn::ENCDEC_ISA_NAMESPACE::PlainBlocking;
static_assert(Plain::kVectors == kVectors, "the recurrent kernels pack for this product");

struct FeedBackwardPlaces {
  MemoryPlaces memory;
  int64_t values, value_stride;  // float [B][padded S][stride]
  int64_t feed_weight;           // packed, k over the gates
  int64_t fed_grads, fed_row;    // float [B][row]: of what was fed into the step after
  int64_t fed_rows, fed_sums;    // pointers to f_{t-1}; float (gates H, M)
  int64_t query_weight;          // packed W_q, k over A
  int64_t d_query, d_query_row;  // staged rows [T][B]
  int64_t rows, products, sums;  // W_q's and W_o's gradients: pointers, WeightGrad's, floats
  int64_t output_context, output_state;  // packed W_o by columns, k over F
  int64_t d_output, d_output_row;        // staged rows [T][B]: of what tanh is of
  int64_t contexts, context_row;         // float [B][row]: a context's gradient, through W_o
  // With coverage. float [B][padded S][stride]: keys'; [B][padded S]: of the sums of weights.
  int64_t d_keys, d_coverage;
  int64_t member;  // of each: a context's gradient, a query's factors, g, 2k
  int64_t d_context, factors, grads, keys, d_v, d_u, member_bytes;  // d_v, d_u: sums of all steps
  int64_t bytes;
};

template <Cell cell, Format format>
inline FeedBackwardPlaces feed_backward_places(const Backward& f) {
  FeedBackwardPlaces p{};
  Layout all, member;
  const Memory& m = f.memory;
  const rnn::Shape& s = f.rnn.shape;
  p.memory = memory_places(m, s.B, all);
  p.value_stride = row_floats(m.M);
  p.values = all.take(s.B * p.memory.padded * p.value_stride * 4);
  p.d_query_row = staged_row_bytes(format, m.A);
  const int64_t gates = rnn::gate_count(cell);
  const int64_t padded = round_up(s.H, Plain::kUnits);
  p.feed_weight =
      all.take(Plain::blocks(m.F) * packed_panel_bytes(format, gates * padded, kVectors));
  p.fed_row = round_up(m.F, kPanel);
  p.fed_grads = all.take(s.B * p.fed_row * 4);
  p.fed_rows = all.take(f.rnn.chunk_rows * static_cast<int64_t>(sizeof(char*)));
  p.fed_sums = all.take(f.rnn.dtype == Format::kFloat32 ? 0 : gates * s.H * m.F * 4);
  int64_t widest = 0, products = 0, sums = 0;  // of both
  const auto gradient = [&](int64_t columns, int64_t k, int64_t row_bytes) {
    const int64_t bytes = WeightGrad<format>::bytes(s.T * s.B, k, row_bytes, f.rnn.threads);
    products = bytes > products ? bytes : products;
    sums = columns * k > sums ? columns * k : sums;
    widest = k > widest ? k : widest;
  };
  if (m.query_weight) {
    p.query_weight = all.take(panels_of(s.H) * packed_panel_bytes(format, m.A, kVectors));
    p.d_query = all.take(s.T * s.B * p.d_query_row);
    gradient(m.A, s.H, p.d_query_row);
  }
  if (m.output_weight) {
    const int64_t panel = packed_panel_bytes(format, m.F, kVectors);
    p.output_context = all.take(panels_of(m.M) * panel);
    p.output_state = all.take(panels_of(s.H) * panel);
    p.d_output_row = staged_row_bytes(format, m.F);
    p.d_output = all.take(s.T * s.B * p.d_output_row);
    p.context_row = round_up(m.M, kPanel);
    p.contexts = all.take(s.B * p.context_row * 4);
    gradient(m.F, m.M, p.d_output_row);
    gradient(m.F, s.H, p.d_output_row);
  }
  if (widest > 0) {
    p.rows = all.take(s.T * s.B * static_cast<int64_t>(sizeof(char*)));
    p.products = all.take(products);
    p.sums = all.take(f.rnn.dtype == Format::kFloat32 ? 0 : sums * 4);
  }
  p.d_keys = all.take(m.covered() ? s.B * p.memory.padded * p.memory.stride * 4 : 0);
  p.d_coverage = all.take(m.covered() ? s.B * p.memory.padded * 4 : 0);
  p.member = all.end();
  p.d_context = member.take(kTileQueries * p.value_stride * 4);
  p.factors = member.take(p.memory.stride * 4);
  p.grads = member.take(scores_floats(m, p.memory) * 4);
  p.keys = member.take((m.covered() ? p.memory.padded : kKeyBlock) * p.memory.stride * 4);
  p.d_v = member.take(m.covered() ? p.memory.stride * 4 : 0);
  p.d_u = member.take(m.covered() ? p.memory.stride * 4 : 0);
  p.member_bytes = member.end();
  p.bytes = p.member + f.rnn.threads * p.member_bytes;
  return p;
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::decoder
