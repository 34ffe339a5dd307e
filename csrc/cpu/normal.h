// Normal noise on sixteen lanes: `rng.normal` of stream v1, in float.
#pragma once

#include "vector_math.h"

namespace dlcore::DLCORE_ISA {

// sin and cos of 2π·(bits / 2^32), absolute error 2^-24: polynomials on an eighth of the circle either side
// of the nearest multiple of a quarter.
struct SineCosine {
  Floats sine, cosine;
};

inline SineCosine sine_cosine(const Words& bits) {
  const Words quarter = (bits + broadcast(0x20000000u)) >> 30;
  const Floats g =
      each([](WordPart b) { return __builtin_convertvector((IntPart)(b << 2), FloatPart); }, bits) * 0x1p-32f;
  const Floats square = g * g;
  Floats s = fused(square, -0x1.2d9b40p-8f, 0x1.465ec4p-4f);
  s = fused(s, square, -0x1.4abbbap-1f);
  s = fused(s, square, 0x1.921fb6p+0f) * g;
  Floats c = fused(square, 0x1.db6492p-11f, -0x1.55cb98p-6f);
  c = fused(c, square, 0x1.03c1eap-2f);
  c = fused(c, square, -0x1.3bd3ccp+0f);
  c = fused(c, square, 1.0f);
  const Mask swapped = each([](WordPart q) { return (IntPart)((q & 1u) != 0); }, quarter);
  const auto signed_by = [](const Floats& x, const Words& q) {
    return floats_of(words_of(x) ^ ((q & 2u) << 30));
  };
  return {signed_by(select(swapped, c, s), quarter),
          signed_by(select(swapped, s, c), quarter + broadcast(1u))};
}

// The 32 normals of blocks [first, first + 16), by Box-Muller: draw 2i is the radius, 2i + 1 the angle of
// normals 2i (lane i of `even`) and 2i + 1 (`odd`).
struct NoisePair {
  Floats even, odd;
};

inline NoisePair normal_blocks(Key key, Domain domain, int64_t first) {
  const Blocks b = blocks(key, domain, first);
  const Floats radius = root(exponential(b.even_high, b.even_low) * 2.0f);
  const SineCosine angle = sine_cosine(b.odd_high);
  return {radius * angle.cosine, radius * angle.sine};
}

// Draws [first, first + count) of a domain; first is even, `out` has room for whole blocks of 32.
inline void fill_normal(Key key, Domain domain, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    const NoisePair pair = normal_blocks(key, domain, (first + i) / 2);
    store_interleaved(out + i, pair.even, pair.odd);
  }
}

}  // namespace dlcore::DLCORE_ISA
