// Rows of any length in sixteens, the last one filled up with zeros.
#pragma once

#include <algorithm>
#include <cmath>

#include "rows.h"

namespace dlcore::DLCORE_ISA {

// Calls f(i, sixteen, place): `sixteen(p)` loads entries i to i + 15 of a row, `place(p, x)` stores them.
template <class T, class F>
inline void each_sixteen(int64_t columns, F f) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes)
    f(i, [i](const T* p) { return load(p + i); }, [i](T* p, const Floats& x) { store_as(p + i, x); });
  if (i == columns) return;
  const size_t bytes = static_cast<size_t>(columns - i) * sizeof(T);
  f(
      i,
      [=](const T* p) {
        T lanes[kLanes] = {};
        std::memcpy(lanes, p + i, bytes);
        return load(lanes);
      },
      [=](T* p, const Floats& x) {
        T lanes[kLanes];
        store_as(lanes, x);
        std::memcpy(p + i, lanes, bytes);
      });
}

// a / b, and 0 where b is 0.
inline double over(double a, double b) { return b == 0 ? 0 : a / b; }

// Whether a float's sum of squares has its digits: nothing overflowed, and nothing that counts underflowed.
inline bool holds(double square) { return square > 1e-30 && square < 1e30; }

// A factor for x and the square of the length that x then has, for x of any length: 1, unless its `square` in
// float is no good, else a power of two that brings the largest entry next to 1. Zero has square 0.
struct Sized {
  float factor = 1;
  double square;

  template <class T>
  Sized(double square_in_float, const T* x, int64_t columns) : square(square_in_float) {
    if (holds(square)) return;
    float largest = 0;
    for (int64_t i = 0; i < columns; ++i) largest = std::max(largest, std::fabs(scalar(x[i])));
    // 2^±126 are normal floats; the smallest entry times that is one, too.
    if (largest > 0 && std::isfinite(largest))
      factor = std::ldexp(1.0f, std::clamp(-std::ilogb(largest), -126, 126));
    square = 0;
    for (int64_t i = 0; i < columns; ++i) {
      const double entry = static_cast<double>(scalar(x[i])) * factor;
      square += entry * entry;
    }
  }
};

// A unit vector at right angles to x, as `along` x plus `spike` at entry `at`: from the axis that x is
// farthest from. Where x is zero, that axis.
struct Perpendicular {
  int64_t at = 0;
  double along = 0, spike = 1;

  template <class T>
  Perpendicular(const T* x, int64_t columns, double square) {
    float smallest = std::fabs(scalar(x[0]));
    for (int64_t i = 1; i < columns; ++i) {
      const float size = std::fabs(scalar(x[i]));
      if (!(size < smallest)) continue;
      smallest = size;
      at = i;
    }
    if (!(square > 0)) return;
    const double entry = scalar(x[at]);
    spike = 1 / std::sqrt(1 - entry * entry / square);
    along = -entry / square * spike;
  }
};

}  // namespace dlcore::DLCORE_ISA
