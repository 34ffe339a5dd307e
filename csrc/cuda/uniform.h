// The uniform-state NELBO on CUDA devices.
#pragma once

#include <cuda_runtime.h>

#include "../common/uniform.h"

namespace dlcore::cuda {

// The first three of `saved`, from a scan's state, and zeros in the other two.
void start_nelbo(const Summary* state, int64_t rows, double* saved, cudaStream_t);

int64_t nelbo_bytes(int64_t rows, int64_t columns);

// Adds a tile's sums to `saved`. (It scans nothing.)
void nelbo(const NelboArguments&, void* workspace, cudaStream_t);

// loss (rows), nats.
void finish_nelbo(const double* saved, int64_t rows, int64_t vocab, const int64_t* z, const int64_t* x,
                  PerRow<double> alpha, PerRow<double> dalpha, float* loss, cudaStream_t);

void nelbo_backward(const NelboBackwardArguments&, cudaStream_t);

}  // namespace dlcore::cuda
