// Guided draws on CUDA devices.
#pragma once

#include <cuda_runtime.h>

#include "../common/guidance.h"

namespace dlcore::cuda {

// Bytes of workspace that `guided_step` takes for so many rows and columns.
int64_t guided_step_bytes(int64_t rows, int64_t columns);

void guided_step(const GuidedStepArguments&, void* workspace, cudaStream_t);

}  // namespace dlcore::cuda
