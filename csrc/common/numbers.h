// Numbers as bits.
#pragma once

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

}  // namespace dlcore
