// The Langevin corrector on the sphere: x moves to the normalised decay·x + by_score·score + spread·(noise
// across x), for numbers that follow from the step's length.
#pragma once

#include <cmath>

#include "view.h"

namespace dlcore {

// out = normalize(e^{-a} x + ((1 - e^{-a}) score + sqrt((d-1)(1 - e^{-2a})) P_x noise)/(d-1)) with
// a = (d-1)·step_size; all three of one dtype.
struct SphereCorrectArguments {
  View x, score;
  PerRow<double> step_size;
  Keys keys;
  View out;
  int threads = 1;
};

// Gradients, with the noise drawn anew: x's and score's of their dtype, step_size's (rows).
struct SphereCorrectBackwardArguments {
  SphereCorrectArguments forward;
  View grad, x_grad, score_grad;
  double* step_grad = nullptr;
};

namespace sphere {

struct Correction {
  double decay, by_score, spread;

  // For q = d - 1.
  DLCORE_HD Correction(double q, double step_size) {
    const double length = q * step_size;
    spread = std::sqrt(-std::expm1(-2 * length) / q);
    by_score = -std::expm1(-length) / q;
    decay = std::exp(-length);
  }
};

}  // namespace sphere
}  // namespace dlcore
