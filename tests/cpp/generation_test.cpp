// Generation: the search around a toy decoder against all sequences there are, and on every
// instruction set that the machine has the two real decoders, whose rows must not depend on what
// else is in the step. Fresh memory holds huge numbers, so that what is read unwritten shows.
#include <malloc.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>

#include "buffers.h"
#include "check.h"
#include "generation/recurrent_decoder.h"
#include "generation/search.h"
#include "generation/transformer_decoder.h"

using namespace encdec;
using namespace encdec::generation;

namespace {

using Numbers = std::vector<float>;
constexpr float kSentinel = 12345.0f;
constexpr int64_t kTokens = 5;  // of the toy

int64_t random_below(int64_t n) { return static_cast<int64_t>((double(next()) + 1.0) / 2.0 * n); }

// Scores by sentence, position and last token. Looks at what it is asked.
class Toy : public Decoder {
 public:
  explicit Toy(int64_t sentences) : scores(random_floats(sentences * 8 * 25, 3.0f)) {}
  Numbers scores;
  int64_t fail_at = -1, rows_before = 0;

  const float* after(int64_t sentence, int64_t position, int64_t token) const {
    return &scores[static_cast<size_t>(((sentence * 8 + position) * kTokens + token) * kTokens)];
  }
  int64_t vocabulary() const override { return kTokens; }
  int64_t attention_size() const override { return 3; }
  int64_t source_length(int64_t b) const override { return b % 3; }
  void step(const StepRows& rows, const StepScores& to) override {
    if (rows.position == fail_at) throw std::out_of_range("the toy");
    for (int64_t r = 0; r < rows.count; ++r) {
      CHECK(rows.position == 0 || (rows.parents[r] >= 0 && rows.parents[r] < rows_before));
      CHECK(r == 0 || rows.sentences[r] >= rows.sentences[r - 1]);
      const float* const from = after(rows.sentences[r], rows.position, rows.tokens[r]);
      std::copy_n(from, kTokens, to.logits + r * to.stride);
      if (to.attention) std::fill_n(to.attention + r * 3, 3, 1.0f / 3.0f);
    }
    rows_before = rows.count;
  }
};

double log_prob(const float* scores, int64_t token) {
  double sum = 0.0;
  for (int64_t t = 0; t < kTokens; ++t) sum += std::exp(double(scores[t]));
  return double(scores[token]) - std::log(sum);
}

// The best score of `left` more tokens, or fewer where the end, token 0, comes before.
double best(const Toy& toy, int64_t sentence, int64_t position, int64_t token, int64_t left) {
  if (left == 0) return 0.0;
  double most = -1e300;
  for (int64_t t = 0; t < kTokens; ++t) {
    const double rest = t == 0 ? 0.0 : best(toy, sentence, position + 1, t, left - 1);
    most = std::max(most, log_prob(toy.after(sentence, position, token), t) + rest);
  }
  return most;
}

class Watching : public Observer {
 public:
  std::vector<Tokens> streamed = std::vector<Tokens>(4);
  int64_t done = 0, steps_left = 1000;
  bool go_on() override { return --steps_left >= 0; }
  void finished(int64_t) override { ++done; }
  bool streams() const override { return true; }
  void written(int64_t sentence, const Tokens& tokens) override {
    Tokens& to = streamed[static_cast<size_t>(sentence)];
    to.insert(to.end(), tokens.begin(), tokens.end());
  }
};

void test_search(int threads) {
  Toy toy(4);
  std::vector<Request> requests(4);
  for (size_t i = 0; i < 4; ++i) requests[i].prompt.assign(1 + i % 3, 1);
  Options options;
  options.eos = {0};
  options.max_new = 4;
  options.length_penalty = 0.0;
  options.threads = threads;
  options.need_attention = true;
  for (const int64_t beams : {1, 2, 200}) {  // 200: nothing is ever dropped
    options.beams = beams;
    options.returned = std::min<int64_t>(beams, 3);
    Watching watching;
    Timing timing;
    const auto found = search(toy, requests, options, watching, &timing);
    CHECK_EQ(watching.done, 4);
    CHECK_EQ(timing.steps, 6);
    for (size_t i = 0; i < 4; ++i) {
      const Hypothesis& h = found[i][0];
      const int64_t prompt = static_cast<int64_t>(requests[i].prompt.size());
      CHECK_EQ(static_cast<int64_t>(found[i].size()), options.returned);
      CHECK(Tokens(h.tokens.begin() + prompt, h.tokens.end()) == watching.streamed[i]);
      CHECK_EQ(h.attention.size(), 3 * h.log_probs.size());
      double sum = 0.0;
      for (int64_t t = prompt; t < static_cast<int64_t>(h.tokens.size()); ++t) {
        const auto at = [&](int64_t n) { return h.tokens[static_cast<size_t>(n)]; };
        sum += log_prob(toy.after(static_cast<int64_t>(i), t - 1, at(t - 1)), at(t));
      }
      CHECK_NEAR(h.score, sum, 1e-5);
      const double most = best(toy, static_cast<int64_t>(i), prompt - 1, 1, 4);
      CHECK(h.score <= most + 1e-5);
      if (beams == 200) CHECK_NEAR(h.score, most, 1e-5);
    }
  }
  Watching watching;
  watching.steps_left = 2;
  CHECK_THROWS(search(toy, requests, options, watching), Interrupted);
  toy.fail_at = 2;
  Watching other;
  CHECK_THROWS(search(toy, requests, options, other), std::out_of_range);
  toy.fail_at = -1;
  options.no_repeat_ngram = 2;
  options.repetition_penalty = 1.3;
  options.bad_words = {{1, 2}, {3, 3, 3, 3, 3, 3, 3, 3, 3}};
  options.vocabulary = {0, 1, 2, 4};
  options.coverage_penalty = 0.5;
  options.prefix_bias = 0.5;
  requests[2].prefix = {3, 3, 3, 3, 3, 3, 3};
  for (const bool sample : {false, true}) {
    for (options.beams = 1; options.beams < 5; ++options.beams) {
      options.sample = sample;
      options.returned = sample && options.beams == 1 ? 7 : 1;
      Watching all;
      CHECK_EQ(search(toy, requests, options, all).size(), requests.size());
    }
  }
  std::fill(toy.scores.begin(), toy.scores.end(), std::numeric_limits<float>::quiet_NaN());
  CHECK_THROWS(search(toy, requests, options, other), std::runtime_error);
}

// Weights that live as long as the test.
std::deque<Numbers> kept;
Numbers& keep(int64_t n, float scale) {
  kept.push_back(random_floats(n, scale));
  return kept.back();
}

Projection projection(PackedWeights& weights, int64_t N, int64_t K, bool bias = true) {
  const Weight w{Format::kFloat32, chars(keep(N * K, 2.0f / std::sqrt(float(K)))), K, N, K};
  return weights.projection(w, bias ? keep(N, 0.5f).data() : nullptr, 2);
}

Table table(int64_t rows, int64_t size) {
  return {chars(keep(rows * size, 1.0f)), Format::kFloat32, size * 4, rows};
}

NormWeights norm(PackedWeights& weights, int64_t D, linear::Norm kind) {
  return {kind, weights.floats(keep(D, 1.0f).data(), D), weights.floats(keep(D, 1.0f).data(), D),
          1e-5f};
}

// How many products with a context the decoders of the test made in each of the two ways.
int64_t by_memory = 0, by_context = 0;

// A batch that an encoder left, and a decoder begun on sentences `first` to `first + count` of it.
struct Batch {
  int64_t B, S;
  std::vector<int64_t> lengths;
  int64_t V, limit;
  double tolerance;
  std::function<std::unique_ptr<Decoder>(int64_t first, int64_t count, int64_t rows, int threads)>
      begin;
};

struct Row {
  int64_t sentence;
  Tokens history;
};

// What a scan says of a row, against the row itself.
void check_scan(const float* row, int64_t size, const RowScans& scans, int64_t r) {
  std::vector<int32_t> order(static_cast<size_t>(size));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row[a] > row[b]; });
  double sum = 0.0;
  for (int64_t i = 0; i < size; ++i) sum += std::exp(double(row[i]));
  CHECK_NEAR(scans.log_sums[r], std::log(sum), 1e-5);
  CHECK_EQ(scans.counts[r], std::min(size, scans.kept));
  for (int64_t i = 0; i < scans.counts[r]; ++i) {
    const int32_t place = scans.places[r * scans.kept + i];
    CHECK_EQ(place, order[static_cast<size_t>(i)]);
    CHECK_EQ(scans.numbers[r * scans.kept + i], row[place]);
  }
}

