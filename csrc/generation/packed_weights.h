// A model's weights as the engine reads them: matrices packed, vectors as floats.
//
// What they were made from is remembered: `fresh` looks at a sample of the values again, so that a
// change that leaves no other trace is noticed.
#pragma once

#include <memory>
#include <vector>

#include "core/memory.h"
#include "generation/kernels.h"

namespace encdec::generation {

class PackedWeights {
 public:
  explicit PackedWeights(Format format) : format_(format) {}

  Format format() const { return format_; }
  int64_t bytes() const { return bytes_; }

  // y = x W' + b; bias: [N] floats, or null. Throws std::bad_alloc.
  Projection projection(const Weight& weight, const float* bias, int threads);
  // A copy, zeros up to a whole panel.
  const float* floats(const float* from, int64_t count);
  // A weight whose values matter: of any dtype, a vector being one row.
  void watch(const Weight& weight);
  bool fresh() const;

 private:
  struct Watched {
    Weight weight;
    uint64_t mark;
  };
  char* block(int64_t bytes);

  const Format format_;
  int64_t bytes_ = 0;
  std::vector<AlignedBuffer> blocks_;
  std::vector<Watched> watched_;
};

}  // namespace encdec::generation
