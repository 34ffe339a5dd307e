// The radial weight of the sphere's paths, as its kernels take it: none for SLERP's, else the vMF path's
// series at each κ.
#pragma once

#include "capi.h"

namespace dlcore::capi {

class RadialWeight {
 public:
  // kappa, for rows of vectors (rows, dim), may be none.
  RadialWeight(PerRow<double> kappa, int64_t rows, int64_t dim);

  Radial get() const { return {{rows_.data(), stride_}, terms_}; }

 private:
  std::vector<float> rows_;
  int64_t stride_ = 0, terms_ = 0;
};

}  // namespace dlcore::capi
