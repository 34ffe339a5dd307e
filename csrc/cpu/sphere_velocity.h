// Vocabulary drifts on the sphere: the weights softmax·g(cosine) of a tile, their gradients, and the largest
// logits of a row.
#pragma once

#include <cstdint>

#include "../common/view.h"

namespace dlcore {

// The radial weight g. Without rows: ω / sin ω. Else the vMF path's at each row's κ: rows of m, 1 - m, a
// scale, and `terms` Chebyshev coefficients each of the sum and of its derivative.
struct Radial {
  PerRow<float> rows;
  int64_t terms = 0;
};

// cosines (rows, columns) <- exp(logits - reference)·g(cosines).
struct SphereWeightsArguments {
  View logits;
  const double* reference = nullptr;  // (rows)
  Radial radial;
  float* cosines = nullptr;
  int threads = 1;
};

// With p = exp(logits - logsumexp), c the cosines and h the pulls: cosines <- p·g(c), pulls <- p·g'(c)·h and
// out <- p·(g(c)·h - mean).
struct SphereVelocityBackwardArguments {
  View logits;
  const double* logsumexp = nullptr;  // (rows)
  const float* mean = nullptr;        // (rows)
  Radial radial;
  float* cosines = nullptr;
  float* pulls = nullptr;
  View out;
  int threads = 1;
};

// The `count` largest logits so far of every row, in descending order, ties in ascending order of their ids.
struct LargestArguments {
  View logits;
  int64_t first_token = 0;
  int64_t count = 0;
  float* values = nullptr;  // (rows, count); NaN in front once the row holds NaN or +inf
  int64_t* ids = nullptr;   // (rows, count)
  int threads = 1;
};

}  // namespace dlcore
