// Normal numbers in double, to a few units in the last place: what csrc/cpu/doubles.h makes a register at a
// time, by way of as few instructions as a GPU can.
#pragma once

#include <cmath>
#include <cstring>

#include "../common/noise_wide.h"

namespace dlcore::cuda {

__device__ inline uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

__device__ inline double double_of(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

__device__ inline double double_of(uint32_t high, uint32_t low) {
  return double_of(static_cast<uint64_t>(high) << 32 | low);
}

// 1 / x and 1 / √x to 20 bits.
__device__ inline double inverse_about(double x) {
#if defined(__CUDA_ARCH__)
  double r;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(x));
  return r;
#else
  return 1 / static_cast<float>(x);
#endif
}
__device__ inline double inverse_root_about(double x) {
#if defined(__CUDA_ARCH__)
  double r;
  asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(x));
  return r;
#else
  return 1 / sqrtf(static_cast<float>(x));
#endif
}

// -4·artanh(s)/s, sin(½πg)/g and cos(½πg) of the squares of s up to 0.1717 and g up to ½: their Chebyshev
// interpolants, to 2^-52; the highest power first. In a device's constants an instruction finds them by
// itself.
static __constant__ double kArtanh[] = {-0x1.58e186aaa2517p-2, -0x1.73222e42b7993p-2, -0x1.c722d43b2bbb2p-2,
                                        -0x1.249240ab9cb6ep-1, -0x1.999999a449295p-1, -0x1.5555555552cf5p+0,
                                        -0x1.0000000000001p+2};
static __constant__ double kSine[] = {0x1.e3f38399551bfp-25, -0x1.e30071afc3e59p-19, 0x1.50782fda12d96p-13,
                                      -0x1.32d2cce2e5b19p-8, 0x1.466bc677587f8p-4,   -0x1.4abbce625be41p-1,
                                      0x1.921fb54442d18p+0};
static __constant__ double kCosine[] = {0x1.f3dbcea61b1a4p-22,
                                        -0x1.a6c9c1be9eb49p-16,
                                        0x1.e1f4fb60281f6p-11,
                                        -0x1.55d3c7dbfd139p-6,
                                        0x1.03c1f081b0780p-2,
                                        -0x1.3bd3cc9be458bp+0,
                                        1.0};

template <int N>
__device__ double series(double x, const double (&c)[N]) {
  double sum = c[0];
#pragma unroll
  for (int i = 1; i < N; ++i) sum = fma(sum, x, c[i]);
  return sum;
}

// 64 bits as a number in (0, 1]: the words are the last bits of numbers that start at 2^20 and 2^-12.
__device__ inline double unit(uint32_t high, uint32_t low) {
  return (double_of(0x41300000u, high) - 0x1p20) + (double_of(0x3F300000u, low) - (0x1p-12 - 0x1p-65));
}

// √(-2 log1p(-u)): with 1 - u = 2^e·(1 + f) and s = f / (2 + f), log(1 + f) is 2·artanh(s).
__device__ inline double radius(uint32_t high, uint32_t low) {
  // Below 1 - √½ e is 0 and f = -u; above, 1 - u comes from the complemented bits.
  const bool near = high < 0x4AFB0CCDu;
  const uint32_t flip = near ? 0 : ~0u;
  const double u = unit(high ^ flip, low ^ flip);
  const uint64_t bits = bits_of(u);
  const int32_t e = near ? 0 : static_cast<int32_t>(high_word(bits) - 0x3FE6A09Eu) >> 20;
  const double m = double_of(high_word(bits) - (static_cast<uint32_t>(e) << 20), low_word(bits));
  const double f = near ? -u : m - 1, d = 2 + f,
               exponent = double_of(0x43300000u, 0x80000000u ^ e) - 0x1.000008p52;
  // Of what an inverse lacks its series is added.
  const double inverse = inverse_about(d), lack = fma(-d, inverse, 1.0), about = f * inverse;
  const double s = fma(about, fma(lack, lack, lack), about);
  const double artanh = series(s * s, kArtanh);
  const double square = fma(s, artanh, exponent * -0x1.62e42fefa39efp+0);
  const double inverse_root = inverse_root_about(square), root = square * inverse_root;
  const double left = fma(-root, inverse_root, 1.0);
  return fma(root, left * fma(left, 0.375, 0.5), root);
}

// Normals 2i and 2i + 1 by Box-Muller: draw 2i is the radius, 2i + 1, of which 53 bits and a half count, the
// angle. Polynomials on an eighth of the circle either side of the nearest multiple of a quarter.
__device__ inline wide::Pair normal_pair(const Block& b) {
  const uint64_t turn = static_cast<uint64_t>(b.word[3]) << 32 | (b.word[2] & ~0x7FFu) | 0x400u;
  // The quarter is in its two upper bits: the first is the sine's sign, the second swaps it with the cosine.
  const uint32_t turned = b.word[3] + 0x20000000u;
  const bool swapped = turned & 0x40000000u;
  // 1.5 + g is a number whose last bits are those of g, the share of a quarter.
  const int64_t share = static_cast<int64_t>(turn << 2) >> 12;
  const double g = double_of(0x3FF8000000000000u + static_cast<uint64_t>(share)) - 1.5, q = g * g;
  const double s = g * series(q, kSine), c = series(q, kCosine);
  const auto signed_by = [](double x, uint32_t word) {
    return double_of(bits_of(x) ^ static_cast<uint64_t>(word & 0x80000000u) << 32);
  };
  const double r = radius(b.word[1], b.word[0]);
  return {r * signed_by(swapped ? s : c, turned + 0x40000000u), r * signed_by(swapped ? c : s, turned)};
}

}  // namespace dlcore::cuda
