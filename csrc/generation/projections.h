// What both decoders do when a batch begins.
#pragma once

#include "core/memory.h"
#include "generation/kernels.h"

namespace encdec::generation {

// Below so many multiply-adds a step is over before a second thread has come.
constexpr int64_t kTeamProducts = 200'000;

// Throws std::bad_alloc.
void grow(AlignedBuffer& buffer, int64_t bytes);

// to = x W' + b, for rows of floats that lie one behind the other; those of `to` are to_stride
// floats apart.
void project(const Projection& p, Format format, const float* x, int64_t rows, int threads,
             AlignedBuffer& work, float* to, int64_t to_stride);

}  // namespace encdec::generation
