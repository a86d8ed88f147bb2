// From a row of scores to the tokens that a search chooses from.
#pragma once

#include "generation/constraints.h"
#include "generation/kernels.h"

namespace encdec::generation {

struct Candidate {
  float score;  // log probability
  int32_t token;
};

// What was found in a row of scores before anything is edited: as RowScans says.
struct Scanned {
  float log_sum;
  const float* numbers;
  const int32_t* places;
  int64_t count, kept;
};

// Of one row, from the likeliest on. A thread has its own.
class Candidates {
 public:
  // masks: rows have scores outside of the shortlist, too.
  Candidates(const Options& options, const Constraints& constraints, int64_t vocabulary,
             bool masks);

  // How many of the largest scores `find` can use; 0: none, it will read the row.
  int64_t kept(const History& h) const;
  // Whether `find` may read scores that were neither kept nor are edited.
  bool reads(const History& h) const;
  // The row is changed. scanned: null where the decoder does not scan. biased: the token that a
  // soft prefix asks for here, or -1. Returns false where a score is NaN or +infinity.
  bool find(const History& h, float* row, const Scanned* scanned, int32_t biased,
            std::vector<Candidate>* found);

 private:
  int64_t wanted() const;
  Scanned scan(const float* row, int64_t kept);
  bool merge(const Scanned& scanned, const float* row, std::vector<Candidate>* found) const;
  bool log_sum(const Scanned& scanned, const float* row, float* sum);
  void read(const float* row, std::vector<Candidate>* found);
  void all(const float* row, std::vector<Candidate>* found) const;
  void add_ties(const float* row, std::vector<Candidate>* found) const;
  void warp(std::vector<Candidate>* found) const;
  void bias(int32_t token, float log_prob, std::vector<Candidate>* found) const;

  const Options& options_;
  const Constraints& constraints_;
  const int64_t vocabulary_;
  const bool masks_;
  const Kernels& kernels_;
  std::vector<float> scores_;
  Tokens tokens_;
  std::vector<Edit> edits_;
};

}  // namespace encdec::generation
