// What the sphere's maps and draws ask of a row's vectors beside sums in float. A row has, of its k-th
// vector, entry(k, i), largest(k), the largest size of an entry, and smallest(k), the first entry of the
// smallest size; and sum(f), the sum of f(i) over all entries i in double.
#pragma once

#include <algorithm>
#include <cmath>

#include "philox.h"

namespace dlcore::sphere {

// a·b + c, rounded once; csrc/cpu/simd.h has it for many lanes.
DLCORE_HD inline float fused(float a, float b, float c) { return fmaf(a, b, c); }

// Devices take angles in half turns: the way to bring any other into range needs a stack.
DLCORE_HD inline double sine_of(double x) {
#if defined(__CUDA_ARCH__)
  return sinpi(x * 0.31830988618379067);
#else
  return std::sin(x);
#endif
}
DLCORE_HD inline double cosine_of(double x) {
#if defined(__CUDA_ARCH__)
  return cospi(x * 0.31830988618379067);
#else
  return std::cos(x);
#endif
}

// a / b, and 0 where b is 0.
DLCORE_HD inline double over(double a, double b) { return b == 0 ? 0 : a / b; }

// Whether a float's sum of squares has its digits: nothing overflowed, and nothing that counts underflowed.
DLCORE_HD inline bool holds(double square) { return square > 1e-30 && square < 1e30; }

// A power of two that brings an entry of this size, the largest of a vector, next to 1.
DLCORE_HD inline float power_below_inverse(float largest) {
  if (!(largest > 0 && std::isfinite(largest))) return 1;
  // 2^±126 are normal floats; the smallest entry times that is one, too.
  return std::ldexp(1.0f, std::clamp(-std::ilogb(largest), -126, 126));
}

// A factor for vector k and the square of the length that it then has, for any length: 1, unless its `square`
// in float is no good, else a power of two that brings the largest entry next to 1. Zero has square 0.
struct Sized {
  float factor = 1;
  double square;

  template <class R>
  DLCORE_HD Sized(double square_in_float, const R& row, int k) : square(square_in_float) {
    if (holds(square)) return;
    factor = power_below_inverse(row.largest(k));
    square = row.sum([&](int64_t i) {
      const double entry = static_cast<double>(row.entry(k, i)) * factor;
      return entry * entry;
    });
  }
};

// A unit vector at right angles to vector k, as `along` times it plus `spike` at entry `at`: from the axis
// that it is farthest from. Where it is zero, that axis.
struct Perpendicular {
  int64_t at;
  double along = 0, spike = 1;

  template <class R>
  DLCORE_HD Perpendicular(const R& row, int k, double square) : at(row.smallest(k)) {
    if (!(square > 0)) return;
    const double entry = row.entry(k, at);
    spike = 1 / std::sqrt(1 - entry * entry / square);
    along = -entry / square * spike;
  }
};

}  // namespace dlcore::sphere
