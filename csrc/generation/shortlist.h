// An output layer for some tokens only: their rows of the weight, packed.
#pragma once

#include <memory>

#include "generation/options.h"
#include "generation/packed_weights.h"

namespace encdec::generation {

struct Shortlist {
  // weight: the rows of `tokens`, which rise; bias: likewise, or null; context: likewise, N = 0 for
  // none. Throws std::bad_alloc.
  Shortlist(const Weight& weight, const float* bias, const Weight& context, Tokens own,
            Format format, int threads)
      : weights(format), tokens(std::move(own)) {
    layer.projection = weights.projection(weight, bias, threads);
    if (context.N > 0) layer.context = weights.projection(context, nullptr, threads);
    layer.tokens = tokens.data();
  }
  Shortlist(const Shortlist&) = delete;

  PackedWeights weights;
  const Tokens tokens;
  OutputLayer layer;
};

}  // namespace encdec::generation
