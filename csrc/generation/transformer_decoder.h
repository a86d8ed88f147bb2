// A Transformer decoder for a search: its weights, shared by all searches, and the caches of one.
#pragma once

#include <memory>
#include <vector>

#include "generation/decoder.h"
#include "generation/packed_weights.h"
#include "generation/shortlist.h"

namespace encdec::generation {

struct TransformerModel {
  explicit TransformerModel(Format format) : weights(format) {}

  PackedWeights weights;
  TransformerStep step;  // sizes, tables, norms, output
  std::vector<TransformerLayer> layers;
  std::vector<Projection> memory;  // of each layer to keys, then to values
};

class TransformerDecoder : public Decoder {
 public:
  explicit TransformerDecoder(std::shared_ptr<const TransformerModel> model);

  // A batch: memory (B, S, M), contiguous, lengths [B] from 0 to S; targets of at most
  // `limit` tokens, in at most `rows` rows at a time. Throws std::bad_alloc.
  void begin(const float* memory, int64_t B, int64_t S, const int64_t* lengths, int64_t rows,
             int64_t limit, int threads);

  int64_t vocabulary() const override { return model_->step.V; }
  int64_t attention_size() const override { return step_.S; }
  int64_t source_length(int64_t b) const override { return lengths_[static_cast<size_t>(b)]; }
  void step(const StepRows& rows, const StepScores& scores) override;
  bool scans() const override { return true; }
  bool restricts() const override { return shortlist_ != nullptr; }
  // The tokens that searches may write from the next `begin` on; null: all.
  void restrict(std::shared_ptr<const Shortlist> shortlist);

 private:
  void project_memory(const float* memory, int64_t B, int64_t S, int threads);
  int64_t kept_bytes() const { return element_bytes(kept_format(step_.format)); }

  const std::shared_ptr<const TransformerModel> model_;
  std::shared_ptr<const Shortlist> shortlist_;
  TransformerStep step_;
  std::vector<TransformerLayer> layers_;
  std::vector<int64_t> lengths_;
  AlignedBuffer memory_, work_, memory_work_;
  std::vector<AlignedBuffer> cache_;  // of each position
  std::vector<char*> positions_;
  std::vector<int32_t> ancestors_, ancestors_before_;
};

}  // namespace encdec::generation
