#include "generation/scores.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "core/team.h"

namespace encdec::generation {

Scores::Scores(const Options& options, const Constraints& constraints, const Decoder& decoder,
               int64_t rows, int64_t attention_size)
    : decoder_(decoder),
      constraints_(constraints),
      stride_(round_up(decoder.vocabulary(), 64)),
      attention_size_(attention_size),
      logits_(new float[static_cast<size_t>(rows * stride_)]),
      attention_(static_cast<size_t>(rows * attention_size)),
      found_(static_cast<size_t>(rows)) {
  for (int i = 0; i < options.threads; ++i) {
    members_.push_back(
        {Candidates(options, constraints, decoder.vocabulary(), !decoder.restricts()),
         {},
         nullptr});
  }
  // A decoder with a shortlist leaves the scores of other tokens as they are. Nobody else reads
  // what was not written, and what is not touched costs nothing.
  if (decoder.restricts()) {
    std::fill_n(logits_.get(), rows * stride_, -std::numeric_limits<float>::infinity());
  }
  if (!decoder.scans()) return;
  const size_t count = static_cast<size_t>(rows), kept = static_cast<size_t>(kMostKept);
  log_sums_.resize(count);
  counts_.resize(count);
  numbers_.resize(count * kept);
  places_.resize(count * kept);
}

StepScores Scores::next(const std::vector<History>& histories) {
  StepScores to;
  to.logits = logits_.get();
  to.stride = stride_;
  to.attention = attention_size_ ? attention_.data() : nullptr;
  if (!decoder_.scans()) return to;
  kept_ = 0;
  const Candidates& candidates = members_[0].candidates;
  to.few = true;
  to.few_tokens = constraints_.editable().data();
  to.few_count = static_cast<int64_t>(constraints_.editable().size());
  for (const History& h : histories) {
    kept_ = std::max(kept_, candidates.kept(h));
    to.few = to.few && !candidates.reads(h);
  }
  to.scans = {kept_, log_sums_.data(), numbers_.data(), places_.data(), counts_.data()};
  return to;
}

bool Scores::find(int64_t rows, const std::function<Asked(int64_t row, Tokens* room)>& asked) {
  std::atomic<bool> good{true};
  auto body = [&](int rank, int size) {
    Member& own = members_[static_cast<size_t>(rank)];
    try {
      for (int64_t r = rows * rank / size; r < rows * (rank + 1) / size; ++r) {
        if (!find_row(own, r, asked(r, &own.tokens))) good = false;
      }
    } catch (...) {  // nothing may leave a team
      own.error = std::current_exception();
    }
  };
  run_team(static_cast<int>(std::min(static_cast<int64_t>(members_.size()), rows)), body);
  for (const Member& own : members_) {
    if (own.error) std::rethrow_exception(own.error);
  }
  return good;
}

bool Scores::find_row(Member& member, int64_t row, const Asked& asked) {
  const size_t r = static_cast<size_t>(row), first = r * static_cast<size_t>(kept_);
  if (asked.history.length == 0) return true;
  Scanned scanned{};
  if (decoder_.scans()) {
    scanned = {log_sums_[r], numbers_.data() + first, places_.data() + first, counts_[r], kept_};
  }
  return member.candidates.find(asked.history, logits_.get() + row * stride_,
                                decoder_.scans() ? &scanned : nullptr, asked.biased, &found_[r]);
}

}  // namespace encdec::generation
