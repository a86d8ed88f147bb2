// The generation engine as Python sees it: models, decoders, search. Tensors come as addresses with
// their sizes; encdec_fast/generation keeps them alive and has checked them.
#include "python/generation.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <optional>

#include "generation/recurrent_decoder.h"
#include "generation/search.h"
#include "generation/transformer_decoder.h"

namespace py = pybind11;

namespace encdec::generation {
namespace {

// A matrix: (address, dtype, rows, columns, elements from row to row); a vector of floats is an
// address alone, 0 for none.
using Matrix = std::tuple<intptr_t, int, int64_t, int64_t, int64_t>;
using Linear = std::pair<Matrix, intptr_t>;  // weight and bias

template <class T>
const T* at(intptr_t address) {
  return reinterpret_cast<const T*>(address);
}

Weight weight_of(const Matrix& m) {
  const auto& [address, dtype, rows, columns, stride] = m;
  return {static_cast<Format>(dtype), at<char>(address), stride, rows, columns};
}

Table table_of(const Matrix& m) {
  const Weight w = weight_of(m);
  return {w.data, w.dtype, w.row_stride * element_bytes(w.dtype), w.N};
}

// The entries of a dict by name; what is missing has a default.
class Fields {
 public:
  Fields(const py::dict& fields, PackedWeights& weights, int threads)
      : fields_(fields), weights_(weights), threads_(threads) {}

  bool has(const char* name) const { return fields_.contains(name); }
  template <class T>
  T get(const char* name, T otherwise) const {
    return has(name) ? fields_[name].cast<T>() : otherwise;
  }
  Projection projection(const char* name) const {
    if (!has(name)) return {};
    const auto [weight, bias] = fields_[name].cast<Linear>();
    return weights_.projection(weight_of(weight), at<float>(bias), threads_);
  }
  // A watched matrix that is read as it lies.
  Table table(const char* name) const {
    if (!has(name)) return {};
    return table_of(fields_[name].cast<Matrix>());
  }
  const float* floats(const char* name, int64_t count) const {
    const intptr_t address = get<intptr_t>(name, 0);
    return address ? weights_.floats(at<float>(address), count) : nullptr;
  }
  // (kind, weight, bias, eps)
  NormWeights norm(const char* name, int64_t size) const {
    if (!has(name)) return {};
    const auto [kind, weight, bias, eps] =
        fields_[name].cast<std::tuple<int, intptr_t, intptr_t, float>>();
    return {static_cast<linear::Norm>(kind), weights_.floats(at<float>(weight), size),
            bias ? weights_.floats(at<float>(bias), size) : nullptr, eps};
  }

