#include "generation/search.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "generation/scores.h"
#include "generation/tree.h"

namespace encdec::generation {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Open {
  int32_t node;
  double score;  // sum of log probabilities
  int32_t row;   // in the last step
};

struct Ended {
  int32_t node;
  double score;  // what results are ranked by
};

// A continuation of an open hypothesis.
struct Continuation {
  double score;
  float log_prob;
  double rank;  // what they are chosen by: the score, or when sampling a draw
  int32_t beam, token;
};

struct Sentence {
  const Request* request;
  int64_t source;  // whose memory it reads, and whose result this is
  int64_t draw;
  int64_t limit;
  int64_t length = 1;  // tokens so far: those of the prompt that were fed, and the written ones
  std::vector<Open> open;
  std::vector<Ended> ended;  // in falling order of their scores
  std::vector<Ended> stuck;  // that no token may follow: the last resort of a beam search
  std::mt19937_64 random;
  size_t streamed = 0;

  int64_t prompt() const { return static_cast<int64_t>(request->prompt.size()); }
  int64_t written() const { return length - prompt(); }
};

class Search {
 public:
  Search(Decoder& decoder, const std::vector<Request>& requests, const Options& options,
         Observer& observer, Timing* timing)
      : decoder_(decoder),
        options_(options),
        observer_(observer),
        timing_(timing),
        constraints_(options, decoder.vocabulary()),
        beams_(options.beams > 1),
        attention_size_(options.need_attention || options.coverage_penalty > 0.0
                            ? decoder.attention_size()
                            : 0),
        tree_(attention_size_),
        draws_(options.sample && !beams_ ? options.returned : 1),
        scores_(options, constraints_, decoder,
                static_cast<int64_t>(requests.size()) * draws_ * options.beams, attention_size_),
        results_(requests.size()) {
    const int64_t count = static_cast<int64_t>(requests.size()) * draws_;
    sentences_.reserve(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      Sentence s;
      s.source = i / draws_;
      s.draw = i % draws_;
      s.request = &requests[static_cast<size_t>(s.source)];
      s.limit = options.limit(s.prompt());
      if (options.sample) seed(s);
      s.open.push_back({Tree::kRoot, 0.0, static_cast<int32_t>(i)});
      results_[static_cast<size_t>(s.source)].resize(static_cast<size_t>(draws_));
      sentences_.push_back(std::move(s));
      if (sentences_.back().limit <= sentences_.back().prompt()) give_up(sentences_.back());
    }
    leave();
  }

  std::vector<std::vector<Hypothesis>> run() {
    const auto start = Clock::now();
    for (int64_t position = 0; !sentences_.empty(); ++position) {
      if (!observer_.go_on()) throw Interrupted();
      late_ = options_.max_seconds > 0.0 && seconds_since(start) > options_.max_seconds;
      gather_rows();
      const auto before = Clock::now();
      const StepRows rows{static_cast<int64_t>(tokens_.size()), position, tokens_.data(),
                          parents_.data(), sources_.data()};
      histories_.clear();
      for (const Sentence& s : sentences_) histories_.push_back(history(s, nullptr));
      decoder_.step(rows, scores_.next(histories_));
      const auto between = Clock::now();
      find_candidates();
      int64_t row = 0;
      for (Sentence& s : sentences_) {
        const int64_t first = row;
        row += static_cast<int64_t>(s.open.size());
        advance(s, first);
      }
      leave();
      if (timing_) {
        ++timing_->steps;
        timing_->rows += rows.count;
        timing_->decoder_seconds += std::chrono::duration<double>(between - before).count();
        timing_->search_seconds += seconds_since(between);
      }
    }
    return std::move(results_);
  }

 private:
  // A sentence's draws do not depend on what else is in the batch.
  void seed(Sentence& s) const {
    std::seed_seq sequence{static_cast<uint32_t>(options_.seed),
                           static_cast<uint32_t>(options_.seed >> 32),
                           static_cast<uint32_t>(s.request->number), static_cast<uint32_t>(s.draw)};
    s.random.seed(sequence);
  }

