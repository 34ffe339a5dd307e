// The cosine of a draw to its mean direction, for the von Mises-Fisher and the spherical Cauchy law: (m +
// y)/(1 + my), y the cosine of a uniform point; as it is for the Cauchy law, after Wood's rejection for von
// Mises-Fisher, in a form without κ's large differences.
#pragma once

#include "noise_wide.h"
#include "sphere_rows.h"

namespace dlcore::sphere {

// Each is taken with probability 0.65 or more, so that a row has none with probability 1e-14; it keeps its
// last.
constexpr int kCandidates = 32;

struct Candidate {
  double cosine = 0, sine = 1;
  bool taken = true;
};

class CosineLaw {
 public:
  DLCORE_HD CosineLaw(double kappa, int64_t d, bool reject)
      : q_(static_cast<double>(d - 1)),
        b_(q_ / (2 * kappa + std::sqrt(4 * kappa * kappa + q_ * q_))),
        m_((1 - b_) / (1 + b_)),
        width_(2 * std::sqrt(b_) / (1 + b_)),
        reject_(reject) {}

  // y = t/√(q + t²) for Student's t with q = d - 1 degrees of freedom (Bailey 1994), from draws 4k and 4k +
  // 1; it is taken where the exponential number of draw 4k + 2 exceeds q·(log(1 + s) - s/(1 + s)), s = my.
  DLCORE_HD Candidate candidate(Key key, int k) const {
    const Block first = block(key, Domain::kCosine, 2 * k);
    const double turn = cosine_of(6.283185307179586 * uniform(bits(first, 1)));
    const double square = turn * turn * std::expm1(2 / q_ * wide::exponential(bits(first, 0)));  // t²/q
    const double y = std::copysign(std::sqrt(square / (1 + square)), turn), s = m_ * y;
    const Candidate found{(m_ + y) / (1 + s), width_ / (std::sqrt(1 + square) * (1 + s)), true};
    if (!reject_) return found;
    const Block second = block(key, Domain::kCosine, 2 * k + 1);
    const bool taken = wide::exponential(bits(second, 0)) >= q_ * (std::log1p(s) - s / (1 + s));
    return {found.cosine, found.sine, taken};
  }

 private:
  double q_, b_, m_, width_;  // width² = 1 - m²
  bool reject_;
};

}  // namespace dlcore::sphere
