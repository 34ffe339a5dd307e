// Logarithms, powers, circles and exponential noise in double, a register at a time.
#pragma once

#include "vector_math.h"

namespace dlcore::DLCORE_ISA {

constexpr int kWideLanes = kPartBytes / 8;
typedef double DoublePart __attribute__((vector_size(kPartBytes)));
typedef int64_t LongPart __attribute__((vector_size(kPartBytes)));

inline DoublePart all(double x) { return x - DoublePart{}; }

inline DoublePart fused(DoublePart a, DoublePart b, DoublePart c) {
#if defined(__AVX512F__)
  return (DoublePart)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (DoublePart)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

inline DoublePart root(DoublePart x) {
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
inline DoublePart number(WidePart x) { return (DoublePart)(x | 0x4330000000000000u) - 0x1p52; }

// c[0] + c[1]·x + ...
template <int n>
inline DoublePart series(DoublePart x, const double (&c)[n]) {
  DoublePart sum = all(c[n - 1]);
  for (int i = n - 2; i >= 0; --i) sum = fused(sum, x, all(c[i]));
  return sum;
}

// ln 2 in two parts: the first has zeros enough for its product with an exponent to be exact.
constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;

// log(x) for positive normal x. With a mantissa 1 + f in [√½, √2) and s = f / (2 + f), log(1 + f) is
// 2·artanh(s) = f - s·(f - rest).
inline DoublePart log(DoublePart x) {
  constexpr double kArtanh[] = {2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9,  2.0 / 11,
                                2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21};
  const WidePart bits = (WidePart)x;
  const LongPart exponent = (LongPart)(bits - 0x3FE6A09E667F3BCDu) >> 52;
  const DoublePart f = (DoublePart)(bits - ((WidePart)exponent << 52)) - 1.0;
  const DoublePart e = number((WidePart)(exponent + 4096)) - 4096.0;
  const DoublePart s = f / (f + 2.0), square = s * s, rest = square * series(square, kArtanh);
  return fused(e, all(kLn2High), f + fused(s, rest - f, e * kLn2Low));
}

// exp(-x) and 1 - exp(-x) for x in [0, 700], both to the last digits.
struct Decay {
  DoublePart left, gone;
};

inline Decay decay(DoublePart x) {
  constexpr double kExpm1[] = {
      1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,        1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6.2270208e9};
  // Adding 1.5·2^52 rounds to an integer n, which it leaves in the low bits.
  constexpr double kMagic = 0x1.8p52, kInverseLn2 = 1.44269504088896340736;
  const DoublePart rounded = fused(x, all(-kInverseLn2), all(kMagic)), n = rounded - kMagic;
  const DoublePart f = fused(n, all(-kLn2Low), fused(n, all(-kLn2High), -x));
  const DoublePart rest = f * series(f, kExpm1);
  const auto power = (DoublePart)(((WidePart)rounded << 52) + 0x3FF0000000000000u);
  return {fused(power, rest, power), fused(power, -rest, 1.0 - power)};
}

// -log1p(-u) for u = (high·2^32 + low + ½) / 2^64: from the lesser of u and 1 - u, the latter's bits the
// complement.
inline DoublePart exponential(WidePart high, WidePart low) {
  const LongPart large = -(LongPart)(high >> 31);
  const auto word = [large](WidePart x) { return number((x ^ (WidePart)large) & 0xFFFFFFFFu); };
  const DoublePart lesser = word(high) * 0x1p-32 + (word(low) + 0.5) * 0x1p-64, greater = 1.0 - lesser;
  // What `greater` was rounded by is given back.
  const DoublePart lost = large ? all(0.0) : (1.0 - greater) - lesser;
  const DoublePart w = large ? lesser : greater;
  return -fused(lost, 2.0 - w, log(w));
}

struct Circle {
  DoublePart cosine, sine;
};

// The cosine and sine of 2π·u for the 53-bit `uniform` u: series on an eighth of the circle either side of
// the nearest quarter.
inline Circle circle(WidePart high, WidePart low) {
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

}  // namespace dlcore::DLCORE_ISA
