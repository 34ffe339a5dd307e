// What benchmarks and tests hold the kernels against: the speed of memory, the noise of given bits. Compiled
// once per ISA level.
#include <atomic>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "vector_math.h"

namespace dlcore::DLCORE_ISA {

// The largest of count floats, as fast as memory gives them.
float read(const float* data, int64_t count, int threads) {
  constexpr int64_t block = 1 << 15, streams = 4;
  const int64_t blocks = count / block;
  std::atomic<float> result{0};
  parallel_for(blocks, threads, [&](int64_t b) {
    const float* p = data + b * block;
    Floats m[streams];
    for (int64_t k = 0; k < streams; ++k) m[k] = load(p + k * kLanes);
    for (int64_t i = streams * kLanes; i < block; i += streams * kLanes)
      for (int64_t k = 0; k < streams; ++k) m[k] = max(load(p + i + k * kLanes), m[k]);
    result.store(largest(max(max(m[0], m[1]), max(m[2], m[3]))), std::memory_order_relaxed);
  });
  return result.load();
}

// The kernels' own Gumbel number of each 64 random bits high·2^32 + low; count is a multiple of 16.
void gumbel(const uint32_t* high, const uint32_t* low, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(out + i, gumbel(load_lanes<Words>(high + i), load_lanes<Words>(low + i)));
}

}  // namespace dlcore::DLCORE_ISA