 private:
  const py::dict& fields_;
  PackedWeights& weights_;
  const int threads_;
};

void watch(PackedWeights& weights, const std::vector<Matrix>& matrices) {
  for (const Matrix& m : matrices) weights.watch(weight_of(m));
}

std::shared_ptr<TransformerModel> transformer_model(const py::dict& sizes, const py::list& layers,
                                                    const std::vector<Matrix>& watched, int format,
                                                    int threads) {
  auto model = std::make_shared<TransformerModel>(static_cast<Format>(format));
  const Fields f(sizes, model->weights, threads);
  TransformerStep& s = model->step;
  s.format = static_cast<Format>(format);
  s.D = f.get<int64_t>("model_size", 0);
  s.heads = f.get<int64_t>("heads", 1);
  s.head_size = f.get<int64_t>("head_size", 0);
  s.F = f.get<int64_t>("feed_forward_size", 0);
  s.norm_first = f.get("norm_first", false);
  s.activation = static_cast<linear::Activation>(f.get<int>("activation", 1));
  s.attention_scale = f.get("attention_scale", 1.0f);
  s.embedding_scale = f.get("embedding_scale", 1.0f);
  s.output_scale = f.get("output_scale", 1.0f);
  s.embedding = f.table("embedding");
  s.positions = f.table("positions");
  s.position_offset = f.get<int64_t>("position_offset", 0);
  s.embedding_norm = f.norm("embedding_norm", s.D);
  s.final_norm = f.norm("final_norm", s.D);
  s.bias_length = f.get<int64_t>("bias_length", 0);
  s.position_bias = f.floats("position_bias", s.heads * s.bias_length);
  s.output.projection = f.projection("output");
  s.V = s.output.projection.N;
  for (const py::handle& item : layers) {
    const py::dict fields = item.cast<py::dict>();
    const Fields l(fields, model->weights, threads);
    TransformerLayer layer;
    layer.self_norm = l.norm("self_norm", s.D);
    layer.cross_norm = l.norm("cross_norm", s.D);
    layer.feed_norm = l.norm("feed_norm", s.D);
    layer.self_query = l.projection("self_query");
    layer.self_key = l.projection("self_key");
    layer.self_value = l.projection("self_value");
    layer.self_out = l.projection("self_out");
    layer.cross_query = l.projection("cross_query");
    layer.cross_out = l.projection("cross_out");
    layer.up = l.projection("up");
    layer.gate = l.projection("gate");
    layer.down = l.projection("down");
    model->layers.push_back(layer);
    model->memory.push_back(l.projection("memory_key"));
    model->memory.push_back(l.projection("memory_value"));
  }
  watch(model->weights, watched);
  return model;
}

std::shared_ptr<RecurrentModel> recurrent_model(const py::dict& sizes, const py::list& layers,
                                                const std::vector<Matrix>& watched, int format,
                                                int threads) {
  auto model = std::make_shared<RecurrentModel>(static_cast<Format>(format));
  const Fields f(sizes, model->weights, threads);
  RecurrentStep& s = model->step;
  s.format = static_cast<Format>(format);
  s.E = f.get<int64_t>("embedding_size", 0);
  s.H = f.get<int64_t>("hidden_size", 0);
  s.M = f.get<int64_t>("context_size", 0);
  s.F = f.get<int64_t>("fed_size", s.M);
  s.A = f.get<int64_t>("attention_size", 0);
  s.embedding = f.table("embedding");
  s.attention_kind = static_cast<Attention>(f.get<int>("attention", 0));
  s.query = f.projection("query");
  s.score = f.floats("score", s.A);
  s.location = f.projection("location");
  s.attentional = f.projection("attentional");
  s.attentional_state = f.projection("attentional_state");
  s.coverage_weight = f.floats("coverage_weight", s.A);
  s.output.projection = f.projection("output");
  s.output.context = f.projection("output_context");
  s.V = s.output.projection.N;
  model->memory_keys = f.projection("memory_keys");
  for (const py::handle& item : layers) {
    const py::dict fields = item.cast<py::dict>();
    const Fields l(fields, model->weights, threads);
    RecurrentLayer layer;
    layer.cell = static_cast<rnn::Cell>(l.get<int>("cell", 0));
    layer.input = l.projection("input");
    layer.context = l.projection("context");
    layer.hidden = l.projection("hidden");
    layer.token_gates =
        l.floats("token_gates", s.embedding.rows * rnn::gate_count(layer.cell) * s.H);
    model->layers.push_back(layer);
  }
  watch(model->weights, watched);
  return model;
}

std::shared_ptr<Shortlist> shortlist(const Linear& rows, const std::optional<Linear>& context,
                                     Tokens tokens, int format, int threads) {
  return std::make_shared<Shortlist>(weight_of(rows.first), at<float>(rows.second),
                                     context ? weight_of(context->first) : Weight{},
                                     std::move(tokens), static_cast<Format>(format), threads);
}

// A step that Python takes: step(tokens, parents, sentences, position, logits, stride, attention)
// writes to the addresses that it is given.
class PythonDecoder : public Decoder {
 public:
  PythonDecoder(py::function step, int64_t vocabulary, int64_t attention_size,
                std::vector<int64_t> lengths)
      : step_(std::move(step)),
        vocabulary_(vocabulary),
        attention_size_(attention_size),
        lengths_(std::move(lengths)) {}