// One step in buffers of exactly its sizes, and a sentinel behind every row of scores; with `few`
// also wherever no score of these tokens is wanted.
Numbers step(Decoder& decoder, const StepRows& rows, const Batch& batch, Numbers* attention,
             const Tokens* few = nullptr) {
  const int64_t stride = round_up(batch.V, 64) + 64, kept = random_below(12);
  const size_t count = static_cast<size_t>(rows.count);
  Numbers logits(count * static_cast<size_t>(stride), kSentinel), found, log_sums(count),
      numbers(count * static_cast<size_t>(kept));
  Tokens places(numbers.size()), counts(count);
  attention->assign(static_cast<size_t>(rows.count * decoder.attention_size()), kSentinel);
  StepScores to;
  to.logits = logits.data();
  to.stride = stride;
  to.attention = attention->empty() ? nullptr : attention->data();
  to.scans = {kept, log_sums.data(), numbers.data(), places.data(), counts.data()};
  if (few) {
    to.few = true;
    to.few_tokens = few->data();
    to.few_count = static_cast<int64_t>(few->size());
  }
  decoder.step(rows, to);
  CHECK(decoder.scans());
  for (int64_t r = 0; r < rows.count; ++r) {
    const float* const row = &logits[static_cast<size_t>(r * stride)];
    found.insert(found.end(), row, row + batch.V);
    CHECK(std::all_of(row + batch.V, row + stride, [](float x) { return x == kSentinel; }));
    if (!few) {
      check_scan(row, batch.V, to.scans, r);
      continue;
    }
    const auto wanted = [&](int64_t t) { return std::binary_search(few->begin(), few->end(), t); };
    for (int64_t t = 0; t < batch.V; ++t) CHECK_EQ(row[t] != kSentinel, wanted(t));
    for (int64_t i = r * kept; i < r * kept + counts[static_cast<size_t>(r)]; ++i) {
      const int32_t place = places[static_cast<size_t>(i)];
      if (wanted(place)) CHECK_EQ(numbers[static_cast<size_t>(i)], row[place]);
    }
  }
  return found;
}

