// What to search for, and when to stop. Meanings: encdec_fast/generation/config.py.
#pragma once

#include <cstdint>
#include <vector>

namespace encdec::generation {

using Tokens = std::vector<int32_t>;

enum class EarlyStopping : int32_t { kNo = 0, kYes = 1, kNever = 2 };

struct Options {
  int64_t beams = 1;
  int64_t returned = 1;  // hypotheses of a sentence
  double length_penalty = 1.0;
  EarlyStopping early_stopping = EarlyStopping::kNo;
  double coverage_penalty = 0.0;

  bool sample = false;
  double temperature = 1.0;
  int64_t top_k = 0;  // 0: all
  double top_p = 1.0;
  uint64_t seed = 0;

  int64_t max_length = -1, max_new = 20;  // max_new < 0: max_length counts
  int64_t min_length = 0, min_new = 0;
  double max_seconds = 0.0;  // 0: no limit

  double repetition_penalty = 1.0;
  int64_t no_repeat_ngram = 0;
  double prefix_bias = 0.0;  // 0: none
  std::vector<Tokens> bad_words;
  Tokens suppressed, begin_suppressed, forced_bos, forced_eos, eos;
  Tokens vocabulary;  // the only tokens that may be written; empty: all

  bool need_attention = false;
  int threads = 1;

  int64_t limit(int64_t prompt) const { return max_new >= 0 ? prompt + max_new : max_length; }
  // Candidates of a step: enough that `beams` stay open where the best ones all end.
  int64_t kept() const {
    const int64_t ends = static_cast<int64_t>(eos.size());
    return (ends > 1 ? 1 + ends : 2) * beams;
  }
};

}  // namespace encdec::generation
