// Stream v1's draws in double, a pair at a time: what rng gives, rounded once. (csrc/cpu/doubles.h makes its
// normals a register at a time, csrc/cuda/normals.h by way of fewer instructions.)
#pragma once

#include <cmath>
#include <limits>

#include "philox.h"

namespace dlcore {

enum class Noise : int { kUniform = 0, kGumbel = 1, kNormal = 2 };

namespace wide {

struct Pair {
  double even, odd;
};

// 64 bits as a number in (0, 1].
DLCORE_HD inline double unit(uint64_t b) { return high_word(b) * 0x1p-32 + (low_word(b) + 0.5) * 0x1p-64; }

// -log1p(-u); where u is large, 1 - u comes from the complemented bits.
DLCORE_HD inline double exponential(uint64_t b) {
  return b >> 63 ? -std::log(unit(~b)) : -std::log1p(-unit(b));
}

// Normals 2i and 2i + 1, by Box-Muller: draw 2i is the radius, 2i + 1 the angle.
DLCORE_HD inline Pair normals(uint64_t even, uint64_t odd) {
  const double radius = std::sqrt(2 * exponential(even)), turn = 2 * uniform(odd);
  constexpr double kPi = 3.14159265358979323846;
  return {radius * std::cos(kPi * turn), radius * std::sin(kPi * turn)};
}

// Draws 2i and 2i + 1 of block i.
DLCORE_HD inline Pair draw(Noise noise, const Block& b) {
  const uint64_t even = bits(b, 0), odd = bits(b, 1);
  if (noise == Noise::kUniform) return {uniform(even), uniform(odd)};
  if (noise == Noise::kGumbel) return {-std::log(exponential(even)), -std::log(exponential(odd))};
  return normals(even, odd);
}

// A uniform number that rounds up to 1 becomes the largest one below it.
template <class T>
DLCORE_HD T rounded(Noise noise, double x) {
  const auto r = static_cast<T>(x);
  return noise == Noise::kUniform && r >= 1 ? 1 - std::numeric_limits<T>::epsilon() / 2 : r;
}

}  // namespace wide
}  // namespace dlcore
