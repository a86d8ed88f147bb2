#include "generation/candidates.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace encdec::generation {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int64_t kMostByScan = 256;  // beyond, sorting is faster than a list kept in order

bool likelier(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

}  // namespace

Candidates::Candidates(const Options& options, const Constraints& constraints, int64_t vocabulary)
    : options_(options),
      constraints_(constraints),
      vocabulary_(vocabulary),
      kernels_(kernels(chosen_isa())),
      scores_(kMostByScan),
      tokens_(kMostByScan) {}

bool Candidates::find(const History& h, float* row, int32_t biased, std::vector<Candidate>* found) {
  const bool beams = options_.beams > 1;
  found->clear();
  if (const Tokens* forced = constraints_.forced(h)) {
    // Beams take each as certain; a single row is a distribution.
    const float each = beams ? 0.0f : -std::log(static_cast<float>(forced->size()));
    for (const int32_t token : *forced) found->push_back({each, token});
    if (options_.sample) warp(found);
    if (biased >= 0) bias(biased, kNever, found);
    return true;
  }
  if (constraints_.restricts()) constraints_.restrict(row);
  const bool edited = constraints_.active(h);
  const int64_t least = beams ? std::max<int64_t>(2, 1 + static_cast<int64_t>(options_.eos.size()))
                              : 1;  // of a draw: tokens that top_k and top_p leave
  const int64_t wanted = options_.sample
                             ? (options_.top_k > 0 ? std::max(options_.top_k, least) : vocabulary_)
                         : beams ? options_.kept()
                                 : 1;
  float total = 0.0f, sum = 0.0f;
  // Beams rank by the model's own distribution, edited afterwards; a single row is normalised last.
  if (beams && edited && !top(row, 0, &total, found)) return false;
  if (edited) constraints_.edit(h, row, total);
  if (!top(row, std::min(wanted, vocabulary_), &sum, found)) return false;
  const float offset = beams && edited ? total : sum;
  for (Candidate& c : *found) c.score -= offset;
  if (options_.sample) warp(found);
  if (biased >= 0) bias(biased, options_.sample ? kNever : row[biased] - offset, found);
  return true;
}

// A soft prefix: p = (1 - bias) p + bias for its token, (1 - bias) p for all others. log_prob: of
// the token where it is not among those that were found.
void Candidates::bias(int32_t token, float log_prob, std::vector<Candidate>* found) const {
  const double kept = 1.0 - options_.prefix_bias;
  const float shift = static_cast<float>(std::log(kept));
  for (auto c = found->begin(); c != found->end(); ++c) {
    if (c->token != token) continue;
    log_prob = c->score;
    found->erase(c);
    break;
  }
  for (Candidate& c : *found) c.score += shift;
  const double p = std::exp(double(log_prob)) * kept + options_.prefix_bias;
  const Candidate own{static_cast<float>(std::log(p)), token};
  found->insert(std::find_if(found->begin(), found->end(),
                             [&](const Candidate& c) { return likelier(own, c); }),
                own);
}

bool Candidates::top(const float* row, int64_t count, float* total, std::vector<Candidate>* found) {
  const int64_t kept = std::min(count, kMostByScan);
  int64_t n = 0;
  *total = kernels_.scan_row(row, vocabulary_, kept, scores_.data(), tokens_.data(), &n);
  if (std::isnan(*total)) return false;
  if (count > kMostByScan) return all(row, found);
  for (int64_t i = 0; i < n; ++i) {
    found->push_back({scores_[static_cast<size_t>(i)], tokens_[static_cast<size_t>(i)]});
  }
  if (options_.sample && n > 0 && n == kept) add_ties(row, found);
  return true;
}

// Tokens as good as the last one that was found: top_k does not tell them apart.
void Candidates::add_ties(const float* row, std::vector<Candidate>* found) const {
  const Candidate last = found->back();
  for (int64_t t = last.token + 1; t < vocabulary_; ++t) {
    if (row[t] == last.score) found->push_back({last.score, static_cast<int32_t>(t)});
  }
}

bool Candidates::all(const float* row, std::vector<Candidate>* found) const {
  for (int64_t t = 0; t < vocabulary_; ++t) {
    if (row[t] > kNever) {
      found->push_back({row[t], static_cast<int32_t>(t)});
    }
  }
  std::sort(found->begin(), found->end(), likelier);
  return true;
}

// temperature, top_k and top_p, on candidates in falling order; without beams what is left is a
// distribution again.
void Candidates::warp(std::vector<Candidate>* found) const {
  const bool beams = options_.beams > 1;
  const size_t least = beams ? std::max<size_t>(2, 1 + options_.eos.size()) : 1;
  const float inverse = static_cast<float>(1.0 / options_.temperature);
  if (options_.temperature != 1.0) {
    for (Candidate& c : *found) c.score *= inverse;
  }
  if (options_.top_k > 0) {
    const size_t most = std::max(static_cast<size_t>(options_.top_k), least);
    size_t kept = std::min(most, found->size());
    while (kept < found->size() && (*found)[kept].score == (*found)[kept - 1].score) ++kept;
    found->resize(kept);
  }
  if (found->empty()) return;
  const auto sum = [&] {
    double s = 0.0;
    for (const Candidate& c : *found) s += std::exp(double(c.score) - (*found)[0].score);
    return s;
  };
  if (options_.top_p < 1.0) {
    const double whole = sum();
    double tail = 0.0;
    size_t n = found->size();
    // From the least likely on, as long as what is dropped has at most 1 - top_p together.
    while (n > least) {
      tail += std::exp(double((*found)[n - 1].score) - (*found)[0].score) / whole;
      if (tail > 1.0 - options_.top_p) break;
      --n;
    }
    found->resize(n);
  }
  if (beams) return;
  const float normaliser = (*found)[0].score + static_cast<float>(std::log(sum()));
  for (Candidate& c : *found) c.score -= normaliser;
}

}  // namespace encdec::generation
