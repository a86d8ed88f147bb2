// From a row of scores to the tokens that a search chooses from.
#pragma once

#include "generation/constraints.h"
#include "generation/kernels.h"

namespace encdec::generation {

struct Candidate {
  float score;  // log probability
  int32_t token;
};

// Of one row, from the likeliest on. A thread has its own.
class Candidates {
 public:
  Candidates(const Options& options, const Constraints& constraints, int64_t vocabulary);

  // The row is changed. biased: the token that a soft prefix asks for here, or -1. Returns false
  // where a score is NaN or +infinity.
  bool find(const History& h, float* row, int32_t biased, std::vector<Candidate>* found);

 private:
  // The most likely `count` of the row, their scores minus *total, the logarithm of the sum of all.
  bool top(const float* row, int64_t count, float* total, std::vector<Candidate>* found);
  bool all(const float* row, std::vector<Candidate>* found) const;
  void add_ties(const float* row, std::vector<Candidate>* found) const;
  void warp(std::vector<Candidate>* found) const;
  void bias(int32_t token, float log_prob, std::vector<Candidate>* found) const;

  const Options& options_;
  const Constraints& constraints_;
  const int64_t vocabulary_;
  const Kernels& kernels_;
  std::vector<float> scores_;
  Tokens tokens_;
};

}  // namespace encdec::generation
