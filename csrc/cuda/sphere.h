// The sphere family on CUDA devices. All pointers are a device's; nothing here waits for it.
#pragma once

#include <cuda_runtime.h>

#include "../common/sphere.h"
#include "../common/sphere_correct.h"

namespace dlcore::cuda {

// As on the CPU, but for threads.
void sphere_map(const SphereMapArguments&, cudaStream_t);
void sphere_sample(const SphereSampleArguments&, cudaStream_t);

// The gradient is of rows of so many entries at most.
constexpr int64_t kMostCorrected = 4096;
void sphere_correct(const SphereCorrectArguments&, cudaStream_t);
void sphere_correct_backward(const SphereCorrectBackwardArguments&, cudaStream_t);

}  // namespace dlcore::cuda
