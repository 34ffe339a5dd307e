// Stream v1's draws as float32, one at a time: what csrc/cpu/vector_math.h and normal.h do on sixteen lanes.
#pragma once

#include <cmath>

#include "numbers.h"
#include "philox.h"

namespace dlcore {

// log(x) for positive normal x, relative error 2^-22 also next to 1.
DLCORE_HD inline float log_near(float x) {
  const uint32_t bits = bits_of(x);
  // The exponent of x / sqrt(1/2), so that the mantissa falls in [sqrt(1/2), sqrt(2)).
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const auto e = static_cast<float>(exponent);
  const float f = float_of(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f, square = f * f;
  float p = fmaf(f, -0x1.38b5a6p-4f, 0x1.055b72p-3f);
  p = fmaf(p, f, -0x1.0d853ep-3f);
  p = fmaf(p, f, 0x1.22da1cp-3f);
  p = fmaf(p, f, -0x1.547244p-3f);
  p = fmaf(p, f, 0x1.99a008p-3f);
  p = fmaf(p, f, -0x1.000226p-2f);
  p = fmaf(p, f, 0x1.555554p-2f);
  // ln 2 in two parts: the first has zeros enough for its product with e to be exact.
  const float tail = fmaf(p * f, square, fmaf(e, -2.12194440e-4f, square * -0.5f));
  return fmaf(e, 0.693359375f, f + tail);
}

// The 64 bits high·2^32 + low as a number in (0, 1].
DLCORE_HD inline float unit(uint32_t high, uint32_t low) {
  return fmaf(static_cast<float>(high), 0x1p-32f, fmaf(static_cast<float>(low), 0x1p-64f, 0x1p-65f));
}

// The lesser of u and 1 - u for 64 bits u: the latter from the complemented bits.
struct Lesser {
  bool large;  // whether u is the greater
  float value;
  DLCORE_HD explicit Lesser(uint64_t bits) {
    const auto flip = static_cast<uint32_t>(static_cast<int32_t>(high_word(bits)) >> 31);
    large = flip != 0;
    value = unit(high_word(bits) ^ flip, low_word(bits) ^ flip);
  }
};

// -log1p(-u) for 64 bits u, without loss at either end.
DLCORE_HD inline float exponential(uint64_t bits) {
  const Lesser lesser(bits);
  // 1 - u, where it is the greater rounded, with its rounding given back below.
  const float w = lesser.large ? lesser.value : 1.0f - lesser.value;
  const float residual = lesser.large ? 0.0f : (1.0f - w) - lesser.value;
  return -fmaf(residual, 2.0f - w, log_near(w));
}

// log2(x) for normal x; the hardware's on a device, whose error is 2^-22: relative, between ½ and 2 absolute.
DLCORE_HD inline float log2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return log2f(x);
#endif
}

// The same as exponential in half as many operations, good enough for a radius: to 2^-22 where it is below 1,
// relative above, and below 2^-4 relative, too, where its series stands for the logarithm.
DLCORE_HD inline float exponential_fast(uint64_t bits) {
  const Lesser lesser(bits);
  const float u = lesser.value;
  const float series = fmaf(u * u, fmaf(fmaf(fmaf(u, 0.2f, 0.25f), u, 1.0f / 3), u, 0.5f), u);
  const float far = log2_fast(lesser.large ? u : 1.0f - u) * -0.693147181f;
  return !lesser.large && u < 0x1p-4f ? series : far;
}

// -log(-log1p(-u)) for 64 bits u; u -> 0 is the winning tail, up to 45.
DLCORE_HD inline float gumbel(uint64_t bits) { return -log_near(exponential(bits)); }

// Draw i of a domain.
DLCORE_HD inline float gumbel(Key key, Domain domain, int64_t i) {
  const Block b = block(key, domain, i >> 1);
  return gumbel(i & 1 ? bits(b, 1) : bits(b, 0));
}

struct SineCosine1 {
  float sine, cosine;
};

// sin and cos of 2π·(bits / 2^32), absolute error 2^-24: polynomials on an eighth of the circle either side
// of the nearest multiple of a quarter.
DLCORE_HD inline SineCosine1 sine_cosine(uint32_t bits) {
  // The quarter is in its two upper bits: the first is the sine's sign, the second swaps it with the cosine.
  const uint32_t turned = bits + 0x20000000u;
  const bool swapped = turned & 0x40000000u;
  const float g = static_cast<float>(static_cast<int32_t>(bits << 2)) * 0x1p-32f, square = g * g;
  float s = fmaf(square, -0x1.2d9b40p-8f, 0x1.465ec4p-4f);
  s = fmaf(s, square, -0x1.4abbbap-1f);
  s = fmaf(s, square, 0x1.921fb6p+0f) * g;
  float c = fmaf(square, 0x1.db6492p-11f, -0x1.55cb98p-6f);
  c = fmaf(c, square, 0x1.03c1eap-2f);
  c = fmaf(c, square, -0x1.3bd3ccp+0f);
  c = fmaf(c, square, 1.0f);
  const auto signed_by = [](float x, uint32_t word) { return float_of(bits_of(x) ^ (word & 0x80000000u)); };
  return {signed_by(swapped ? c : s, turned), signed_by(swapped ? s : c, turned + 0x40000000u)};
}

// √x for normal x; the hardware's on a device, whose relative error is 2^-23.
DLCORE_HD inline float root(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return sqrtf(x);
#endif
}

// Normals 2i and 2i + 1 of a domain, by Box-Muller: draw 2i is the radius, 2i + 1 the angle.
struct NormalPair {
  float even, odd;
};

DLCORE_HD inline NormalPair normals(Key key, Domain domain, int64_t pair) {
  const Block b = block(key, domain, pair);
  const float radius = root(exponential_fast(bits(b, 0)) * 2.0f);
  const SineCosine1 angle = sine_cosine(high_word(bits(b, 1)));
  return {radius * angle.cosine, radius * angle.sine};
}

// Entries 2i and 2i + 1 of a random direction, before it has length 1.
DLCORE_HD inline NormalPair direction(Key key, int64_t pair) {
  return normals(key, Domain::kDirection, pair);
}

// Entries 2i and 2i + 1 of noise for each element.
DLCORE_HD inline NormalPair element_normals(Key key, int64_t pair) {
  return normals(key, Domain::kElement, pair);
}

}  // namespace dlcore
