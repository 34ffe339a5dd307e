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

// Vectors of a row, entry by entry, as csrc/common/sphere_rows.h asks for them.
template <class T, int N>
struct Entries {
  const T* vector[N];
  int64_t columns;

  float entry(int k, int64_t i) const { return scalar(vector[k][i]); }
  float largest(int k) const {
    float found = 0;
    for (int64_t i = 0; i < columns; ++i) found = std::max(found, std::fabs(entry(k, i)));
    return found;
  }
  int64_t smallest(int k) const {
    int64_t at = 0;
    float least = std::fabs(entry(k, 0));
    for (int64_t i = 1; i < columns; ++i) {
      const float size = std::fabs(entry(k, i));
      if (!(size < least)) continue;
      least = size;
      at = i;
    }
    return at;
  }
  template <class F>
  double sum(F f) const {
    double total = 0;
    for (int64_t i = 0; i < columns; ++i) total += f(i);
    return total;
  }
};

}  // namespace dlcore::DLCORE_ISA