  void gather_rows() {
    for (Tokens* column : {&tokens_, &parents_, &sources_}) column->clear();
    for (const Sentence& s : sentences_) {
      for (const Open& open : s.open) {
        const bool in_prompt = open.node == Tree::kRoot;
        tokens_.push_back(in_prompt ? s.request->prompt[static_cast<size_t>(s.length - 1)]
                                    : tree_.token(open.node));
        parents_.push_back(open.row);
        sources_.push_back(static_cast<int32_t>(s.source));
      }
    }
  }

  // The token that a soft prefix asks for after these, or -1.
  int32_t biased_token(const Sentence& s, const Tokens& tokens) const {
    const Tokens& prefix = s.request->prefix;
    const size_t written = static_cast<size_t>(s.written());
    if (options_.prefix_bias == 0.0 || written >= prefix.size()) return -1;
    const auto first = tokens.begin() + s.prompt();
    return std::equal(first, first + s.written(), prefix.begin()) ? prefix[written] : -1;
  }

  static History history(const Sentence& s, const int32_t* tokens) {
    return {tokens, s.length, s.prompt(), s.limit};
  }

  // What may follow each row.
  void find_candidates() {
    owners_.clear();
    for (const Sentence& s : sentences_) {
      for (const Open& open : s.open) owners_.push_back({&s, open.node});
    }
    const bool reads = constraints_.reads_tokens() || options_.prefix_bias > 0.0;
    const auto asked = [&](int64_t row, Tokens* tokens) -> Scores::Asked {
      const auto [s, node] = owners_[static_cast<size_t>(row)];
      if (s->length < s->prompt()) return {};
      if (!reads) return {history(*s, nullptr), -1};
      *tokens = s->request->prompt;
      tree_.append(node, tokens);
      return {history(*s, tokens->data()), biased_token(*s, *tokens)};
    };
    if (!scores_.find(static_cast<int64_t>(owners_.size()), asked)) {
      throw std::runtime_error("the decoder's scores of token " +
                               std::to_string(sentences_[0].length) + " are NaN or infinite");
    }
  }

  // One step of a sentence whose open hypotheses are the rows from `first` on.
  void advance(Sentence& s, int64_t first) {
    if (s.length < s.prompt()) {  // still reading
      ++s.length;
      s.open[0].row = static_cast<int32_t>(first);
      if (late_) give_up(s);
      return;
    }
    ++s.length;
    if (beams_) {
      choose_beams(s, first);
    } else {
      choose_one(s, first);
    }
    if (s.open.empty()) {
      finish(s);
    } else if (observer_.streams()) {
      stream(s);
    }
  }

  bool ends(const Sentence& s, int32_t token) const {
    return late_ || s.length >= s.limit ||
           std::find(options_.eos.begin(), options_.eos.end(), token) != options_.eos.end();
  }

  int32_t write(const Open& open, int32_t token, float log_prob, int64_t row) {
    return tree_.add(open.node, token, log_prob, scores_.attention(row));
  }

  // A draw by which the largest of `score + draw` has the distribution exp(score), and the n
  // largest are n draws without replacement (Gumbel's trick; Kool et al., 2019, arXiv:1903.06059).
  static double gumbel(Sentence& s) {
    const double uniform = (static_cast<double>(s.random() >> 11) + 0.5) * 0x1p-53;
    return -std::log(-std::log(uniform));
  }

  void choose_one(Sentence& s, int64_t row) {
    const std::vector<Candidate>& found = scores_.found(row);
    const Open open = s.open[0];
    s.open.clear();
    if (found.empty()) {
      s.ended.push_back({open.node, open.score});
      return;
    }
    size_t best = 0;
    double largest = -std::numeric_limits<double>::infinity();
    for (size_t i = 0; options_.sample && i < found.size(); ++i) {
      const double rank = found[i].score + gumbel(s);
      if (rank <= largest) continue;
      largest = rank;
      best = i;
    }
    const Candidate& c = found[best];
    const int32_t node = write(open, c.token, c.score, row);
    if (ends(s, c.token)) {
      s.ended.push_back({node, open.score + c.score});
    } else {
      s.open.push_back({node, open.score + c.score, static_cast<int32_t>(row)});
    }
  }

