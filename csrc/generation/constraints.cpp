#include "generation/constraints.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace encdec::generation {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

bool contains(const Tokens& tokens, int32_t token) {
  return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
}

// Those that are not forbidden, and in the shortlist where there is one.
Tokens possible(const Tokens& tokens, const Tokens& forbidden, const Tokens& vocabulary) {
  Tokens left;
  for (const int32_t token : tokens) {
    if (contains(forbidden, token)) continue;
    if (vocabulary.empty() || contains(vocabulary, token)) left.push_back(token);
  }
  return left;
}

}  // namespace

struct Constraints::Row {
  float* scores;
  std::vector<Edit>* edits;

  float operator[](int32_t token) const { return scores[token]; }
  void set(int32_t token, float score) {
    edits->push_back({token, scores[token]});
    scores[token] = score;
  }
  void forbid(int32_t token) { set(token, kNever); }
  void forbid(const Tokens& tokens) {
    for (const int32_t token : tokens) forbid(token);
  }
};

Constraints::Constraints(const Options& options, int64_t vocabulary)
    : options_(options),
      vocabulary_(vocabulary),
      forced_bos_(possible(options.forced_bos, options.suppressed, options.vocabulary)),
      begin_forced_bos_(possible(forced_bos_, options.begin_suppressed, {})),
      forced_eos_(possible(options.forced_eos, options.suppressed, options.vocabulary)),
      begin_forced_eos_(possible(forced_eos_, options.begin_suppressed, {})) {
  for (const Tokens& word : options.bad_words) {
    // To forbid the end is not what this option is for.
    if (word.size() > 1 || !contains(options.eos, word[0])) bad_words_.push_back(word);
  }
  // An end token that the model cannot write ends nothing.
  for (const int32_t token : options.eos) {
    if (token < vocabulary) ends_.push_back(token);
  }
  for (const Tokens* some :
       {&std::as_const(ends_), &options.suppressed, &options.begin_suppressed}) {
    editable_.insert(editable_.end(), some->begin(), some->end());
  }
  std::sort(editable_.begin(), editable_.end());
  if (!options.vocabulary.empty()) {
    allowed_.assign(static_cast<size_t>(vocabulary), 0);
    for (const int32_t token : options.vocabulary) allowed_[static_cast<size_t>(token)] = 1;
  }
  reads_tokens_ =
      options.repetition_penalty != 1.0 || options.no_repeat_ngram > 0 || !bad_words_.empty();
}

// The length at which begin_suppressed applies: a forced first token is not what it is about.
int64_t Constraints::begin(const History& h) const {
  return h.prompt > 1 || options_.forced_bos.empty() ? h.prompt : h.prompt + 1;
}

// min_new takes the place of min_length, as in transformers.
int64_t Constraints::least_length(const History& h) const {
  return options_.min_new > 0 ? h.prompt + options_.min_new : options_.min_length;
}

const Tokens* Constraints::forced(const History& h) const {
  const bool at_begin = h.length == begin(h);
  if (!options_.forced_eos.empty() && h.length == h.limit - 1) {
    return at_begin ? &begin_forced_eos_ : &forced_eos_;
  }
  if (!options_.forced_bos.empty() && h.length == 1) {
    return at_begin ? &begin_forced_bos_ : &forced_bos_;
  }
  return nullptr;
}

bool Constraints::active(const History& h) const {
  return reads_tokens_ || h.length < least_length(h) || !options_.suppressed.empty() ||
         (!options_.begin_suppressed.empty() && h.length == begin(h));
}

int64_t Constraints::most_edits(const History& h) const {
  size_t most = bad_words_.size() + options_.suppressed.size();
  if (options_.repetition_penalty != 1.0) most += static_cast<size_t>(h.length);
  if (options_.no_repeat_ngram > 0) most += static_cast<size_t>(h.length);
  if (h.length < least_length(h)) most += ends_.size();
  if (h.length == begin(h)) most += options_.begin_suppressed.size();
  return static_cast<int64_t>(most);
}

void Constraints::edit(const History& h, float* scores, float offset,
                       std::vector<Edit>* edits) const {
  edits->clear();
  Row row{scores, edits};
  if (options_.repetition_penalty != 1.0) penalise_repetition(h, offset, &row);
  if (options_.no_repeat_ngram > 0) forbid_repeated_ngrams(h, &row);
  forbid_bad_words(h, &row);
  if (h.length < least_length(h)) row.forbid(ends_);
  row.forbid(options_.suppressed);
  if (h.length == begin(h)) row.forbid(options_.begin_suppressed);
  // Of several edits of a token the first one knows what was there.
  std::stable_sort(edits->begin(), edits->end(),
                   [](const Edit& a, const Edit& b) { return a.token < b.token; });
  edits->erase(std::unique(edits->begin(), edits->end(),
                           [](const Edit& a, const Edit& b) { return a.token == b.token; }),
               edits->end());
}

void Constraints::restrict(float* row) const {
  for (int64_t t = 0; t < vocabulary_; ++t) {
    if (!allowed_[static_cast<size_t>(t)]) row[t] = kNever;
  }
}

void Constraints::penalise_repetition(const History& h, float offset, Row* row) const {
  Tokens seen(h.tokens, h.tokens + h.length);
  std::sort(seen.begin(), seen.end());
  seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
  const float penalty = static_cast<float>(options_.repetition_penalty);
  for (const int32_t token : seen) {
    if (token >= vocabulary_) continue;  // a start token beyond what the model writes
    const float score = (*row)[token] - offset;
    row->set(token, (score < 0.0f ? score * penalty : score / penalty) + offset);
  }
}

void Constraints::forbid_repeated_ngrams(const History& h, Row* row) const {
  const int64_t n = options_.no_repeat_ngram;
  const int32_t* const last = h.tokens + h.length - (n - 1);
  for (int64_t i = 0; i + n <= h.length; ++i) {
    const int32_t next = h.tokens[i + n - 1];
    if (next < vocabulary_ && std::equal(h.tokens + i, h.tokens + i + n - 1, last)) {
      row->forbid(next);
    }
  }
}

void Constraints::forbid_bad_words(const History& h, Row* row) const {
  for (const Tokens& word : bad_words_) {
    const int64_t before = static_cast<int64_t>(word.size()) - 1;
    if (before <= h.length &&
        std::equal(word.begin(), word.end() - 1, h.tokens + h.length - before)) {
      row->forbid(word.back());
    }
  }
}

}  // namespace encdec::generation
