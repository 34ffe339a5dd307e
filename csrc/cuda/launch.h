// What every CUDA family shares on the host: how a kernel is launched, and what becomes of an error.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace dlcore::cuda {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else the next call that asks would get this error once more
  throw Error(std::string("dlcore: CUDA refused ") + what + ": " + cudaGetErrorName(status) + ", " +
              cudaGetErrorString(status));
}

// Blocks that fill the current device a few times over; a grid-stride loop does the rest of the work.
inline int64_t most_blocks() {
  constexpr int64_t kPerMultiprocessor = 16;
  int device = 0, multiprocessors = 0;
  check(cudaGetDevice(&device), "to name its device");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "to count multiprocessors");
  return kPerMultiprocessor * multiprocessors;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A persistent grid: as many blocks of so many threads as there is work for and the device holds.
template <class... P, class... A>
void launch(const char* what, void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream,
            A&&... args) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(blocks, most_blocks())));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...), what);
}

}  // namespace dlcore::cuda
