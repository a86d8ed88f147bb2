// Which tokens may follow, and which are made less likely: edits of a row of scores before a token
// is chosen, in the order of transformers' logits processors.
#pragma once

#include "generation/options.h"

namespace encdec::generation {

// A hypothesis as the constraints see it.
struct History {
  const int32_t* tokens;  // prompt and what was written
  int64_t length;
  int64_t prompt;  // tokens of it that were given
  int64_t limit;   // the length at which it ends
};

// A score that was edited, as it was before.
struct Edit {
  int32_t token;
  float before;
};

class Constraints {
 public:
  Constraints(const Options& options, int64_t vocabulary);

  // Whether the tokens themselves matter, not only their number.
  bool reads_tokens() const { return reads_tokens_; }
  // The tokens of which one must follow, each with score 0; null: no such rule here.
  const Tokens* forced(const History& h) const;
  // Whether `edit` would change scores of a hypothesis like this.
  bool active(const History& h) const;
  // The tokens whose scores it may change where tokens themselves do not matter, in rising order.
  const Tokens& editable() const { return editable_; }
  // The most scores that it would change.
  int64_t most_edits(const History& h) const;
  // The score of token t is row[t] - offset, before and after. edits: by token, each once.
  void edit(const History& h, float* row, float offset, std::vector<Edit>* edits) const;
  // Everything outside of the shortlist becomes impossible.
  void restrict(float* row) const;
  bool restricts() const { return !allowed_.empty(); }

 private:
  struct Row;  // of scores, that keeps what it edits

  int64_t begin(const History& h) const;
  int64_t least_length(const History& h) const;
  void penalise_repetition(const History& h, float offset, Row* row) const;
  void forbid_repeated_ngrams(const History& h, Row* row) const;
  void forbid_bad_words(const History& h, Row* row) const;

  const Options& options_;
  const int64_t vocabulary_;
  std::vector<Tokens> bad_words_;
  std::vector<char> allowed_;
  Tokens ends_, editable_, forced_bos_, begin_forced_bos_, forced_eos_, begin_forced_eos_;
  bool reads_tokens_;
};

}  // namespace encdec::generation
