// Classifier-free guidance of a uniform process: what a draw makes of a row's coefficients and of two
// streams.
//
// A stream's mass is m(y) = α_s·p(y) + (1-α_s)/V. Its logarithm is taken over that of the noise, where there
// is any: log(1 + odds·exp(x - top)) is at least 0 and needs no care. At α_s = 1 it is x - top.
#pragma once

#include <cmath>

#include "categorical.h"
#include "one_lane.h"

namespace dlcore {

struct GuidedStepArguments {
  View cond, uncond;  // (rows, columns), each of its own dtype
  const int64_t* z = nullptr;
  PerRow<double> coefficients;  // stride kGuidedCoefficients or 0
  int64_t exclude = -1;
  Keys keys;
  int64_t* tokens = nullptr;  // (rows)
  int threads = 1;
};

constexpr int kGuidedCoefficients = 6;
// Below any logarithm of a mass, to calculate with in place of -inf, and a bound between the two.
constexpr float kNever = -1e30f, kHardly = -1e29f;

class GuidedRow {
 public:
  GuidedRow() = default;
  // gamma, temperature, shift, alpha_s, bonus, keep. Whatever they hold, what comes out is a number.
  DLCORE_HD GuidedRow(const double* c, int64_t tokens)
      : keeps(c[5] != 0),
        inverse_temperature(static_cast<float>(limited(1 / c[1], 1e-37, 1e37))),
        shift(static_cast<float>(c[2])),
        bonus(static_cast<float>(limited(c[4], -1e30, 1e30))),
        alpha_(limited(c[3], 0, 1)),
        noise_((1 - alpha_) / static_cast<double>(tokens)) {
    const double gamma = limited(c[0], -1e30, 1e30);
    nearer_is_cond_ = gamma >= 0.5;
    weight_ = static_cast<float>(nearer_is_cond_ ? gamma - 1 : gamma);
    never_[0] = gamma == 0 ? -INFINITY : kHardly;
    never_[1] = gamma == 1 ? -INFINITY : kHardly;
    excess_ = static_cast<float>(gamma > 1 ? gamma - 1 : gamma < 0 ? -gamma : 0);
    share_ = static_cast<float>(limited(gamma, 0, 1));
  }

  bool keeps = false;
  float inverse_temperature = 1, shift = 0, bonus = 0;

  // Whether every token is possible.
  DLCORE_HD bool noisy() const { return noise_ > 0; }
  DLCORE_HD bool nearer_is_cond() const { return nearer_is_cond_; }

  // The part of the largest token in a stream whose Σ exp(x - top) is `sum`, over its noise.
  DLCORE_HD float odds(double sum) const { return static_cast<float>(alpha_ / (noise_ * sum)); }

  // The guided logarithm: γ·c + (1-γ)·u, reckoned from the stream of the greater weight, so that γ = 0 and
  // γ = 1 are exact; -inf where a token is impossible.
  template <class L>
  DLCORE_HD L blend(const L& c, const L& u) const {
    const L guided = fused(c - u, weight_, nearer_is_cond_ ? c : u);
    if (noisy()) return guided;
    return select(less(c, never_[0]), -INFINITY, select(less(u, never_[1]), -INFINITY, guided));
  }

  // At least the logarithm of Σ m_c^γ·m_u^(1-γ) over a group, of the logarithms of Σ m_c and Σ m_u and of the
  // nearer stream's largest: for γ in [0, 1] Hölder's inequality; beyond, since no mass is below the noise's,
  // Σ m^γ <= (max m)^(γ-1)·Σ m of one stream.
  template <class L>
  DLCORE_HD L bound(const L& largest, const L& cond, const L& uncond) const {
    return fused(largest, excess_, fused(cond - uncond, share_, uncond));
  }

 private:
  // Of NaN the lower limit.
  DLCORE_HD static double limited(double x, double low, double high) {
    return !(x > low) ? low : x < high ? x : high;
  }

  double alpha_ = 0, noise_ = 0;
  float weight_ = 0, excess_ = 0, share_ = 0, never_[2] = {};
  bool nearer_is_cond_ = false;
};

}  // namespace dlcore
