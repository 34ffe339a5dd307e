// Numbers of 16 bits, one at a time: what a head's hidden states, biases and gradients are made of.
#pragma once

#include <cstring>

#include "../common/numbers.h"
#include "../common/view.h"

namespace dlcore::capi {

inline float widened(DType dtype, uint16_t half) {
  if (dtype == DType::kBFloat16) return float_of(static_cast<uint32_t>(half) << 16);
  const float magnitude = float_of((half & 0x7FFFu) << 13);
  // 2^112 moves the exponent's bias, and makes subnormals right; infinities and NaN want the top exponent.
  const float size =
      magnitude < 0x1p-96f ? magnitude * 0x1p112f : float_of((half & 0x7FFFu) << 13 | 0x7F800000u);
  return half & 0x8000u ? -size : size;
}

// To the nearest, ties to even.
inline uint16_t narrowed(DType dtype, float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
  const bool nan = size > 0x7F800000u;
  if (dtype == DType::kBFloat16)
    return static_cast<uint16_t>(nan ? 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
  if (nan) return 0x7E00u;
  if (size >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  // Below 2^-14 a half's unit is that of the floats from 1/2 to 1.
  if (size < 0x38800000u)
    return static_cast<uint16_t>(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)));
  return static_cast<uint16_t>(sign | (size - 0x38000000u + 0xFFFu + (size >> 13 & 1u)) >> 13);
}

// `count` numbers as floats.
inline void widen(DType dtype, const char* from, int64_t count, float* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, sizeof half);
    to[i] = widened(dtype, half);
  }
}

// `count` floats as numbers of a dtype.
inline void narrow(DType dtype, const float* from, int64_t count, char* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t half = narrowed(dtype, from[i]);
    std::memcpy(to + 2 * i, &half, sizeof half);
  }
}

}  // namespace dlcore::capi
