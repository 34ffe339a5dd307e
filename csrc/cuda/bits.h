// The bits family on CUDA devices. All pointers are a device's; nothing here waits for it.
#pragma once

#include <cuda_runtime.h>

#include "../common/bit_numbers.h"
#include "../common/bits.h"

namespace dlcore::cuda {

// As on the CPU, but for threads.
void bit_logits(const BitLogitsArguments&, cudaStream_t);
void bit_step(const BitStepArguments&, cudaStream_t);
void bit_perturb(const BitPerturbArguments&, cudaStream_t);
void bit_loss_backward(const BitLossBackwardArguments&, cudaStream_t);
void bit_encode(const BitEncodeArguments&, cudaStream_t);
void bit_decode(const BitDecodeArguments&, cudaStream_t);

// How many sums bit_loss keeps of a row; none if it needs no workspace.
int64_t bit_loss_sums(int64_t rows, int64_t columns);

// Means of rows (rows), by way of the sums (rows, bit_loss_sums).
void bit_loss(const BitLossArguments&, float* means, cudaStream_t);

// out (count, rows): the numbers of that many rows.
void bit_numbers(const BitSlopes&, int64_t rows, float* out, cudaStream_t);
void bit_numbers(const BitStepNumbers&, int64_t rows, float* out, cudaStream_t);
void bit_numbers(const BitSpreads&, int64_t rows, float* out, cudaStream_t);
void bit_numbers(const BitMeanGrads&, int64_t rows, float* out, cudaStream_t);

}  // namespace dlcore::cuda
