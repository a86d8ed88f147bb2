// An output layer for some tokens only: their rows of the weight, packed.
#pragma once

#include <memory>

#include "generation/options.h"
#include "generation/packed_weights.h"

namespace encdec::generation {

struct Shortlist {
  // weight: the rows of `tokens`, which rise. bias: likewise, or null. Throws std::bad_alloc.
  Shortlist(const Weight& weight, const float* bias, Tokens own, Format format, int threads)
      : weights(format), tokens(std::move(own)) {
    layer = {weights.projection(weight, bias, threads), tokens.data()};
  }
  Shortlist(const Shortlist&) = delete;

  PackedWeights weights;
  const Tokens tokens;
  OutputLayer layer;
};

}  // namespace encdec::generation
