// Matrix products on the processor's matrix unit (Intel AMX): bf16 and int8, 16 rows by 16 columns
// by 64 bytes of k in one instruction. Packed panels and staged rows (packed_matrix.h, rows.h) are
// in the form that its tiles load, so that it only takes the place of the vector instructions.
#pragma once

#include <cstdint>

#include "core/format.h"

namespace encdec {

// Whether the chosen instruction set (cpu_features.h) is avx512_amx: chosen_isa() sets it.
extern bool amx_chosen;

// Whether products of weights in this format are made on it.
inline bool amx_multiplies(Format format) {
  return amx_chosen && (format == Format::kBfloat16 || format == Format::kInt8);
}

constexpr int kAmxTile = 16;        // rows, and columns, of a tile
constexpr int kAmxStepGroups = 16;  // groups of k that one instruction takes

// The rows that a product of so many vectors of columns can hold sums of: eight tile registers have
// the sums, one or two tiles of rows and one of weights.
constexpr int amx_rows(int vectors) { return vectors <= 2 ? 2 * kAmxTile : kAmxTile; }

// x: `rows` <= amx_rows(vectors) staged rows, each `groups` words of k, in whole cache lines.
// weights: as many groups of `vectors` (2 or 3) vectors of 16 columns, as they stand in a panel.
// out: receives the sums, 4 bytes each: float for bf16; int32 for int8, where rows are unsigned.
// Strides are in bytes.
struct AmxProduct {
  bool int8;
  int rows, vectors;
  int64_t groups;
  const char* x;
  int64_t x_stride;
  const char* weights;
  char* out;
  int64_t out_stride;
  // Lines of 64 bytes that are asked for meanwhile, from `ahead` on: of each step's 16 * vectors
  // those from ahead_first up to ahead_end.
  const char* ahead = nullptr;
  int ahead_first = 0, ahead_end = 0;
};
void amx_multiply(const AmxProduct& p);

// What amx_multiply leaves configured in a thread is released: run_team does so for its members.
void amx_release();

// Four products of whole tiles, `rounds` times, in registers alone; how many products of numbers
// that is.
int64_t amx_probe(bool int8, int64_t rounds);

}  // namespace encdec
