// Rows of any length in sixteens, the last one filled up with zeros.
#pragma once

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

// One number as an entry of a row.
template <class T>
inline void place(T* p, float x) {
  T lanes[kLanes];
  store_as(lanes, broadcast(x));
  *p = lanes[0];
}

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
