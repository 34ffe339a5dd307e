// Numbers as bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace dlcore {

DLCORE_HD inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

DLCORE_HD inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

DLCORE_HD inline float fused(float a, float b, float c) { return fmaf(a, b, c); }

}  // namespace dlcore
