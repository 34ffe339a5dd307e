// The uniform-state NELBO on the CPU.
#pragma once

#include "../common/uniform.h"

namespace dlcore {

// loss (rows), nats.
void finish_nelbo(const double* saved, int64_t rows, int64_t vocab, const int64_t* z, const int64_t* x,
                  PerRow<double> alpha, PerRow<double> dalpha, float* loss);

}  // namespace dlcore