// Hypotheses that come, go and change places, each as if it were alone.
void test_rows(const Batch& batch, int threads) {
  constexpr int64_t kMost = 3;  // of a sentence
  const auto decoder = batch.begin(0, batch.B, batch.B * kMost, threads);
  std::vector<Row> rows;
  Tokens parents, sentences, tokens;
  for (int64_t b = 0; b < batch.B; ++b) rows.push_back({b, {}});
  for (int64_t position = 0; position + 1 < batch.limit; ++position) {
    std::vector<Row> now;
    parents.clear(), sentences.clear(), tokens.clear();
    for (int64_t b = 0; b < batch.B; ++b) {
      std::vector<int32_t> own;
      for (size_t r = 0; r < rows.size(); ++r) {
        if (rows[r].sentence == b) own.push_back(static_cast<int32_t>(r));
      }
      if (own.empty() || (position > 1 && batch.B > 1 && random_below(6) == 0)) continue;
      const int64_t count = position == 0 ? 1 : 1 + random_below(kMost);
      for (int64_t i = 0; i < count; ++i) {
        const int32_t parent = own[static_cast<size_t>(random_below(own.size()))];
        parents.push_back(parent);
        sentences.push_back(static_cast<int32_t>(b));
        tokens.push_back(static_cast<int32_t>(random_below(batch.V)));
        now.push_back(rows[static_cast<size_t>(parent)]);
        now.back().history.push_back(tokens.back());
      }
    }
    rows = now;
    if (rows.empty()) return;
    Numbers seen;
    const int64_t R = static_cast<int64_t>(rows.size()), S = decoder->attention_size();
    const StepRows asked{R, position, tokens.data(), parents.data(), sentences.data()};
    Tokens few;
    for (int32_t t = 0; t < batch.V; ++t) {
      if (random_below(4) == 0) few.push_back(t);
    }
    const bool all = decoder->restricts() || random_below(2) == 0;
    const Numbers found = step(*decoder, asked, batch, &seen, all ? nullptr : &few);
    for (int64_t r = 0; r < R; ++r) {
      const Row& row = rows[static_cast<size_t>(r)];
      const auto alone = batch.begin(row.sentence, 1, 1, 1);
      Numbers expected, weights;
      const int32_t zero = 0;
      for (size_t t = 0; t < row.history.size(); ++t) {
        const StepRows one{1, static_cast<int64_t>(t), &row.history[t], &zero, &zero};
        expected = step(*alone, one, batch, &weights);
      }
      for (int64_t v = 0; v < batch.V; ++v) {
        if (!all && !std::binary_search(few.begin(), few.end(), v)) continue;
        CHECK_NEAR(found[static_cast<size_t>(r * batch.V + v)], expected[static_cast<size_t>(v)],
                   batch.tolerance);
      }
      double sum = 0.0;
      for (int64_t s = 0; s < S; ++s) {
        const float weight = seen[static_cast<size_t>(r * S + s)];
        CHECK_NEAR(weight, weights[static_cast<size_t>(s)], batch.tolerance);
        CHECK(s < batch.lengths[static_cast<size_t>(row.sentence)] || weight == 0.0f);
        sum += double(weight);
      }
      const bool some = batch.lengths[static_cast<size_t>(row.sentence)] > 0;
      if (S > 0) CHECK_NEAR(sum, some ? 1.0 : 0.0, 1e-5);
    }
  }
}

