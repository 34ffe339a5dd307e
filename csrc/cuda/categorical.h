// The categorical family on CUDA devices. All pointers are a device's; nothing here waits for it.
#pragma once

#include <cuda_runtime.h>

#include "../common/categorical.h"

namespace dlcore::cuda {

// Bytes of workspace that a scan of so many rows and columns takes.
int64_t scan_bytes(int64_t rows, int64_t columns);

// As on the CPU, but for what it does not take: cuts, threads.
void scan(const ScanArguments&, void* workspace, cudaStream_t);

// As csrc/common/categorical_finish.h has them, for all rows.
void finish_stats(const Summary* state, int64_t rows, int64_t* argmax, float* numbers, cudaStream_t);
void finish_sample(const Summary* state, int64_t rows, int64_t* tokens, float* numbers, cudaStream_t);
void finish_log_probs(const Summary* state, PerRow<int64_t> target, bool with_index, int64_t rows,
                      double* numbers, cudaStream_t);
void finish_kl(const KLSummary* state, int64_t rows, double* numbers, cudaStream_t);
void plan_mixture(const MixtureArguments&, uint8_t* skip, cudaStream_t);
void finish_mixture(const MixtureArguments&, const Summary* state, const uint8_t* skip, int64_t* tokens,
                    cudaStream_t);

void log_probs_backward(const LogProbsBackwardArguments&, cudaStream_t);

// Bytes of workspace that `kl` takes.
int64_t kl_bytes(int64_t rows, int64_t columns);

// Both of one dtype. The state is merged into, or with `start` begun anew.
void kl(const KLArguments&, bool start, void* workspace, cudaStream_t);

// Both gradients of one dtype.
void kl_backward(const KLBackwardArguments&, cudaStream_t);

}  // namespace dlcore::cuda
