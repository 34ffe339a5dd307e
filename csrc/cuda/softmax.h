// Reading logits as a softmax takes them.
#pragma once

#include "../common/categorical.h"
#include "device.h"

namespace dlcore::cuda {

// cap·tanh(x / cap); +inf, which no row may hold, becomes NaN.
__device__ inline float softcapped(float x, float cap) {
  // tanh(a) = sign(a)·(1 - e)/(1 + e), e = exp(-2|a|); close to 0 its series, where 1 - e cancels.
  const float a = x / cap, size = fabsf(a), e = exp2_fast(size * (-2.0f * kLog2E)), square = size * size;
  float p = fmaf(square, -62.0f / 2835, 17.0f / 315);
  p = fmaf(square, p, -2.0f / 15);
  p = fmaf(square, p, 1.0f / 3);
  const float tanh = size < 0.3f ? size - size * square * p : (1.0f - e) / (1.0f + e);
  if (x == -kNone) return std::numeric_limits<float>::quiet_NaN();
  return copysignf(tanh, a) * cap;
}

// Softmax's parameters for one row.
struct RowSoftmax {
  int64_t index = -1, exclude = -1;
  float shift = 0, inverse_temperature = 1, softcap = 0;
  bool greedy = false;

  __device__ RowSoftmax(const Softmax& softmax, int64_t row)
      : exclude(softmax.exclude), softcap(softmax.softcap) {
    if (softmax.index) index = softmax.index[row];
    if (softmax.shift) shift = softmax.shift[row];
    if (!softmax.temperature) return;
    const float temperature = softmax.temperature[row];
    greedy = temperature == 0;
    if (!greedy) inverse_temperature = 1.0f / temperature;
  }
  // One entry as the softmax takes it, before the temperature.
  __device__ float transform(float x, int64_t token) const {
    if (softcap > 0) x = softcapped(x, softcap);
    if (token == index) x += shift;
    return token == exclude ? kNone : x;
  }
  // Whether one of `count` tokens from `token` on needs transform.
  __device__ bool special(int64_t token, int64_t count) const {
    const auto inside = [=](int64_t id) { return id >= token && id < token + count; };
    return softcap > 0 || (shift != 0 && inside(index)) || inside(exclude);
  }
};

// exp(x·inverse_temperature - logsumexp), times a scale. The reference that x is held against is rounded to
// float; the rest comes back as a factor, so that a common offset of the logits costs no digits.
struct Probability {
  float reference, factor;
  __device__ explicit Probability(double logsumexp, double scale = 1)
      : reference(static_cast<float>(logsumexp)),
        factor(static_cast<float>(scale * exp(static_cast<double>(reference) - logsumexp))) {}
  __device__ float operator()(float x) const { return exp2_fast((x - reference) * kLog2E) * factor; }
};

__device__ inline bool unread(const ScanArguments& a, int64_t r) {
  return (a.skip && a.skip[r]) || (a.target && a.target[r] < 0);
}

}  // namespace dlcore::cuda
