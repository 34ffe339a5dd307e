// Normal numbers of stream v1 in double, a register at a time. Compiled once per ISA level.
#include <algorithm>

#include "kernels.h"
#include "parallel.h"
#include "vector_math.h"

namespace dlcore::DLCORE_ISA {
namespace {

constexpr int kWideLanes = kPartBytes / 8;
typedef double DoublePart __attribute__((vector_size(kPartBytes)));
typedef int64_t LongPart __attribute__((vector_size(kPartBytes)));

DoublePart all(double x) { return x - DoublePart{}; }

DoublePart fused(DoublePart a, DoublePart b, DoublePart c) {
#if defined(__AVX512F__)
  return (DoublePart)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (DoublePart)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

DoublePart root(DoublePart x) {
#if defined(__AVX512F__)
  return (DoublePart)_mm512_maskz_sqrt_pd(0xFF, (__m512d)x);
#elif defined(__AVX2__)
  return (DoublePart)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
  return (DoublePart)_mm_sqrt_pd((__m128d)x);
#else
  for (int i = 0; i < kWideLanes; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

// Integers below 2^52, exactly.
DoublePart number(WidePart x) { return (DoublePart)(x | 0x4330000000000000u) - 0x1p52; }

// c[0] + c[1]·x + ...
template <int n>
DoublePart series(DoublePart x, const double (&c)[n]) {
  DoublePart sum = all(c[n - 1]);
  for (int i = n - 2; i >= 0; --i) sum = fused(sum, x, all(c[i]));
  return sum;
}

// log(x) for positive normal x. With a mantissa 1 + f in [√½, √2) and s = f / (2 + f), log(1 + f) is
// 2·artanh(s) = f - s·(f - rest).
DoublePart log(DoublePart x) {
  constexpr double kArtanh[] = {2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9,  2.0 / 11,
                                2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21};
  // ln 2 in two parts: the first has zeros enough for its product with an exponent to be exact.
  constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  const WidePart bits = (WidePart)x;
  const LongPart exponent = (LongPart)(bits - 0x3FE6A09E667F3BCDu) >> 52;
  const DoublePart f = (DoublePart)(bits - ((WidePart)exponent << 52)) - 1.0;
  const DoublePart e = number((WidePart)(exponent + 4096)) - 4096.0;
  const DoublePart s = f / (f + 2.0), square = s * s, rest = square * series(square, kArtanh);
  return fused(e, all(kLn2High), f + fused(s, rest - f, e * kLn2Low));
}

// -log1p(-u) for u = (high·2^32 + low + ½) / 2^64: from the lesser of u and 1 - u, the latter's bits the
// complement.
DoublePart exponential(WidePart high, WidePart low) {
  const LongPart large = -(LongPart)(high >> 31);
  const auto word = [large](WidePart x) { return number((x ^ (WidePart)large) & 0xFFFFFFFFu); };
  const DoublePart lesser = word(high) * 0x1p-32 + (word(low) + 0.5) * 0x1p-64, greater = 1.0 - lesser;
  // What `greater` was rounded by is given back.
  const DoublePart lost = large ? all(0.0) : (1.0 - greater) - lesser;
  const DoublePart w = large ? lesser : greater;
  return -fused(lost, 2.0 - w, log(w));
}

struct Pair {
  DoublePart cosine, sine;
};

// The cosine and sine of 2π·u for the 53-bit `uniform` u: series on an eighth of the circle either side of
// the nearest quarter.
Pair circle(WidePart high, WidePart low) {
  constexpr double kSine[] = {1.0,
                              -1.0 / 6,
                              1.0 / 120,
                              -1.0 / 5040,
                              1.0 / 362880,
                              -1.0 / 39916800,
                              1.0 / 6.2270208e9,
                              -1.0 / 1.307674368e12,
                              1.0 / 3.55687428096e14};
  constexpr double kCosine[] = {1.0,
                                -1.0 / 2,
                                1.0 / 24,
                                -1.0 / 720,
                                1.0 / 40320,
                                -1.0 / 3628800,
                                1.0 / 4.790016e8,
                                -1.0 / 8.71782912e10,
                                1.0 / 2.0922789888e13};
  constexpr double kHalfPi = 1.57079632679489661923;
  const WidePart quarter = (high + 0x20000000u) >> 30;
  const DoublePart turn = (number(high) * 0x1p-30 - number(quarter)) + (number(low >> 11) + 0.5) * 0x1p-51;
  const DoublePart angle = turn * kHalfPi, square = angle * angle;
  const DoublePart s = angle * series(square, kSine), c = series(square, kCosine);
  const auto swapped = (LongPart)((quarter & 1u) != 0);
  const auto signed_by = [](DoublePart x, WidePart q) { return (DoublePart)((WidePart)x ^ (q & 2u) << 62); };
  return {signed_by(swapped ? s : c, quarter + 1u), signed_by(swapped ? c : s, quarter)};
}

// Normals 0 to 31 of blocks [first, first + 16), by Box-Muller: draw 2i is the radius, 2i + 1 the angle of
// normals 2i and 2i + 1.
void normals(Key key, int64_t first, double* out) {
  const Blocks b = blocks(key, Domain::kElement, first);
  const SpreadWords words[] = {spread_words(b.even_high), spread_words(b.even_low), spread_words(b.odd_high),
                               spread_words(b.odd_low)};
  for (int i = 0; i < kParts; ++i)
    for (int odd = 0; odd < 2; ++odd) {
      const auto word = [&](int k) { return (odd ? words[k].odd[i] : words[k].even[i]) & 0xFFFFFFFFu; };
      const DoublePart radius = root(exponential(word(0), word(1)) * 2.0);
      const Pair p = circle(word(2), word(3));
      double cosines[kWideLanes], sines[kWideLanes];
      const DoublePart even_draws = radius * p.cosine, odd_draws = radius * p.sine;
      std::memcpy(cosines, &even_draws, sizeof cosines);
      std::memcpy(sines, &odd_draws, sizeof sines);
      for (int lane = 0; lane < kWideLanes; ++lane) {
        double* to = out + 2 * (i * kPartLanes + 2 * lane + odd);
        to[0] = cosines[lane];
        to[1] = sines[lane];
      }
    }
}

template <class T>
void fill(const NormalArguments& a, T* out) {
  constexpr int64_t chunk = 4096, at_once = 2 * kLanes;
  const int64_t chunks = (a.count + chunk - 1) / chunk;
  parallel_for(a.key_count * chunks, a.threads, [&](int64_t i) {
    const int64_t k = i / chunks, begin = i % chunks * chunk, end = std::min(begin + chunk, a.count);
    for (int64_t j = begin; j < end; j += at_once) {
      double drawn[at_once];
      normals({a.keys[2 * k], a.keys[2 * k + 1]}, j / 2, drawn);
      std::transform(drawn, drawn + std::min(at_once, end - j), out + k * a.count + j,
                     [](double x) { return static_cast<T>(x); });
    }
  });
}

}  // namespace

void normal(const NormalArguments& a) {
  if (a.wide) return fill(a, static_cast<double*>(a.out));
  fill(a, static_cast<float*>(a.out));
}

}  // namespace dlcore::DLCORE_ISA
