// Keyed noise on CUDA devices. All pointers are a device's; nothing here waits for it.
#pragma once

#include <cuda_runtime.h>

#include "../common/noise_wide.h"

namespace dlcore::cuda {

// out (key_count, count) of double if `wide`, else float; keys (key_count, 2).
void fill_noise(Noise noise, const int64_t* keys, int64_t key_count, int64_t count, bool wide, void* out,
                cudaStream_t);

// out (count, 2) from keys and data that lie so far apart.
void fold_in(const int64_t* keys, int64_t key_stride, const int64_t* data, int64_t data_stride, int64_t count,
             int64_t* out, cudaStream_t);

}  // namespace dlcore::cuda
