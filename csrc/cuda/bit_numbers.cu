// What the kernels of bits are given of noise levels that lie on the device: a thread a row.
#include "bits.h"
#include "device.h"
#include "launch.h"

namespace dlcore::cuda {
namespace {

constexpr int kThreads = 128;

template <class Numbers>
__global__ void numbers_kernel(const Numbers numbers, int64_t rows, float* out) {
  for (int64_t r = global_thread(); r < rows; r += all_threads()) numbers(r, out + r, rows);
}

template <class Numbers>
void fill(const Numbers& numbers, int64_t rows, float* out, cudaStream_t stream) {
  launch("bits' levels", numbers_kernel<Numbers>, ceil_div(rows, kThreads), kThreads, stream, numbers, rows,
         out);
}

}  // namespace

void bit_numbers(const BitSlopes& n, int64_t rows, float* out, cudaStream_t stream) {
  fill(n, rows, out, stream);
}
void bit_numbers(const BitStepNumbers& n, int64_t rows, float* out, cudaStream_t stream) {
  fill(n, rows, out, stream);
}
void bit_numbers(const BitSpreads& n, int64_t rows, float* out, cudaStream_t stream) {
  fill(n, rows, out, stream);
}
void bit_numbers(const BitMeanGrads& n, int64_t rows, float* out, cudaStream_t stream) {
  fill(n, rows, out, stream);
}

}  // namespace dlcore::cuda
