// The vocabulary of csrc/cpu/simd.h and vector_math.h for one float: what is a template over lanes runs on
// it, too.
#pragma once

#include "noise.h"

namespace dlcore {

DLCORE_HD inline bool less(float a, float b) { return a < b; }
DLCORE_HD inline float select(bool mask, float yes, float no) { return mask ? yes : no; }
DLCORE_HD inline float magnitude(float x) { return fabsf(x); }

// NaN, where x is.
DLCORE_HD inline float clamped(float x, float limit) {
#if defined(__CUDA_ARCH__)
  float least, result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(x), "f"(limit));
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(least), "f"(-limit));
  return result;
#else
  return x < -limit ? -limit : x > limit ? limit : x;
#endif
}

// 0, where x is less.
DLCORE_HD inline float positive_part(float x) { return x < 0 ? 0 : x; }

// 1 / x for x in [1, 2^125]; the hardware's, whose relative error is 2^-23.
DLCORE_HD inline float inverse(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return 1.0f / x;
#endif
}

// e^-x for |x| <= 86, and as of the nearer end elsewhere. Relative error 2^-22 and, on a device, that of
// rounding x·log2(e).
DLCORE_HD inline float exp_minus(float x) {
  const float y = clamped(x, 86.0f) * -1.44269504f;
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(y));
  return e;
#else
  return exp2f(y);
#endif
}

// log1p(x) for x >= 0: the rounding of 1 + x is given back to first order.
DLCORE_HD inline float log1p(float x) {
  const float w = x + 1.0f;
  return log_near(w) + (x - (w - 1.0f)) * inverse(w);
}

}  // namespace dlcore
