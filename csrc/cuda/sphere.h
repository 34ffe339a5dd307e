// The sphere family on CUDA devices. All pointers are a device's; nothing here waits for it.
#pragma once

#include <cuda_runtime.h>

#include "../common/sphere.h"

namespace dlcore::cuda {

// As on the CPU, but for threads.
void sphere_map(const SphereMapArguments&, cudaStream_t);
void sphere_sample(const SphereSampleArguments&, cudaStream_t);

}  // namespace dlcore::cuda
