// What the kernels of bits are given of a row's noise levels: numbers made in double, rounded once.
#pragma once

#include <cmath>

#include "bits.h"

namespace dlcore {

// Each has `count` numbers a row, out[0], out[apart] ..., the same ones for all rows if `shared`.

// The matched filter's logit per unit of x.
struct BitSlopes {
  PerRow<double> sigma;
  double range;  // high - low

  static constexpr int count = 1;
  bool shared() const { return sigma.stride == 0; }
  DLCORE_HD static double slope(double range, double sigma) {
    // Of the variance: x exactly between the two bits has logit 0 at sigma = 0 too.
    constexpr double kLeast = 1e-12;
    const double variance = sigma * sigma;
    return range / (variance > kLeast ? variance : kLeast);
  }
  DLCORE_HD void operator()(int64_t r, float* out, int64_t) const {
    out[0] = static_cast<float>(slope(range, sigma[r]));
  }
};

// Slope, ratio of the levels, and spread of the noise that churns the result.
struct BitStepNumbers {
  PerRow<double> sigma, sigma_next;
  PerRow<double> gamma, scale;  // none: no noise, 1.003
  double range;

  static constexpr int count = 3;
  bool shared() const {
    return sigma.stride == 0 && sigma_next.stride == 0 && (!gamma || gamma.stride == 0) &&
           (!scale || scale.stride == 0);
  }
  DLCORE_HD double ratio(int64_t r) const { return sigma_next[r] / sigma[r]; }
  DLCORE_HD double spread(int64_t r) const {
    if (!gamma) return 0;
    const double noise = scale ? scale[r] : 1.003;
    return noise * sigma_next[r] * std::sqrt(gamma[r] * (2 + gamma[r]));
  }
  DLCORE_HD void operator()(int64_t r, float* out, int64_t apart) const {
    out[0] = static_cast<float>(BitSlopes::slope(range, sigma[r]));
    out[apart] = static_cast<float>(ratio(r));
    out[2 * apart] = static_cast<float>(spread(r));
  }
};

struct BitSpreads {
  PerRow<double> spread;

  static constexpr int count = 1;
  bool shared() const { return spread.stride == 0; }
  DLCORE_HD void operator()(int64_t r, float* out, int64_t) const { out[0] = static_cast<float>(spread[r]); }
};

// The gradient of a row's sum from that of its mean.
struct BitMeanGrads {
  const float* grad;
  int64_t columns;

  static constexpr int count = 1;
  bool shared() const { return false; }
  DLCORE_HD void operator()(int64_t r, float* out, int64_t) const {
    out[0] = grad[r] / static_cast<float>(columns);
  }
};

}  // namespace dlcore