  int64_t vocabulary() const override { return vocabulary_; }
  int64_t attention_size() const override { return attention_size_; }
  int64_t source_length(int64_t b) const override { return lengths_[static_cast<size_t>(b)]; }
  void step(const StepRows& rows, const StepScores& scores) override {
    const py::gil_scoped_acquire locked;
    const auto list = [&](const int32_t* from) {
      return std::vector<int32_t>(from, from + rows.count);
    };
    step_(list(rows.tokens), list(rows.parents), list(rows.sentences), rows.position,
          reinterpret_cast<intptr_t>(scores.logits), scores.stride,
          reinterpret_cast<intptr_t>(scores.attention));
  }

 private:
  const py::function step_;
  const int64_t vocabulary_, attention_size_;
  const std::vector<int64_t> lengths_;
};

// Passes on what happens to Python, and signals (Ctrl-C) to the search.
class PythonObserver : public Observer {
 public:
  PythonObserver(py::object finished, py::object written)
      : finished_(std::move(finished)), written_(std::move(written)) {}

  bool go_on() override {
    // Taking the lock for each step would cost a small model's step.
    if (++steps_ % 16 != 1) return true;
    const py::gil_scoped_acquire locked;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    return true;
  }
  void finished(int64_t sentence) override {
    if (finished_.is_none()) return;
    const py::gil_scoped_acquire locked;
    finished_(sentence);
  }
  bool streams() const override { return !written_.is_none(); }
  void written(int64_t sentence, const Tokens& tokens) override {
    const py::gil_scoped_acquire locked;
    written_(sentence, tokens);
  }