// A whole search, and another one in the same buffers.
void test_whole(const Batch& batch, int threads) {
  const auto decoder = batch.begin(0, batch.B, batch.B * 4, threads);
  std::vector<Request> requests(static_cast<size_t>(batch.B));
  for (Request& r : requests) r.prompt = {static_cast<int32_t>(random_below(batch.V)), 0};
  Options options;
  options.beams = 4;
  options.returned = 4;
  options.max_length = batch.limit;
  options.max_new = -1;
  options.threads = threads;
  options.need_attention = true;
  Observer nobody;
  for (const auto& each : search(*decoder, requests, options, nobody)) {
    CHECK_EQ(each.size(), size_t{4});
    for (const Hypothesis& h : each) CHECK(std::isfinite(h.score));
  }
}

std::vector<int64_t> lengths_of(int64_t B, int64_t S) {
  std::vector<int64_t> lengths;
  for (int64_t b = 0; b < B; ++b) lengths.push_back(b % 3 == 1 ? 0 : b % 3 == 2 ? (S + 1) / 2 : S);
  return lengths;
}

// Sums have another order with other rows around, and a number that lies between two of a narrow
// format may then be rounded to the other one.
double tolerance_of(Format format) { return format == Format::kFloat32 ? 1e-4 : 0.03; }

Batch transformer(Format format, bool norm_first, int64_t B, int64_t S, int64_t heads,
                  int64_t head_size, int64_t D, int64_t F, int64_t V) {
  const int64_t width = heads * head_size, limit = 7;
  auto model = std::make_shared<TransformerModel>(format);
  PackedWeights& w = model->weights;
  TransformerStep& s = model->step;
  s.format = format;
  s.D = D;
  s.heads = heads;
  s.head_size = head_size;
  s.F = F;
  s.V = V;
  s.norm_first = norm_first;
  s.activation = linear::Activation::kGelu;
  s.attention_scale = 1.0f / std::sqrt(float(head_size));
  s.embedding = table(V, D);
  s.output.projection = projection(w, V, D);
  const linear::Norm kind = norm_first ? linear::Norm::kRms : linear::Norm::kLayer;
  if (norm_first) {
    s.position_bias = w.floats(keep(heads * limit, 1.0f).data(), heads * limit);
    s.bias_length = limit;
    s.final_norm = norm(w, D, kind);
    s.output_scale = 0.5f;
  } else {
    s.positions = table(limit + 1, D);  // the last step is at limit - 2: exactly enough
    s.position_offset = 2;
    s.embedding_norm = norm(w, D, kind);
  }
  for (int l = 0; l < 2; ++l) {
    TransformerLayer layer;
    layer.self_norm = norm(w, D, kind);
    layer.cross_norm = norm(w, D, kind);
    layer.feed_norm = norm(w, D, kind);
    for (Projection* p :
         {&layer.self_query, &layer.self_key, &layer.self_value, &layer.cross_query}) {
      *p = projection(w, width, D);
    }
    layer.self_out = projection(w, D, width);
    layer.cross_out = projection(w, D, width);
    layer.up = projection(w, F, D);
    if (norm_first) layer.gate = projection(w, F, D);
    layer.down = projection(w, D, F);
    model->layers.push_back(layer);
    for (int i = 0; i < 2; ++i) model->memory.push_back(projection(w, width, D + 3));
  }
  Batch batch{B, S, lengths_of(B, S), V, limit, tolerance_of(format), {}};
  const Numbers memory = random_floats(B * S * (D + 3));
  batch.begin = [=](int64_t first, int64_t count, int64_t rows, int threads) {
    auto decoder = std::make_unique<TransformerDecoder>(model);
    const auto from = memory.begin() + first * S * (D + 3);
    const Numbers own(from, from + count * S * (D + 3));
    for (int turn = 0; turn < 2; ++turn) {  // a decoder that has waited for another search
      decoder->begin(own.data(), count, S, batch.lengths.data() + first, rows, limit, threads);
    }
    return decoder;
  };
  return batch;
}

