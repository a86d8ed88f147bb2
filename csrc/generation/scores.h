// The scores that a decoder writes in a step, and the tokens that are found in them.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "generation/candidates.h"
#include "generation/decoder.h"

namespace encdec::generation {

class Scores {
 public:
  // rows: the most of a step.
  Scores(const Options& options, const Constraints& constraints, const Decoder& decoder,
         int64_t rows, int64_t attention_size);

  // Where the decoder writes the next step. histories: of the sentences; their tokens do not count.
  StepScores next(const std::vector<History>& histories);

  // What is asked for a row; a history of no tokens: nothing.
  struct Asked {
    History history;
    int32_t biased;  // the token that a soft prefix asks for, or -1
  };
  // Finds what may follow each row, by the members of a team, who ask with a room of their own for
  // tokens. Returns false where a score is NaN or +infinity.
  bool find(int64_t rows, const std::function<Asked(int64_t row, Tokens* room)>& asked);

  const std::vector<Candidate>& found(int64_t row) const {
    return found_[static_cast<size_t>(row)];
  }
  const float* attention(int64_t row) const { return attention_.data() + row * attention_size_; }

 private:
  struct Member {
    Candidates candidates;
    Tokens tokens;
    std::exception_ptr error;
  };
  bool find_row(Member& member, int64_t row, const Asked& asked);

  const Decoder& decoder_;
  const Constraints& constraints_;
  const int64_t stride_, attention_size_;
  const std::unique_ptr<float[]> logits_;
  std::vector<float> attention_;
  int64_t kept_ = 0;  // of each row by the decoder's own scan
  std::vector<float> log_sums_, numbers_;
  Tokens places_, counts_;
  std::vector<Member> members_;
  std::vector<std::vector<Candidate>> found_;
};

}  // namespace encdec::generation
