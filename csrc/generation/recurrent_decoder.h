// A recurrent decoder for a search: its weights, shared by all searches, and the states of one.
#pragma once

#include <memory>
#include <vector>

#include "generation/decoder.h"
#include "generation/packed_weights.h"
#include "generation/shortlist.h"

namespace encdec::generation {

struct RecurrentModel {
  explicit RecurrentModel(Format format) : weights(format) {}

  PackedWeights weights;
  RecurrentStep step;  // sizes, embedding, attention, output
  std::vector<RecurrentLayer> layers;
  Projection memory_keys;  // N = 0: the memory is its own key
};

// What the encoder left: states [layers][B][H] (c: of an LSTM), context [B][M] that the first step
// reads (null: zeros), memory (B, S, M) and its lengths [B]; all contiguous.
struct Encoded {
  int64_t B = 0, S = 0;
  const float *h = nullptr, *c = nullptr, *context = nullptr;
  const float* memory = nullptr;  // null: none
  const int64_t* lengths = nullptr;
};

class RecurrentDecoder : public Decoder {
 public:
  explicit RecurrentDecoder(std::shared_ptr<const RecurrentModel> model);

  // A batch, in at most `rows` rows at a time and for at most `limit` steps. The memory must live
  // as long as its steps. Throws std::bad_alloc.
  void begin(const Encoded& encoded, int64_t rows, int64_t limit, int threads);

  int64_t vocabulary() const override { return model_->step.V; }
  int64_t attention_size() const override {
    return step_.attention_kind == Attention::kNone ? 0 : step_.S;
  }
  int64_t source_length(int64_t b) const override { return lengths_[static_cast<size_t>(b)]; }
  void step(const StepRows& rows, const StepScores& scores) override;
  bool scans() const override { return true; }
  bool restricts() const override { return shortlist_ != nullptr; }
  // How many products with the context are made by way of the memory (ContextRows).
  int64_t products_by_memory() const;
  // The tokens that searches may write from the next `begin` on; null: all.
  void restrict(std::shared_ptr<const Shortlist> shortlist);

 private:
  struct States {
    AlignedBuffer h, c, context, weights, coverage;
  };
  void start_states(const Encoded& encoded);
  void project_keys(const Encoded& encoded, int threads);
  // Fills in the step's context_rows, where they are worth it.
  void project_contexts(const Encoded& encoded, int64_t limit, int threads);
  const Projection& context_of(int reader) const;
  // The rows that context_rows are made of, without padding.
  void pack_memory(const Encoded& encoded);

  const std::shared_ptr<const RecurrentModel> model_;
  std::shared_ptr<const Shortlist> shortlist_;
  RecurrentStep step_;
  std::vector<int64_t> lengths_;
  States states_[2];
  int before_ = 0;  // which of them the next step reads
  std::vector<int64_t> first_rows_;
  AlignedBuffer keys_, memory_rows_, work_, project_work_, packed_memory_;
  AlignedBuffer context_rows_[kContextReaders];
};

}  // namespace encdec::generation
