// A row of scores, as it comes: the logarithm of the sum of their exponentials, and the largest.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/math.h"
#include "core/rows.h"
#include "generation/kernels.h"

namespace encdec::generation {
namespace ENCDEC_ISA_NAMESPACE {

using namespace encdec::ENCDEC_ISA_NAMESPACE;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Numbers in falling order; of equal ones the first that came.
struct Largest {
  float* numbers = nullptr;
  int32_t* places = nullptr;
  int64_t room = 0;
  int64_t count = 0;

  // What a number must be above to be taken.
  float least() const {
    return room == 0 ? -kMinusInfinity : count < room ? kMinusInfinity : numbers[room - 1];
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

// Each lane has a sum of its own, in units of e^top, top the largest number that it saw.
struct RowScan {
  Largest largest;
  Float tops = set1(kMinusInfinity);
  Float sums = zero();

  // The next numbers of the row: n of them, the first at place `first`, or each at its of `places`.
  void take(const float* piece, int64_t n, int64_t first, const int32_t* places = nullptr) {
    const int64_t whole = n / kLanes * kLanes;
    alignas(64) float rest[kLanes];  // what is left of a row that does not end with a vector
    Float high = set1(kMinusInfinity);
    // With the variable first NaN is passed over; the sum below finds it.
    if (whole < n) {
      std::fill_n(rest, kLanes, kMinusInfinity);
      std::copy(piece + whole, piece + n, rest);
      high = max(load(rest), high);
    }
    for (int64_t i = 0; i < whole; i += kLanes) high = max(load(piece + i), high);
    raise(max(tops, high));
    const Float shift = shift_of(tops);
    Float sum = whole < n ? exp(sub(load(rest), shift)) : zero();  // not in memory meanwhile
    for (int64_t i = 0; i < whole; i += kLanes) sum = add(sum, exp(sub(load(piece + i), shift)));
    sums = add(sums, sum);
    if (!any_not_le(high, set1(largest.least()))) return;
    if (places) {
      find(piece, n, whole, [&](int64_t i) { return places[i]; });
    } else {
      find(piece, n, whole, [&](int64_t i) { return static_cast<int32_t>(first + i); });
    }
  }

  // What was found in later numbers of the same row.
  void join(const RowScan& later) {
    raise(max(tops, later.tops));
    sums = fma(later.sums, exp(sub(later.tops, shift_of(tops))), sums);
    for (int64_t i = 0; i < later.largest.count; ++i) {
      largest.take(later.largest.numbers[i], later.largest.places[i]);
    }
  }

  void put(int64_t row, const RowScans& to) const {
    const float top = reduce_max(tops);
    const float sum = reduce_add(mul(sums, exp(sub(tops, shift_of(set1(top))))));
    to.log_sums[row] = top == kMinusInfinity && !std::isnan(sum) ? 0.0f : top + std::log(sum);
    to.counts[row] = static_cast<int32_t>(largest.count);
  }

 private:
  // What numbers are reduced by: the difference of two -infinities would be NaN. That of two
  // +infinities is, and so the sum.
  static Float shift_of(Float tops) {
    return max(tops, set1(std::numeric_limits<float>::lowest()));
  }

  void raise(Float high) {
    sums = mul(sums, exp(sub(tops, shift_of(high))));
    tops = high;
  }

  template <class PlaceOf>
  void find(const float* piece, int64_t n, int64_t whole, const PlaceOf& place_of) {
    for (int64_t i = 0; i < whole; i += kLanes) {
      uint32_t larger = lanes_not_le(load(piece + i), set1(largest.least()));
      for (; larger != 0; larger &= larger - 1) {
        const int64_t at = i + __builtin_ctz(larger);
        largest.take(piece[at], place_of(at));
      }
    }
    for (int64_t i = whole; i < n; ++i) largest.take(piece[i], place_of(i));
  }
};

// Empty, with row `row` of the lists of `scans` for its own.
inline RowScan row_scan(const RowScans& scans, int64_t row) {
  RowScan scan;
  scan.largest = {scans.numbers + row * scans.kept, scans.places + row * scans.kept, scans.kept};
  return scan;
}

inline void scan_row(const float* row, int64_t size, const RowScans& scans) {
  constexpr int64_t kPiece = 1024;  // it is read twice, from L1
  RowScan scan = row_scan(scans, 0);
  for (int64_t i = 0; i < size; i += kPiece) scan.take(row + i, std::min(kPiece, size - i), i);
  scan.put(0, scans);
}

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::generation
