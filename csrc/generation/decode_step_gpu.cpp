#include "generation/decode_step_gpu.h"

#include <algorithm>

namespace encdec::generation::gpu {

int64_t shared_bytes(const DecodeStep& s) {
  int64_t widest = output_inputs(s);
  for (int i = 0; i < s.layers; ++i) widest = std::max<int64_t>(widest, inputs_of(s, i) + s.H);
  const int64_t floats = std::max<int64_t>(widest * padded_rows(s.R), s.S + s.A);
  return floats * 4;
}

std::string refuse(const DecodeStep& s, int64_t device_shared_bytes) {
  if (s.cell != rnn::Cell::kLstm && s.cell != rnn::Cell::kGru) return "it has LSTM and GRU only";
  if (s.layers < 1 || s.layers > kMaxLayers) return "it has from 1 to 8 layers";
  if (s.R < 1 || s.R > kMaxRows)
    return "it has at most 8 rows, and here are " + std::to_string(s.R);
  for (const int32_t n : {s.E, s.H, s.M, s.attention == Attention::kNone ? 0 : s.A}) {
    if (n % kRowMultiple != 0)
      return "sizes must be multiples of 8, and one is " + std::to_string(n);
  }
  const int64_t bytes = shared_bytes(s);
  if (bytes > device_shared_bytes) {
    return "a block needs " + std::to_string(bytes) + " bytes of shared memory, and there are " +
           std::to_string(device_shared_bytes);
  }
  return {};
}

}  // namespace encdec::generation::gpu