  // The kept() best continuations of a sentence's hypotheses, or so many that are drawn, best
  // first.
  void find_continuations(Sentence& s, int64_t first) {
    all_.clear();
    for (size_t beam = 0; beam < s.open.size(); ++beam) {
      const std::vector<Candidate>& found = scores_.found(first + static_cast<int64_t>(beam));
      if (found.empty()) {
        const Open& open = s.open[beam];
        s.stuck.push_back({open.node, rank(s, open.node, open.score, s.written() - 1)});
      }
      for (const Candidate& c : found) {
        const double score = s.open[beam].score + c.score;
        const double rank = options_.sample ? score + gumbel(s) : score;
        all_.push_back({score, c.score, rank, static_cast<int32_t>(beam), c.token});
      }
    }
    const size_t kept = std::min(all_.size(), static_cast<size_t>(options_.kept()));
    std::partial_sort(all_.begin(), all_.begin() + static_cast<std::ptrdiff_t>(kept), all_.end(),
                      [](const Continuation& a, const Continuation& b) {
                        if (a.rank != b.rank) return a.rank > b.rank;
                        return a.beam != b.beam ? a.beam < b.beam : a.token < b.token;
                      });
    all_.resize(kept);
    if (options_.sample) {  // what was drawn is in the order of its scores from here on
      std::stable_sort(all_.begin(), all_.end(), [](const Continuation& a, const Continuation& b) {
        return a.score > b.score;
      });
    }
  }

  double length_factor(int64_t length) const {
    return std::pow(double(std::max<int64_t>(length, 1)), options_.length_penalty);
  }

  void choose_beams(Sentence& s, int64_t first) {
    find_continuations(s, first);
    const size_t beams = static_cast<size_t>(options_.beams);
    before_.swap(s.open);
    s.open.clear();
    const auto write_one = [&](const Continuation& c) {
      const Open& open = before_[static_cast<size_t>(c.beam)];
      return write(open, c.token, c.log_prob, first + c.beam);
    };
    for (size_t i = 0; i < std::min(beams, all_.size()); ++i) {
      const Continuation& c = all_[i];
      if (ends(s, c.token)) end(s, write_one(c), c.score);
    }
    for (const Continuation& c : all_) {
      if (s.open.size() == beams) break;
      if (ends(s, c.token)) continue;
      s.open.push_back({write_one(c), c.score, static_cast<int32_t>(first + c.beam)});
    }
    if (!s.open.empty() && !may_improve(s)) s.open.clear();
  }

  // What a hypothesis of `written` tokens is ranked by among those that ended.
  double rank(const Sentence& s, int32_t node, double log_prob, int64_t written) {
    if (node == Tree::kRoot) return log_prob;
    double score = log_prob / length_factor(written);
    if (options_.coverage_penalty > 0.0 && attention_size_) {
      score += options_.coverage_penalty * tree_.coverage(node, decoder_.source_length(s.source));
    }
    return score;
  }

  // One hypothesis more that has ended; the best `beams` are kept.
  void end(Sentence& s, int32_t node, double log_prob) {
    const double score = rank(s, node, log_prob, s.written());
    const auto at = std::find_if(s.ended.begin(), s.ended.end(),
                                 [&](const Ended& e) { return e.score < score; });
    s.ended.insert(at, {node, score});
    if (s.ended.size() > static_cast<size_t>(options_.beams)) s.ended.pop_back();
  }