// The product of every token with random weights.
const float* token_gates(const Table& embedding, int64_t N, int64_t E) {
  const Numbers weight = random_floats(N * E, 0.2f);
  Numbers& found = keep(embedding.rows * N, 0.0f);
  for (int64_t t = 0; t < embedding.rows; ++t) {
    const auto* const row = reinterpret_cast<const float*>(embedding.data) + t * E;
    for (int64_t n = 0; n < N; ++n) {
      const auto of = weight.begin() + n * E;
      found[static_cast<size_t>(t * N + n)] = std::inner_product(row, row + E, of, 0.0f);
    }
  }
  return found.data();
}

// With `more` additive attention has a coverage, and with a dot product an attentional vector is
// fed.
Batch recurrent(Format format, rnn::Cell cell, Attention attention, int64_t layers, int64_t B,
                int64_t S, int64_t E, int64_t H, int64_t M, int64_t A, int64_t V,
                bool more = false) {
  const int64_t gates = rnn::gate_count(cell);
  const int64_t F = more && attention == Attention::kDot ? M + 3 : M;
  auto model = std::make_shared<RecurrentModel>(format);
  PackedWeights& w = model->weights;
  RecurrentStep& s = model->step;
  const bool attends = attention != Attention::kNone;
  s.format = format;
  s.E = E;
  s.H = H;
  s.M = M;
  s.F = F;
  s.V = V;
  s.attention_kind = attention;
  s.embedding = table(V, E);
  s.output.projection = projection(w, V, H);
  if (attends) s.output.context = projection(w, V, F, false);
  if (F != M) {
    s.attentional = projection(w, F, M, false);
    s.attentional_state = projection(w, F, H);
  }
  if (attention == Attention::kAdditive) {
    s.A = A;
    s.query = projection(w, A, H);
    s.score = w.floats(keep(A, 1.0f).data(), A);
    if (more) s.coverage_weight = w.floats(keep(A, 1.0f).data(), A);
  }
  if (attention == Attention::kDot) s.A = H;
  if (s.A > 0) model->memory_keys = projection(w, s.A, M);
  if (attention == Attention::kLocation) s.location = projection(w, S + 2, E + H);
  for (int64_t l = 0; l < layers; ++l) {
    RecurrentLayer layer;
    layer.cell = cell;
    layer.input = projection(w, gates * H, l == 0 ? E : H);
    if (l == 0 && E >= V) layer.token_gates = token_gates(s.embedding, gates * H, E);
    if (l == 0 || (l == 1 && attends)) layer.context = projection(w, gates * H, F, false);
    layer.hidden = projection(w, gates * H, H);
    model->layers.push_back(layer);
  }
  Batch batch{B, S, lengths_of(B, S), V, 6, tolerance_of(format), {}};
  const Numbers h = random_floats(B * layers * H), memory = random_floats(B * S * M);
  batch.begin = [=](int64_t first, int64_t count, int64_t rows, int threads) {
    auto decoder = std::make_unique<RecurrentDecoder>(model);
    const auto part = [&](const Numbers& all, int64_t size) {
      return Numbers(all.begin() + first * size, all.begin() + (first + count) * size);
    };
    const Numbers own = part(memory, S * M), context = part(memory, M);
    Numbers states;  // [layer][sentence][H], of h sentence by sentence
    for (int64_t l = 0; l < layers; ++l) {
      for (int64_t b = first; b < first + count; ++b) {
        const auto from = h.begin() + (b * layers + l) * H;
        states.insert(states.end(), from, from + H);
      }
    }
    kept.push_back(own);  // the decoder reads it as long as it lives
    const bool lstm = cell == rnn::Cell::kLstm;
    const Encoded encoded{count,
                          attends ? S : 0,
                          states.data(),
                          lstm ? states.data() : nullptr,
                          attends ? nullptr : context.data(),
                          attends ? kept.back().data() : nullptr,
                          batch.lengths.data() + first};
    for (int turn = 0; turn < 2; ++turn) decoder->begin(encoded, rows, batch.limit, threads);
    by_memory += decoder->products_by_memory();
    const int64_t readers = F != M ? 1 : attends ? std::min<int64_t>(layers, 2) + 1 : 1;
    by_context += readers - decoder->products_by_memory();
    return decoder;
  };
  return batch;
}

