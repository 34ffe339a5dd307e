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
[[gnu::always_inline]] inline Lanes<FloatPart, N> log(const Lanes<FloatPart, N>& x) {
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
template <int N>
inline Lanes<FloatPart, N> to_float(const Lanes<WordPart, N>& x) {
#if defined(__AVX512F__)
  return each([](WordPart v) { return (FloatPart)_mm512_maskz_cvtepu32_ps(0xFFFF, (__m512i)v); }, x);
#else
  const auto convert = [](WordPart v) { return __builtin_convertvector((IntPart)v, FloatPart); };
  return fused(each(convert, x >> 16), 65536.0f, each(convert, x & 0xFFFFu));
#endif
}

// The 64 bits high·2^32 + low as a number in (0, 1].
template <int N>
inline Lanes<FloatPart, N> unit(const Lanes<WordPart, N>& high, const Lanes<WordPart, N>& low) {
  return fused(to_float(high), 0x1p-32f, (to_float(low) + 0.5f) * 0x1p-64f);
}

// -log1p(-u) for 64 bits u, without loss at either end.
template <int N>
[[gnu::always_inline]] inline Lanes<FloatPart, N> exponential(const Lanes<WordPart, N>& high,
                                                              const Lanes<WordPart, N>& low) {
  // The lesser of u and 1 - u: the latter from the complemented bits.
  const auto large = each([](WordPart h) { return (WordPart)((IntPart)h >> 31); }, high);
  const auto lesser = unit(high ^ large, low ^ large);
  // 1 - u, where it is the greater rounded, with its rounding given back below.
  const auto small = each([](WordPart h) { return ((IntPart)h) >= 0; }, high);
  const auto w = select(small, 1.0f - lesser, lesser);
  const auto residual = select(small, (1.0f - w) - lesser, 0.0f);
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

// The words of blocks [first, first + 16): draw 2i has (low, high) of `even` in lane i, draw 2i + 1 those of
// `odd`.
template <class W>
struct BlocksOf {
  W even_low, even_high, odd_low, odd_high;
};
using Blocks = BlocksOf<Words>;

// Half i of a key's words, moved on by a sum of Weyl steps: of one word for all lanes, or of one each.
inline WidePart scheduled(uint32_t word, uint32_t steps, int, bool) { return WidePart{} + (word + steps); }
template <int N>
inline WidePart scheduled(const SpreadWords<N>& words, uint32_t steps, int i, bool odd) {
  return (odd ? words.odd[i] : words.even[i]) + steps;
}

// Philox on the words of counters, under keys k0 and k1.
template <int N, class K>
[[gnu::always_inline]] inline BlocksOf<SpreadWords<N>> philox(SpreadWords<N> c0, SpreadWords<N> c1,
                                                              SpreadWords<N> c2, SpreadWords<N> c3,
                                                              const K& k0, const K& k1) {
  const auto mix = [](WidePart& a0, WidePart& a1, WidePart& a2, WidePart& a3, WidePart b0, WidePart b1) {
    const WidePart p0 = multiply_even(a0, kPhiloxMultiplier0), p1 = multiply_even(a2, kPhiloxMultiplier1);
    a0 = exclusive_or(p1 >> 32, a1, b0);
    a1 = p1;
    a2 = exclusive_or(p0 >> 32, a3, b1);
    a3 = p0;
  };
#pragma GCC unroll 10
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t steps0 = round * kPhiloxWeyl0, steps1 = round * kPhiloxWeyl1;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      mix(c0.even[i], c1.even[i], c2.even[i], c3.even[i], scheduled(k0, steps0, i, false),
          scheduled(k1, steps1, i, false));
      mix(c0.odd[i], c1.odd[i], c2.odd[i], c3.odd[i], scheduled(k0, steps0, i, true),
          scheduled(k1, steps1, i, true));
    }
  }
  return {c0, c1, c2, c3};
}

// N parts of blocks whose numbers end in low, low + 1, ...; `upper` is their domain_word.
template <int N = kParts>
[[gnu::always_inline]] inline BlocksOf<SpreadWords<N>> spread_blocks(Key key, uint32_t upper, uint32_t low) {
  const auto seed = static_cast<uint64_t>(key.seed), offset = static_cast<uint64_t>(key.offset);
  return philox(spread_words(lane_ids<N>() + low), same_words<N>(upper), same_words<N>(low_word(offset)),
                same_words<N>(high_word(offset)), low_word(seed), high_word(seed));
}

template <int N = kParts>
[[gnu::always_inline]] inline BlocksOf<Lanes<WordPart, N>> blocks(Key key, uint32_t upper, uint32_t low) {
  const auto b = spread_blocks<N>(key, upper, low);
  return {gathered(b.even_low), gathered(b.even_high), gathered(b.odd_low), gathered(b.odd_high)};
}

inline Blocks blocks(Key key, Domain domain, int64_t first) {
  return blocks(key, domain_word(domain, first), low_word(static_cast<uint64_t>(first)));
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
