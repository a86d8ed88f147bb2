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

Candidates::Candidates(const Options& options, const Constraints& constraints, int64_t vocabulary,
                       bool masks)
    : options_(options),
      constraints_(constraints),
      vocabulary_(vocabulary),
      masks_(masks && constraints.restricts()),
      kernels_(kernels(chosen_isa())),
      scores_(kMostByScan),
      tokens_(kMostByScan) {}

int64_t Candidates::wanted() const {
  const bool beams = options_.beams > 1;
  if (!options_.sample) return std::min(vocabulary_, beams ? options_.kept() : 1);
  // Of a draw: the tokens that top_k leaves; without it any token may be drawn.
  const int64_t least =
      beams ? std::max<int64_t>(2, 1 + static_cast<int64_t>(options_.eos.size())) : 1;
  return std::min(vocabulary_, options_.top_k > 0 ? std::max(options_.top_k, least) : vocabulary_);
}

// An edit may take a token from among the best: as many more are asked for.
int64_t Candidates::kept(const History& h) const {
  if (masks_) return 0;
  const int64_t most = std::min(vocabulary_, wanted() + constraints_.most_edits(h));
  return most <= kMostKept ? most : 0;
}

// A draw may take any token, and where a single row is normalised after its edits little may be
// left.
bool Candidates::reads(const History& h) const {
  return masks_ || options_.sample || options_.prefix_bias > 0.0 || constraints_.reads_tokens() ||
         kept(h) == 0 || (options_.beams == 1 && constraints_.active(h));
}

bool Candidates::find(const History& h, float* row, const Scanned* scanned, int32_t biased,
                      std::vector<Candidate>* found) {
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
  if (masks_) constraints_.restrict(row);
  const bool fresh = scanned == nullptr || masks_;
  const Scanned own = fresh ? scan(row, kept(h)) : *scanned;
  if (std::isnan(own.log_sum)) return false;
  edits_.clear();
  if (constraints_.active(h)) constraints_.edit(h, row, beams ? own.log_sum : 0.0f, &edits_);
  // Beams rank by the model's own distribution, edited afterwards; a single row is normalised last.
  float sum = own.log_sum;
  if (!merge(own, row, found)) read(row, found);
  if (!beams && !log_sum(own, row, &sum)) return false;
  if (options_.sample && !found->empty() && static_cast<int64_t>(found->size()) == wanted()) {
    add_ties(row, found);
  }
  for (Candidate& c : *found) c.score -= sum;
  if (options_.sample) warp(found);
  if (biased >= 0) bias(biased, options_.sample ? kNever : row[biased] - sum, found);
  return true;
}

Scanned Candidates::scan(const float* row, int64_t kept) {
  float log_sum = 0.0f;
  int32_t count = 0;
  kernels_.scan_row(row, vocabulary_, {kept, &log_sum, scores_.data(), tokens_.data(), &count});
  return {log_sum, scores_.data(), tokens_.data(), count, kept};
}

// The wanted() best of an edited row, by what was found before the edits. Returns false, and finds
// nothing, where too few are known.
bool Candidates::merge(const Scanned& scanned, const float* row,
                       std::vector<Candidate>* found) const {
  const int64_t needed = wanted() + static_cast<int64_t>(edits_.size());
  if (std::min(needed, vocabulary_) > scanned.kept) return false;
  const auto edited = [&](int32_t token) {
    return std::binary_search(edits_.begin(), edits_.end(), Edit{token, 0.0f},
                              [](const Edit& a, const Edit& b) { return a.token < b.token; });
  };
  for (int64_t i = 0; i < scanned.count; ++i) {
    if (!edited(scanned.places[i])) found->push_back({scanned.numbers[i], scanned.places[i]});
  }
  for (const Edit& e : edits_) {
    if (row[e.token] > kNever) found->push_back({row[e.token], e.token});
  }
  if (!edits_.empty()) std::sort(found->begin(), found->end(), likelier);
  if (static_cast<int64_t>(found->size()) > wanted()) found->resize(static_cast<size_t>(wanted()));
  return true;
}

// The logarithm of the sum of e^row after the edits. Returns false where an edit made it NaN.
bool Candidates::log_sum(const Scanned& scanned, const float* row, float* sum) {
  double left = 1.0;
  for (const Edit& e : edits_) {
    left += std::exp(double(row[e.token]) - scanned.log_sum) -
            std::exp(double(e.before) - scanned.log_sum);
  }
  // Where little is left, the difference would be of rounding errors.
  *sum = left > 0.25 ? scanned.log_sum + static_cast<float>(std::log(left)) : scan(row, 0).log_sum;
  return !std::isnan(*sum);
}

// The wanted() best of a row.
void Candidates::read(const float* row, std::vector<Candidate>* found) {
  if (wanted() > kMostByScan) return all(row, found);
  const Scanned scanned = scan(row, wanted());
  for (int64_t i = 0; i < scanned.count; ++i) {
    found->push_back({scanned.numbers[i], scanned.places[i]});
  }
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

// Tokens as good as the last one that was found: top_k does not tell them apart.
void Candidates::add_ties(const float* row, std::vector<Candidate>* found) const {
  const Candidate last = found->back();
  for (int64_t t = last.token + 1; t < vocabulary_; ++t) {
    if (row[t] == last.score) found->push_back({last.score, static_cast<int32_t>(t)});
  }
}

void Candidates::all(const float* row, std::vector<Candidate>* found) const {
  for (int64_t t = 0; t < vocabulary_; ++t) {
    if (row[t] > kNever) {
      found->push_back({row[t], static_cast<int32_t>(t)});
    }
  }
  std::sort(found->begin(), found->end(), likelier);
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
