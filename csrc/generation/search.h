// Greedy search, beam search and sampling around any decoder.
//
// Beam search is that of transformers' `generate`, decided sentence by sentence: at each step the
// kept() best continuations of a sentence's hypotheses are found; those that end are candidates for
// its result, the best others stay open. A sentence that is finished leaves the batch.
#pragma once

#include <stdexcept>
#include <vector>

#include "generation/decoder.h"
#include "generation/options.h"

namespace encdec::generation {

struct Request {
  Tokens prompt;       // the start token and a forced prefix
  Tokens prefix;       // a soft prefix, for Options::prefix_bias
  int64_t number = 0;  // by which its draws differ from those of others
};

struct Hypothesis {
  Tokens tokens;  // with the prompt
  float score = 0.0f;
  std::vector<float> log_probs;  // of each written token
  std::vector<float> attention;  // [written][attention_size]
};

// What happens meanwhile. Called between steps, on the thread that searches.
class Observer {
 public:
  virtual ~Observer() = default;
  // After each step; returns false to end the search: search() then throws Interrupted.
  virtual bool go_on() { return true; }
  // A sentence has its result.
  virtual void finished(int64_t /*sentence*/) {}
  // Whether `written` is wanted.
  virtual bool streams() const { return false; }
  // Tokens that a sentence's result is sure to go on with.
  virtual void written(int64_t /*sentence*/, const Tokens&) {}
};

class Interrupted : public std::runtime_error {
 public:
  Interrupted() : std::runtime_error("the search was interrupted") {}
};

struct Timing {
  int64_t steps = 0, rows = 0;
  double decoder_seconds = 0.0, search_seconds = 0.0;
};

// The hypotheses of each request, the best first: Options::returned of them, or, where a search
// found fewer, as many as there are. Sentence i of the decoder is request i. Throws
// std::runtime_error where a score is NaN or +infinity, and what the decoder and observer throw.
std::vector<std::vector<Hypothesis>> search(Decoder& decoder, const std::vector<Request>& requests,
                                            const Options& options, Observer& observer,
                                            Timing* timing = nullptr);

}  // namespace encdec::generation
