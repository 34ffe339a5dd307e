// exp, log and Gumbel noise on sixteen lanes.
#pragma once

#include <cmath>

#include "../common/philox.h"
#include "simd.h"

namespace dlcore::DLCORE_ISA {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kExponentFloor = -125.0f;
constexpr float kExponentCeiling = 126.0f;

// 2^f for f in [-1/2, 1/2]. (Inlined always, as is what calls it: GCC gives up in large units, and a call
// would pass its registers through memory.)
template <int N>
[[gnu::always_inline]] inline Lanes<FloatPart, N> exp2_fraction(const Lanes<FloatPart, N>& f) {
  auto p = fused(f, 0x1.5bba14p-10f, 0x1.3cea88p-7f);
  p = fused(p, f, 0x1.c6b752p-5f);
  p = fused(p, f, 0x1.ebf9bcp-3f);
  p = fused(p, f, 0x1.62e42ap-1f);
  return fused(p, f, 1.0f);
}

// 2^y for y in [-125, 126], relative error 2^-23; NaN stays NaN.
template <int N>
[[gnu::always_inline]] inline Lanes<FloatPart, N> exp2(const Lanes<FloatPart, N>& y) {
  const auto n = each([](FloatPart v) { return Exponent(v); }, y);
  const auto f = y - each([](Exponent e) { return e.value(); }, n);
  return each([](Exponent e, FloatPart v) { return e.scale(v); }, n, exp2_fraction(f));
}

// 1 / x for x in [1, 2^125], relative error 2^-22: a first guess from the exponent, squared three times. A
// division takes several times as long, and estimates in hardware differ between ISA levels.
template <int N>
inline Lanes<FloatPart, N> reciprocal(const Lanes<FloatPart, N>& x) {
  auto r = floats_of(each([](WordPart b) { return 0x7EF311C7u - b; }, words_of(x)));
  for (int step = 0; step < 3; ++step) r = fused(r, 1.0f - x * r, r);
  return r;
}

// 1 / x, correctly rounded.
template <int N>
[[gnu::always_inline]] inline Lanes<FloatPart, N> inverse(const Lanes<FloatPart, N>& x) {
  return 1.0f / x;
}

// e^-x for |x| <= 86, relative error 2^-22, and as of the nearer end elsewhere.
template <int N>
[[gnu::always_inline]] inline Lanes<FloatPart, N> exp_minus(const Lanes<FloatPart, N>& x) {
  const auto y = clamped(x, 86.0f);
  const auto n = each([](FloatPart v) { return Exponent(v); }, y * -kLog2E);
  // -y·log2(e) less n, with the digits of log2(e) that a float lacks.
  auto f = fused(y, -kLog2E, each([](Exponent e) { return -e.value(); }, n));
  f = fused(y, -0x1.4ae0cp-26f, f);
  return each([](Exponent e, FloatPart v) { return e.scale(v); }, n, exp2_fraction(f));
}

// log(x) for positive normal x, relative error 2^-22 also next to 1.
template <int N>
inline Lanes<FloatPart, N> log(const Lanes<FloatPart, N>& x) {
  const auto bits = words_of(x);
  // The exponent of x / sqrt(1/2), so that the mantissa falls in [sqrt(1/2), sqrt(2)).
  const auto exponent = each([](WordPart b) { return ((IntPart)(b - 0x3f3504f3u)) >> 23; }, bits);
  const auto e = each([](IntPart v) { return __builtin_convertvector(v, FloatPart); }, exponent);
  const auto scaled = each([](WordPart b, IntPart v) { return b - ((WordPart)v << 23); }, bits, exponent);
  const auto f = floats_of(scaled) - 1.0f;
  const auto square = f * f;
  auto p = fused(f, -0x1.38b5a6p-4f, 0x1.055b72p-3f);
  p = fused(p, f, -0x1.0d853ep-3f);
  p = fused(p, f, 0x1.22da1cp-3f);
  p = fused(p, f, -0x1.547244p-3f);
  p = fused(p, f, 0x1.99a008p-3f);
  p = fused(p, f, -0x1.000226p-2f);
  p = fused(p, f, 0x1.555554p-2f);
  // ln 2 in two parts: the first has zeros enough for its product with e to be exact.
  const auto tail = fused(p * f, square, fused(e, -2.12194440e-4f, square * -0.5f));
  return fused(e, 0.693359375f, f + tail);
}

// log1p(x) for x >= 0: the rounding of 1 + x is given back to first order.
template <int N>
inline Lanes<FloatPart, N> log1p(const Lanes<FloatPart, N>& x) {
  const auto w = x + 1.0f;
  return log(w) + (x - (w - 1.0f)) / w;
}

// Unsigned words to float, rounded once: both halves convert exactly.
inline Floats to_float(const Words& x) {
#if defined(__AVX512F__)
  return each([](WordPart v) { return (FloatPart)_mm512_maskz_cvtepu32_ps(0xFFFF, (__m512i)v); }, x);
#else
  const auto convert = [](WordPart v) { return __builtin_convertvector((IntPart)v, FloatPart); };
  return fused(each(convert, x >> 16), 65536.0f, each(convert, x & 0xFFFFu));
#endif
}

// The 64 bits high·2^32 + low as a number in (0, 1].
inline Floats unit(const Words& high, const Words& low) {
  return fused(to_float(high), 0x1p-32f, (to_float(low) + 0.5f) * 0x1p-64f);
}

// -log1p(-u) for 64 bits u, without loss at either end.
inline Floats exponential(const Words& high, const Words& low) {
  // The lesser of u and 1 - u: the latter from the complemented bits.
  const Words large = each([](WordPart h) { return (WordPart)((IntPart)h >> 31); }, high);
  const Floats lesser = unit(high ^ large, low ^ large);
  // 1 - u, where it is the greater rounded, with its rounding given back below.
  const Mask small = each([](WordPart h) { return ((IntPart)h) >= 0; }, high);
  const Floats w = select(small, 1.0f - lesser, lesser);
  const Floats residual = select(small, (1.0f - w) - lesser, 0.0f);
  return 0.0f - fused(residual, 2.0f - w, log(w));
}

// -log(-log1p(-u)) for 64 bits u; u -> 0 is the winning tail, up to 45.
inline Floats gumbel(const Words& high, const Words& low) { return 0.0f - log(exponential(high, low)); }

// exp(x·inverse_temperature - logsumexp), times a scale. The reference that x is held against is rounded to
// float; the rest comes back as a factor, so that a common offset of the logits costs no digits.
struct Probability {
  float reference, slope, factor;
  explicit Probability(double logsumexp, double scale = 1, float inverse_temperature = 1)
      : reference(static_cast<float>(logsumexp / inverse_temperature)),
        slope(inverse_temperature * kLog2E),
        factor(static_cast<float>(
            scale * std::exp(static_cast<double>(reference) * inverse_temperature - logsumexp))) {}
  template <int N>
  Lanes<FloatPart, N> operator()(const Lanes<FloatPart, N>& x) const {
    return exp2(max(kExponentFloor, (x - reference) * slope)) * factor;
  }
};

// The words of blocks [first, first + 16) of a domain: draw 2i has (low, high) of `even` in lane i, draw 2i +
// 1 those of `odd`.
struct Blocks {
  Words even_low, even_high, odd_low, odd_high;
};

inline Blocks blocks(Key key, Domain domain, int64_t first) {
  const auto seed = static_cast<uint64_t>(key.seed), offset = static_cast<uint64_t>(key.offset);
  SpreadWords c0 = spread_words(lane_ids() + broadcast(low_word(static_cast<uint64_t>(first))));
  SpreadWords c1 = spread_words(broadcast(domain_word(domain, first)));
  SpreadWords c2 = spread_words(broadcast(low_word(offset))), c3 = spread_words(broadcast(high_word(offset)));
  uint32_t k0 = low_word(seed), k1 = high_word(seed);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const SpreadWords p0 = multiply(c0, kPhiloxMultiplier0), p1 = multiply(c2, kPhiloxMultiplier1);
    const auto mixed = [](const SpreadWords& product, const SpreadWords& word, uint32_t key) {
      const WidePart same = WidePart{} + key;
      return each_half([same](WidePart p, WidePart w) { return exclusive_or(p >> 32, w, same); }, product,
                       word);
    };
    c0 = mixed(p1, c1, k0);
    c1 = p1;
    c2 = mixed(p0, c3, k1);
    c3 = p0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {gathered(c0), gathered(c1), gathered(c2), gathered(c3)};
}

// The 32 draws of blocks [first, first + 16): even draws in lanes of `even`, odd ones of `odd`.
struct GumbelPair {
  Floats even, odd;
};

inline GumbelPair gumbel_blocks(Key key, Domain domain, int64_t first) {
  const Blocks b = blocks(key, domain, first);
  return {gumbel(b.even_high, b.even_low), gumbel(b.odd_high, b.odd_low)};
}

// Draws [first, first + count) of a domain; first is even, `out` has room for whole blocks of 32.
inline void fill_gumbel(Key key, Domain domain, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    const GumbelPair pair = gumbel_blocks(key, domain, (first + i) / 2);
    store_interleaved(out + i, pair.even, pair.odd);
  }
}

}  // namespace dlcore::DLCORE_ISA
