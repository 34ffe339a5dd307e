// Normal noise on sixteen lanes: `rng.normal` of stream v1, in float.
#pragma once

#include "vector_math.h"

namespace dlcore::DLCORE_ISA {

// sin and cos of 2π·(bits / 2^32), absolute error 2^-24: polynomials on an eighth of the circle either side
// of the nearest multiple of a quarter.
template <int N>
struct SineCosine {
  Lanes<FloatPart, N> sine, cosine;
};

template <int N>
[[gnu::always_inline]] inline SineCosine<N> sine_cosine(const Lanes<WordPart, N>& bits) {
  const auto quarter = (bits + 0x20000000u) >> 30;
  const auto g =
      each([](WordPart b) { return __builtin_convertvector((IntPart)(b << 2), FloatPart); }, bits) * 0x1p-32f;
  const auto square = g * g;
  auto s = fused(square, -0x1.2d9b40p-8f, 0x1.465ec4p-4f);
  s = fused(s, square, -0x1.4abbbap-1f);
  s = fused(s, square, 0x1.921fb6p+0f) * g;
  auto c = fused(square, 0x1.db6492p-11f, -0x1.55cb98p-6f);
  c = fused(c, square, 0x1.03c1eap-2f);
  c = fused(c, square, -0x1.3bd3ccp+0f);
  c = fused(c, square, 1.0f);
  const auto swapped = each([](WordPart q) { return (IntPart)((q & 1u) != 0); }, quarter);
  const auto signed_by = [](const auto& x, const auto& q) {
    return floats_of(words_of(x) ^ ((q & 2u) << 30));
  };
  return {signed_by(select(swapped, c, s), quarter), signed_by(select(swapped, s, c), quarter + 1u)};
}

// Draws [first, first + 2·lanes) for N parts, by Box-Muller: draw 2i is the radius, 2i + 1 the angle of
// normals 2i and 2i + 1.
template <int N>
[[gnu::always_inline]] inline void store_normals(Key key, uint32_t upper, uint32_t low, float* out) {
  const auto b = blocks<N>(key, upper, low);
  const auto radius = root(exponential(b.even_high, b.even_low) * 2.0f);
  const auto angle = sine_cosine(b.odd_high);
  store_interleaved(out, radius * angle.cosine, radius * angle.sine);
}

// Draws [first, first + count) of a domain; first is even, no multiple of 2^33 lies between, and `out` has
// room for whole blocks of 32. Before the draws of places [i, i + n), meanwhile(i, n) is called.
template <class F>
inline void fill_normal(Key key, Domain domain, int64_t first, int64_t count, float* out, F meanwhile) {
  constexpr int64_t wide = 2 * kAbreast * kLanes, narrow = 2 * kLanes;
  const uint32_t upper = domain_word(domain, first / 2);
  auto low = low_word(static_cast<uint64_t>(first / 2));
  int64_t i = 0;
  for (; i + wide <= count; i += wide, low += wide / 2) {
    meanwhile(i, wide);
    store_normals<kAbreast * kParts>(key, upper, low, out + i);
  }
  for (; i < count; i += narrow, low += narrow / 2) {
    meanwhile(i, narrow);
    store_normals<kParts>(key, upper, low, out + i);
  }
}

inline void fill_normal(Key key, Domain domain, int64_t first, int64_t count, float* out) {
  fill_normal(key, domain, first, count, out, [](int64_t, int64_t) {});
}

}  // namespace dlcore::DLCORE_ISA
