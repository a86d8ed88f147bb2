// What a search asks of a model: one step for the rows that are still open.
#pragma once

#include <cstdint>

#include "generation/kernels.h"

namespace encdec::generation {

// Rows of one sentence lie one behind the other. In the step at position 0 a row starts from what
// its sentence's encoder left; later it goes on from row parents[r] of the step before.
struct StepRows {
  int64_t count = 0;
  int64_t position = 0;      // tokens that each row has behind it
  const int32_t* tokens;     // [count] the last token of each
  const int32_t* parents;    // [count]
  const int32_t* sentences;  // [count]
};

class Decoder {
 public:
  virtual ~Decoder() = default;
  virtual int64_t vocabulary() const = 0;
  // Source positions of a row of attention; 0: this decoder has no attention to give.
  virtual int64_t attention_size() const = 0;
  // How many of them sentence `b` has.
  virtual int64_t source_length(int64_t b) const = 0;
  virtual void step(const StepRows& rows, const StepScores& scores) = 0;
  // Whether `step` fills in the scans, too.
  virtual bool scans() const { return false; }
  // Whether it has a shortlist: it never writes other tokens' scores.
  virtual bool restricts() const { return false; }
};

}  // namespace encdec::generation
