// A row of scores: the logarithm of the sum of their exponentials, and the largest of them.
#pragma once

#include <cmath>
#include <limits>

#include "core/math.h"
#include "core/rows.h"

namespace encdec::generation {
namespace ENCDEC_ISA_NAMESPACE {

using namespace encdec::ENCDEC_ISA_NAMESPACE;

// Numbers in falling order; of equal ones the first that came.
struct Largest {
  float* numbers;
  int32_t* places;
  int64_t room;
  int64_t count = 0;

  float least() const {
    return count < room ? -std::numeric_limits<float>::infinity() : numbers[room - 1];
  }
  void take(float number, int32_t place) {
    if (!(number > least())) return;
    int64_t at = count < room ? count++ : room - 1;
    for (; at > 0 && numbers[at - 1] < number; --at) {
      numbers[at] = numbers[at - 1];
      places[at] = places[at - 1];
    }
    numbers[at] = number;
    places[at] = place;
  }
};

inline float scan_row(const float* row, int64_t size, int64_t kept, float* numbers, int32_t* places,
                      int64_t* found) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int64_t whole = size / kLanes * kLanes;
  Float tops = set1(-kInfinity);
  // With the variable first NaN is passed over; the sum below finds it.
  for (int64_t i = 0; i < whole; i += kLanes) tops = max(load(row + i), tops);
  float top = reduce_max(tops);
  for (int64_t i = whole; i < size; ++i) top = row[i] > top ? row[i] : top;
  *found = 0;
  if (top == kInfinity) return std::numeric_limits<float>::quiet_NaN();
  const bool none = top == -kInfinity;  // nothing is possible, unless there is NaN
  if (none) top = 0.0f;
  Largest largest{numbers, places, kept};
  const Float shift = set1(top);
  Float sum = zero(), least = set1(-kInfinity);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Float x = load(row + i);
    sum = add(sum, exp(sub(x, shift)));
    if (kept > 0 && any_not_le(x, least)) {
      for (int l = 0; l < kLanes; ++l) largest.take(row[i + l], static_cast<int32_t>(i + l));
      least = set1(largest.least());
    }
  }
  float total = reduce_add(sum);
  for (int64_t i = whole; i < size; ++i) {
    total += std::exp(row[i] - top);
    if (kept > 0) largest.take(row[i], static_cast<int32_t>(i));
  }
  *found = largest.count;
  if (none && !std::isnan(total)) return 0.0f;
  return top + std::log(total);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::generation
