// From scanned rows to statistics and tokens, a thread a row.
#include "../common/categorical_finish.h"
#include "categorical.h"
#include "device.h"
#include "launch.h"

namespace dlcore::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void stats_kernel(const Summary* state, int64_t rows, int64_t* argmax, float* numbers) {
  for (int64_t r = global_thread(); r < rows; r += all_threads())
    finish_stats_row(state[r], rows, r, argmax, numbers);
}

__global__ void sample_kernel(const Summary* state, const Summary* drawn, int64_t rows, int64_t* tokens,
                              float* numbers) {
  for (int64_t r = global_thread(); r < rows; r += all_threads())
    finish_sample_row(state[r], drawn[r], rows, r, tokens, numbers);
}

__global__ void summary_kernel(const Summary* state, int64_t rows, int64_t* tokens, double* numbers) {
  for (int64_t r = global_thread(); r < rows; r += all_threads())
    finish_summary_row(state[r], rows, r, tokens, numbers);
}

__global__ void log_probs_kernel(const Summary* state, PerRow<int64_t> target, bool with_index, int64_t rows,
                                 double* numbers) {
  for (int64_t r = global_thread(); r < rows; r += all_threads())
    finish_log_probs_row(state[r], target[r], with_index, rows, r, numbers);
}

__global__ void kl_kernel(const KLSummary* state, int64_t rows, double* numbers) {
  for (int64_t r = global_thread(); r < rows; r += all_threads()) finish_kl_row(state[r], rows, r, numbers);
}

__global__ void plan_kernel(const __grid_constant__ MixtureArguments a, uint8_t* skip) {
  for (int64_t r = global_thread(); r < a.rows; r += all_threads()) skip[r] = mixture_skips(a, r);
}

__global__ void mixture_kernel(const __grid_constant__ MixtureArguments a, const Summary* state,
                               const uint8_t* skip, int64_t* tokens) {
  for (int64_t r = global_thread(); r < a.rows; r += all_threads())
    tokens[r] = finish_mixture_row(a, state[r], skip[r] != 0, r);
}

int64_t blocks(int64_t rows) { return ceil_div(rows, kThreads); }

}  // namespace

void finish_stats(const Summary* state, int64_t rows, int64_t* argmax, float* numbers, cudaStream_t stream) {
  launch("categorical.stats", stats_kernel, blocks(rows), kThreads, stream, state, rows, argmax, numbers);
}

void finish_sample(const Summary* state, const Summary* drawn, int64_t rows, int64_t* tokens, float* numbers,
                   cudaStream_t stream) {
  launch("categorical.sample", sample_kernel, blocks(rows), kThreads, stream, state, drawn, rows, tokens,
         numbers);
}

void finish_summary(const Summary* state, int64_t rows, int64_t* tokens, double* numbers,
                    cudaStream_t stream) {
  launch("categorical.summary", summary_kernel, blocks(rows), kThreads, stream, state, rows, tokens, numbers);
}

void finish_log_probs(const Summary* state, PerRow<int64_t> target, bool with_index, int64_t rows,
                      double* numbers, cudaStream_t stream) {
  launch("categorical.log_probs", log_probs_kernel, blocks(rows), kThreads, stream, state, target, with_index,
         rows, numbers);
}

void finish_kl(const KLSummary* state, int64_t rows, double* numbers, cudaStream_t stream) {
  launch("categorical.kl", kl_kernel, blocks(rows), kThreads, stream, state, rows, numbers);
}

void plan_mixture(const MixtureArguments& a, uint8_t* skip, cudaStream_t stream) {
  launch("categorical.sample_mixture", plan_kernel, blocks(a.rows), kThreads, stream, a, skip);
}

void finish_mixture(const MixtureArguments& a, const Summary* state, const uint8_t* skip, int64_t* tokens,
                    cudaStream_t stream) {
  launch("categorical.sample_mixture", mixture_kernel, blocks(a.rows), kThreads, stream, a, state, skip,
         tokens);
}

}  // namespace dlcore::cuda