void test_decoders() {
  constexpr rnn::Cell kCells[] = {rnn::Cell::kLstm, rnn::Cell::kGru, rnn::Cell::kTanh};
  constexpr Attention kKinds[] = {Attention::kNone, Attention::kAdditive, Attention::kDot,
                                  Attention::kLocation};
  for (const Format format : {Format::kFloat32, Format::kBfloat16, Format::kInt8}) {
    const auto both = [](const Batch& batch) {
      for (const int threads : {1, 3}) {
        test_rows(batch, threads);
        test_whole(batch, threads);
      }
      kept.clear();
    };
    for (const bool norm_first : {false, true}) {
      both(transformer(format, norm_first, 1, 1, 1, 1, 1, 1, 5));
      both(transformer(format, norm_first, 4, 19, 3, 13, 37, 70, 67));
    }
    both(transformer(format, true, 5, 6, 2, 32, 80, 600, 300));  // large enough for a team
    for (const rnn::Cell cell : kCells) {
      for (const Attention kind : kKinds) {
        both(recurrent(format, cell, kind, 1, 1, 1, 1, 1, 1, 1, 5));
        both(recurrent(format, cell, kind, 3, 4, 19, 7, 21, 35, 18, 67));
        if (kind != Attention::kAdditive && kind != Attention::kDot) continue;
        both(recurrent(format, cell, kind, 1, 1, 1, 1, 1, 1, 1, 5, true));
        both(recurrent(format, cell, kind, 3, 4, 19, 7, 21, 35, 18, 67, true));
      }
    }
    both(recurrent(format, rnn::Cell::kGru, Attention::kAdditive, 2, 5, 9, 40, 90, 70, 50, 300));
    both(recurrent(format, rnn::Cell::kGru, Attention::kLocation, 1, 3, 4, 40, 21, 70, 50, 35));
    both(recurrent(format, rnn::Cell::kLstm, Attention::kDot, 2, 3, 4, 40, 90, 70, 50, 40));
  }
}

// This program once more, for one instruction set: the choice is made once in a process.
void run_for(const char* isa) {
  setenv("ENCDEC_FAST_ISA", isa, 1);
  char path[4096] = {};
  CHECK(readlink("/proc/self/exe", path, sizeof(path) - 1) > 0);
  char* const arguments[] = {path, nullptr};
  pid_t child = 0;
  int status = -1;
  CHECK_EQ(posix_spawn(&child, path, nullptr, nullptr, arguments, environ), 0);
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
}

}  // namespace

void run_tests() {
  mallopt(M_PERTURB, 0x80);  // fresh bytes are 0x7f: floats of 3e38
  const char* const forced = std::getenv("ENCDEC_FAST_ISA");
  if (forced == nullptr || *forced == '\0') {
    for (const Isa isa : kAllIsas) {
      if (isa_supported(isa)) run_for(isa_name(isa));
    }
    return;
  }
  for (const int threads : {1, 3}) test_search(threads);
  test_decoders();
  CHECK(by_memory > 100 && by_context > 100);
}