  // Whether the best open hypothesis may yet beat the worst that has ended: by its score at the
  // present length, or with "never" at the best length that it can reach.
  bool may_improve(const Sentence& s) const {
    if (s.ended.size() < static_cast<size_t>(options_.beams)) return true;
    if (options_.early_stopping == EarlyStopping::kYes) return false;
    const bool longest =
        options_.early_stopping == EarlyStopping::kNever && options_.length_penalty > 0.0;
    const int64_t length = longest ? s.limit - s.prompt() : s.written();
    return s.open[0].score / length_factor(length) > s.ended.back().score;
  }

  // A sentence that ends before anything is written.
  void give_up(Sentence& s) {
    s.open.clear();
    s.ended.push_back({Tree::kRoot, 0.0});
    finish(s);
  }

  void finish(Sentence& s) {
    std::vector<Hypothesis>& to = results_[static_cast<size_t>(s.source)];
    if (beams_) {
      std::stable_sort(s.stuck.begin(), s.stuck.end(),
                       [](const Ended& a, const Ended& b) { return a.score > b.score; });
      s.ended.insert(s.ended.end(), s.stuck.begin(), s.stuck.end());
      to.clear();
      const size_t wanted = static_cast<size_t>(options_.returned);
      for (size_t i = 0; i < std::min(wanted, s.ended.size()); ++i) {
        to.push_back(hypothesis(s, s.ended[i]));
      }
    } else {
      to[static_cast<size_t>(s.draw)] = hypothesis(s, s.ended[0]);
    }
    if (observer_.streams() && !s.ended.empty()) {
      Tokens written;
      tree_.append(s.ended[0].node, &written);
      emit(s, written);
    }
    if (s.draw == 0) observer_.finished(s.source);
  }

  Hypothesis hypothesis(const Sentence& s, const Ended& ended) const {
    Hypothesis h;
    h.tokens = s.request->prompt;
    tree_.append(ended.node, &h.tokens);
    h.score = static_cast<float>(ended.score);
    h.log_probs = tree_.log_probs(ended.node);
    if (options_.need_attention && attention_size_) h.attention = tree_.attention(ended.node);
    return h;
  }

  // What all open and ended hypotheses begin with is certain.
  void stream(Sentence& s) {
    Tokens common, own;
    bool first = true;
    const auto take = [&](int32_t node) {
      own.clear();
      tree_.append(node, &own);
      if (first) common = own;
      first = false;
      common.erase(std::mismatch(common.begin(), common.end(), own.begin(), own.end()).first,
                   common.end());
    };
    for (const Open& o : s.open) take(o.node);
    for (const Ended& e : s.ended) take(e.node);
    for (const Ended& e : s.stuck) take(e.node);
    emit(s, common);
  }

  void emit(Sentence& s, const Tokens& certain) {
    if (certain.size() <= s.streamed) return;
    const auto from = certain.begin() + static_cast<std::ptrdiff_t>(s.streamed);
    observer_.written(s.source, Tokens(from, certain.end()));
    s.streamed = certain.size();
  }

  void leave() {
    sentences_.erase(std::remove_if(sentences_.begin(), sentences_.end(),
                                    [](const Sentence& s) { return s.open.empty(); }),
                     sentences_.end());
  }

  struct Owner {
    const Sentence* sentence;
    int32_t node;
  };
  Decoder& decoder_;
  const Options& options_;
  Observer& observer_;
  Timing* const timing_;
  const Constraints constraints_;
  const bool beams_;
  const int64_t attention_size_;
  bool late_ = false;
  Tree tree_;
  const int64_t draws_;  // of each sentence
  Scores scores_;
  std::vector<Sentence> sentences_;  // that are not finished
  Tokens tokens_, parents_, sources_;
  std::vector<Owner> owners_;
  std::vector<History> histories_;
  std::vector<Continuation> all_;
  std::vector<Open> before_;
  std::vector<std::vector<Hypothesis>> results_;
};

}  // namespace

std::vector<std::vector<Hypothesis>> search(Decoder& decoder, const std::vector<Request>& requests,
                                            const Options& options, Observer& observer,
                                            Timing* timing) {
  return Search(decoder, requests, options, observer, timing).run();
}

}  // namespace encdec::generation
