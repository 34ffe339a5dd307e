// The Langevin corrector on the sphere.
#pragma once

#include "../common/view.h"

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

}  // namespace dlcore