 private:
  const py::object finished_, written_;
  int64_t steps_ = 0;
};

Options options_of(const py::dict& d) {
  Options o;
  const auto take = [&](const char* name, auto& to) {
    to = d[name].cast<std::remove_reference_t<decltype(to)>>();
  };
  take("beams", o.beams);
  take("returned", o.returned);
  take("length_penalty", o.length_penalty);
  o.early_stopping = static_cast<EarlyStopping>(d["early_stopping"].cast<int>());
  take("coverage_penalty", o.coverage_penalty);
  take("sample", o.sample);
  take("temperature", o.temperature);
  take("top_k", o.top_k);
  take("top_p", o.top_p);
  take("max_length", o.max_length);
  take("max_new", o.max_new);
  take("min_length", o.min_length);
  take("min_new", o.min_new);
  take("max_seconds", o.max_seconds);
  take("repetition_penalty", o.repetition_penalty);
  take("no_repeat_ngram", o.no_repeat_ngram);
  take("prefix_bias", o.prefix_bias);
  take("bad_words", o.bad_words);
  take("suppressed", o.suppressed);
  take("begin_suppressed", o.begin_suppressed);
  take("forced_bos", o.forced_bos);
  take("forced_eos", o.forced_eos);
  take("eos", o.eos);
  take("vocabulary", o.vocabulary);
  return o;
}

// Hypotheses as (tokens, score, log probabilities, attention as bytes).
using Found = std::vector<std::vector<std::tuple<Tokens, float, std::vector<float>, py::bytes>>>;

Found run_search(Decoder& decoder, const std::vector<std::tuple<Tokens, Tokens, int64_t>>& requests,
                 Options options, uint64_t seed, bool need_attention, int threads,
                 py::object finished, py::object written, py::object timing) {
  options.seed = seed;
  options.need_attention = need_attention;
  options.threads = std::max(1, threads);
  std::vector<Request> asked;
  for (const auto& [prompt, prefix, number] : requests) {
    asked.push_back({prompt, prefix, number});
  }
  std::vector<std::vector<Hypothesis>> found;
  Timing times;
  {
    PythonObserver observer(std::move(finished), std::move(written));
    const py::gil_scoped_release unlocked;
    found = search(decoder, asked, options, observer, &times);
  }
  if (!timing.is_none()) {
    timing["steps"] = times.steps;
    timing["rows"] = times.rows;
    timing["decoder_seconds"] = times.decoder_seconds;
    timing["search_seconds"] = times.search_seconds;
  }
  Found result;
  for (std::vector<Hypothesis>& sentence : found) {
    result.emplace_back();
    for (Hypothesis& h : sentence) {
      const py::bytes attention(reinterpret_cast<const char*>(h.attention.data()),
                                h.attention.size() * sizeof(float));
      result.back().emplace_back(std::move(h.tokens), h.score, std::move(h.log_probs), attention);
    }
  }
  return result;
}

}  // namespace

void bind(py::module_& m) {
  py::class_<Options>(m, "Options", "What a search is asked for, from a dict.")
      .def(py::init(&options_of));
  py::class_<TransformerModel, std::shared_ptr<TransformerModel>>(m, "TransformerModel")
      .def(py::init(&transformer_model), py::arg("sizes"), py::arg("layers"), py::arg("watched"),
           py::arg("format"), py::arg("threads"))
      .def("fresh", [](const TransformerModel& t) { return t.weights.fresh(); })
      .def_property_readonly("bytes", [](const TransformerModel& t) { return t.weights.bytes(); });
  py::class_<RecurrentModel, std::shared_ptr<RecurrentModel>>(m, "RecurrentModel")
      .def(py::init(&recurrent_model), py::arg("sizes"), py::arg("layers"), py::arg("watched"),
           py::arg("format"), py::arg("threads"))
      .def("fresh", [](const RecurrentModel& r) { return r.weights.fresh(); })
      .def_property_readonly("bytes", [](const RecurrentModel& r) { return r.weights.bytes(); });
  py::class_<Shortlist, std::shared_ptr<Shortlist>>(m, "Shortlist")
      .def(py::init(&shortlist), py::arg("rows"), py::arg("context"), py::arg("tokens"),
           py::arg("format"), py::arg("threads"))
      .def_property_readonly("bytes", [](const Shortlist& s) { return s.weights.bytes(); });
  py::class_<Decoder>(m, "Decoder");
  py::class_<TransformerDecoder, Decoder>(m, "TransformerDecoder")
      .def(py::init([](std::shared_ptr<TransformerModel> t) {
        return std::make_unique<TransformerDecoder>(std::move(t));
      }))
      .def("restrict", &TransformerDecoder::restrict, py::arg("shortlist").none(true))
      .def(
          "begin",
          [](TransformerDecoder& d, intptr_t memory, int64_t B, int64_t S,
             const std::vector<int64_t>& lengths, int64_t rows, int64_t limit, int threads) {
            const py::gil_scoped_release unlocked;
            d.begin(at<float>(memory), B, S, lengths.data(), rows, limit, threads);
          },
          py::arg("memory"), py::arg("B"), py::arg("S"), py::arg("lengths"), py::arg("rows"),
          py::arg("limit"), py::arg("threads"));
  py::class_<RecurrentDecoder, Decoder>(m, "RecurrentDecoder")
      .def(py::init([](std::shared_ptr<RecurrentModel> r) {
        return std::make_unique<RecurrentDecoder>(std::move(r));
      }))
      .def("restrict", &RecurrentDecoder::restrict, py::arg("shortlist").none(true))
      .def_property_readonly("products_by_memory", &RecurrentDecoder::products_by_memory)
      .def(
          "begin",
          [](RecurrentDecoder& d, int64_t B, int64_t S, intptr_t h, intptr_t c, intptr_t context,
             intptr_t memory, const std::vector<int64_t>& lengths, int64_t rows, int64_t limit,
             int threads) {
            const py::gil_scoped_release unlocked;
            const Encoded encoded{B,
                                  S,
                                  at<float>(h),
                                  at<float>(c),
                                  at<float>(context),
                                  at<float>(memory),
                                  lengths.empty() ? nullptr : lengths.data()};
            d.begin(encoded, rows, limit, threads);
          },
          py::arg("B"), py::arg("S"), py::arg("h"), py::arg("c"), py::arg("context"),
          py::arg("memory"), py::arg("lengths"), py::arg("rows"), py::arg("limit"),
          py::arg("threads"));
  py::class_<PythonDecoder, Decoder>(m, "PythonDecoder")
      .def(py::init<py::function, int64_t, int64_t, std::vector<int64_t>>(), py::arg("step"),
           py::arg("vocabulary"), py::arg("attention_size"), py::arg("lengths"));
  m.def("search", &run_search, py::arg("decoder"), py::arg("requests"), py::arg("options"),
        py::arg("seed"), py::arg("need_attention"), py::arg("threads"), py::arg("finished"),
        py::arg("written"), py::arg("timing"));
}

}  // namespace encdec::generation
