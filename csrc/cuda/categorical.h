// The categorical family on CUDA devices. All pointers are a device's; nothing here waits for it.
#pragma once

#include <cuda_runtime.h>

#include "../common/categorical.h"

namespace dlcore::cuda {

// Bytes of workspace that a scan of so many rows and columns takes.
int64_t scan_bytes(int64_t rows, int64_t columns);

// As on the CPU. With cuts, entries equal to a row's threshold stay up to the token before `ends` (rows),
// which find_ends has set.
void scan(const ScanArguments&, const int64_t* ends, void* workspace, cudaStream_t);

// As csrc/common/categorical_finish.h has them, for all rows.
void finish_stats(const Summary* state, int64_t rows, int64_t* argmax, float* numbers, cudaStream_t);
void finish_sample(const Summary* state, const Summary* drawn, int64_t rows, int64_t* tokens, float* numbers,
                   cudaStream_t);
void finish_summary(const Summary* state, int64_t rows, int64_t* tokens, double* numbers, cudaStream_t);
void finish_log_probs(const Summary* state, PerRow<int64_t> target, bool with_index, int64_t rows,
                      double* numbers, cudaStream_t);
void finish_kl(const KLSummary* state, int64_t rows, double* numbers, cudaStream_t);
void plan_mixture(const MixtureArguments&, uint8_t* skip, cudaStream_t);
void finish_mixture(const MixtureArguments&, const Summary* state, const uint8_t* skip, int64_t* tokens,
                    cudaStream_t);

// Truncation, as on the CPU; a histogram at token 0 begins anew.
void start_selections(const Summary* state, int64_t rows, PerRow<int64_t> top_k, PerRow<float> top_p,
                      const Selection* within, Selection* selections, cudaStream_t);
void histogram(const HistogramArguments&, cudaStream_t);
void narrow(const Bin* bins, const Summary* state, int64_t rows, int level, Selection* selections,
            cudaStream_t);
void finish_selections(const Summary* state, int64_t rows, PerRow<float> min_p, PerRow<float> temperature,
                       const Selection* selections, Cut* cuts, cudaStream_t);

// Of every row the token after the last equal of its threshold that stays; ties are used up tile by tile.
struct EndsArguments {
  View logits;
  int64_t first_token = 0;
  Softmax softmax;
  Cut* cuts = nullptr;
  int64_t* ends = nullptr;
};
void find_ends(const EndsArguments&, cudaStream_t);

// All of that for whole rows of up to 2^23 tokens, by one kernel.
struct CutArguments {
  View logits;
  Softmax softmax;
  const Summary* state = nullptr;
  PerRow<int64_t> top_k;
  PerRow<float> top_p, min_p;
  Cut* cuts = nullptr;
  int64_t* ends = nullptr;
};
void cut_rows(const CutArguments&, cudaStream_t);

void log_probs_backward(const LogProbsBackwardArguments&, cudaStream_t);

// Bytes of workspace that `kl` takes.
int64_t kl_bytes(int64_t rows, int64_t columns);

// Both of one dtype. The state is merged into, or with `start` begun anew.
void kl(const KLArguments&, bool start, void* workspace, cudaStream_t);

// Both gradients of one dtype.
void kl_backward(const KLBackwardArguments&, cudaStream_t);

}  // namespace dlcore::cuda
