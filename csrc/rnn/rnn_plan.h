// How a call is cut: threads, time chunks, and the order of sentences of unequal length.
#pragma once

#include <string>
#include <vector>

#include "rnn/rnn.h"

namespace encdec::rnn {

struct Plan {
  int threads;
  int64_t chunk_rows;
  bool apart = false;   // Forward::apart
  int beside_rows = 0;  // Forward::beside_rows
};

// `rows` is the number of real steps over all sequences, `available` the threads that torch would
// use.
Plan make_plan(const Shape& shape, int64_t rows, int directions, Format format, int available);

// The same for backward, whose products take the rows of a chunk as their common dimension.
Plan make_backward_plan(const Shape& shape, int64_t rows, Format format, int available);

// One line for people: "2 threads, hidden units over threads, time chunks of 1024 rows (8.4 MB)".
std::string describe(const Plan& plan, const Shape& shape, int directions);

// What unequal lengths make of a batch; keeps the arrays that Sequences points to.
struct SequenceOrder {
  std::vector<int64_t> sizes, starts, order;

  // Padded input; lengths[b] in [0, T].
  Sequences from_lengths(const int64_t* lengths, int64_t B, int64_t T);
  // PackedSequence data.
  Sequences from_batch_sizes(const int64_t* batch_sizes, int64_t T);
};

}  // namespace encdec::rnn
