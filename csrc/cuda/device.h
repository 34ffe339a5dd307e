// What every CUDA kernel shares on the device: number formats, vector loads, warps.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../common/numbers.h"
#include "../common/view.h"

namespace dlcore::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.6931471805599453;

struct BFloat16 {
  uint16_t bits;
};
using Float16 = __half;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }
__device__ inline float widen(Float16 x) { return __half2float(x); }

// Round to nearest even; NaN stays NaN.
template <class T>
__device__ T narrow_to(float x);
template <>
__device__ inline float narrow_to<float>(float x) {
  return x;
}
template <>
__device__ inline BFloat16 narrow_to<BFloat16>(float x) {
  const uint32_t b = bits_of(x);
  if (x != x) return {0x7FC0u};
  return {static_cast<uint16_t>((b + 0x7FFFu + ((b >> 16) & 1u)) >> 16)};
}
template <>
__device__ inline Float16 narrow_to<Float16>(float x) {
  return __float2half_rn(x);
}

// N elements side by side, moved at once: their address must be a multiple of their size, 16 bytes at most.
template <class T, int N>
struct Packed {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * N;
  using Word = std::conditional_t<
      kBytes == 16, uint4,
      std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, unsigned, unsigned short>>>;
  static_assert(sizeof(Word) == kBytes);
  union {
    Word word;
    T elements[N];
  };
  __device__ Packed() {}

  // Read once: the cache may drop it first.
  __device__ static Packed load(const T* p) {
    Packed x;
    x.word = __ldcs(reinterpret_cast<const Word*>(p));
    return x;
  }
  // (The compiler would take an assignment apart.)
  __device__ void store(T* p) const { __stwb(reinterpret_cast<Word*>(p), word); }
};

__device__ inline float larger(float a, float b) { return fmaxf(a, b); }

// Folds over lanes whose numbers differ in the bits of WIDTH - 1: over aligned runs of WIDTH lanes.
template <int WIDTH = kWarp, class T, class F>
__device__ inline T fold_lanes(T x, F f) {
#pragma unroll
  for (int other = WIDTH / 2; other > 0; other /= 2) x = f(x, __shfl_xor_sync(kAllLanes, x, other));
  return x;
}
template <int WIDTH = kWarp, class T>
__device__ inline T sum_lanes(T x) {
  return fold_lanes<WIDTH>(x, [](T a, T b) { return a + b; });
}
template <int WIDTH = kWarp>
__device__ inline float largest_lanes(float x) {
  return fold_lanes<WIDTH>(x, [](float a, float b) { return fmaxf(a, b); });
}

// The least number among lanes that have the warp's largest value; value becomes it.
struct Leader {
  float value;
  int at;
};
__device__ inline Leader find_leader(float value, int at) {
  const float best = largest_lanes(value);
  return {best, __reduce_min_sync(kAllLanes, value == best ? at : 0x7FFFFFFF)};
}

// 2^d; the hardware's, whose relative error is 2^-22.
__device__ inline float exp2_fast(float d) {
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(d));
  return e;
#else
  return exp2f(d);
#endif
}

__device__ inline int64_t global_warp() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}
__device__ inline int64_t all_warps() { return static_cast<int64_t>(gridDim.x) * blockDim.x / kWarp; }
__device__ inline int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t all_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }
__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }

template <class F>
void with_dtype(DType dtype, F f) {
  if (dtype == DType::kFloat32) return f(float{});
  if (dtype == DType::kBFloat16) return f(BFloat16{});
  f(Float16{});
}

// How many elements at once all rows of a view can be read: the most, up to 16 bytes, that every row's
// address is a multiple of.
inline int most_abreast(const View& v, int64_t element) {
  auto bits = reinterpret_cast<uintptr_t>(v.data);
  for (int d = 0; d < v.lead_dims; ++d) bits |= static_cast<uintptr_t>(v.lead_stride[d] * element);
  const uintptr_t bytes = bits & (~bits + 1);  // its largest power of two
  return static_cast<int>((bytes == 0 || bytes > 16 ? 16 : bytes) / static_cast<uintptr_t>(element));
}

}  // namespace dlcore::cuda
