// The unit sphere: maps of its points and tangent vectors, and draws of its laws.
#pragma once

#include "view.h"

namespace dlcore {

// What a map takes: normalize (x), project (x, u), angle, slerp and log (x, y), exp (x, v), rotate (x,
// source, target), step and its cheap kin retract (x, v; both forward alone).
enum class SphereMap : int {
  kNormalize = 0,
  kProject = 1,
  kAngle = 2,
  kSlerp = 3,
  kLog = 4,
  kExp = 5,
  kRotate = 6,
  kStep = 7,
  kRetract = 8
};

constexpr int kSphereInputs = 3;

// Every vector has the dtype of the first input. An output without data is not wanted.
struct SphereMapArguments {
  SphereMap map = SphereMap::kNormalize;
  bool backward = false;
  View inputs[kSphereInputs];
  PerRow<float> t;                    // slerp, step, retract
  View grad;                          // backward, but for angle
  const float* grad_angle = nullptr;  // backward of angle, (rows)
  View outputs[kSphereInputs];        // the result, or a gradient per input
  float* number = nullptr;            // (rows): angle, or the gradient of t
  int threads = 1;
};

struct SphereSampleArguments {
  View mean;
  PerRow<double> kappa;
  Keys keys;
  bool reject = true;  // von Mises-Fisher; without rejection the spherical Cauchy law
  View out;
  int threads = 1;
};

}  // namespace dlcore
