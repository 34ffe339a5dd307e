// What every CUDA kernel shares on the device: number formats, vector loads, warps.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../common/numbers.h"
#include "../common/view.h"

namespace dlcore::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;
constexpr float kLeastPower = -126;  // of 2 that a normal number is
constexpr double kLn2 = 0.6931471805599453;

__device__ inline int64_t global_warp() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}
__device__ inline int64_t all_warps() { return static_cast<int64_t>(gridDim.x) * blockDim.x / kWarp; }
__device__ inline int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t all_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }
__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }

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

// Elements of four bytes together: a register's.
template <class T>
constexpr int kInWord = 4 / static_cast<int>(sizeof(T));

// The k-th element of a word.
template <class T>
__device__ float element(uint32_t word, int k);
template <>
__device__ inline float element<float>(uint32_t word, int) {
  return float_of(word);
}
template <>
__device__ inline float element<BFloat16>(uint32_t word, int k) {
  return float_of(k == 0 ? word << 16 : word & 0xFFFF0000u);
}
template <>
__device__ inline float element<Float16>(uint32_t word, int k) {
  const auto bits = static_cast<uint16_t>(word >> 16 * k);
  Float16 x;
  memcpy(&x, &bits, sizeof x);
  return widen(x);
}

// The bits of a word's k-th element, and a word of nothing but an element there.
template <class T>
__device__ constexpr uint32_t word_mask(int k) {
  return kInWord<T> == 1 ? 0xFFFFFFFFu : 0xFFFFu << 16 * k;
}
template <class T>
__device__ uint32_t word_of(T x, int k) {
  std::conditional_t<kInWord<T> == 1, uint32_t, uint16_t> bits;
  memcpy(&bits, &x, sizeof x);
  return static_cast<uint32_t>(bits) << 16 * k;
}

// The larger of the elements of two words, each with its like; of a NaN and a number the number.
template <class T>
__device__ inline uint32_t larger(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t r;
  if constexpr (std::is_same_v<T, float>)
    r = bits_of(fmaxf(float_of(a), float_of(b)));
  else if constexpr (std::is_same_v<T, BFloat16>)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else
    asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#else
  uint32_t r = 0;
  for (int k = 0; k < kInWord<T>; ++k) {
    const float x = element<T>(a, k), y = element<T>(b, k);
    r |= (x >= y || y != y ? a : b) & word_mask<T>(k);
  }
  return r;
#endif
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

// Words side by side, moved at once.
template <int WORDS>
__device__ void load_words(const void* p, uint32_t* words) {
  const auto run = Packed<uint32_t, WORDS>::load(static_cast<const uint32_t*>(p));
#pragma unroll
  for (int i = 0; i < WORDS; ++i) words[i] = run.elements[i];
}

// The N entries from `at` on of a row that ends at `columns`, `past` beyond: at once, or the row's last few
// one by one.
template <int N, class T>
__device__ void load_run(const T* row, int64_t at, int64_t columns, float past, float* x) {
  if (at + N <= columns) {
    const auto run = Packed<T, N>::load(row + at);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = widen(run.elements[k]);
    return;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = at + k < columns ? widen(row[at + k]) : past;
}

template <int N, class T>
__device__ void store_run(T* row, int64_t at, int64_t columns, const float* x) {
  if (at + N <= columns) {
    Packed<T, N> run;
#pragma unroll
    for (int k = 0; k < N; ++k) run.elements[k] = narrow_to<T>(x[k]);
    run.store(row + at);
    return;
  }
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (at + k < columns) row[at + k] = narrow_to<T>(x[k]);
}

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

// Which of N entries from `first` on is `id`, -1 if none is. A comparison of each with it stays in registers.
template <int N>
__device__ int place_of(int64_t id, int64_t first) {
  return id >= first && id < first + N ? static_cast<int>(id - first) : -1;
}

// Adds to the entry of a run at token `first` that is `token`.
template <int N>
__device__ void add_at(float* run, int64_t first, int64_t token, float value) {
  const int place = place_of<N>(token, first);
#pragma unroll
  for (int k = 0; k < N; ++k) run[k] += k == place ? value : 0.0f;
}

// Reads the columns of a span N at a time, by a warp; what f(x, column) makes of a run x goes to out.
template <int N, int64_t SPAN, class T, class U, class F>
__device__ void map_span(const T* in, U* out, int64_t first, int64_t columns, F f) {
#pragma unroll 1
  for (int64_t at = first + lane_id() * N; at < first + SPAN; at += kWarp * N) {
    float x[N];
    if (at >= columns) break;
    load_run<N>(in, at, columns, 0, x);
    f(x, at);
    store_run<N>(out, at, columns, x);
  }
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

inline int abreast_of(const View& v) { return most_abreast(v, v.dtype == DType::kFloat32 ? 4 : 2); }

// Calls f(element of `in`, element of `out`, how many abreast). A gradient has its logits' dtype, or any if
// they are a head's, in float32. `others` are views like `in` or `out`.
template <class F, class... V>
void with_gradient(const View& in, const View& out, F f, const V&... others) {
  with_dtype(in.dtype, [&](auto x) {
    with_dtype(out.dtype, [&](auto y) {
      using T = decltype(x);
      using U = decltype(y);
      if constexpr (std::is_same_v<T, U> || std::is_same_v<T, float>) {
        constexpr int kMost = 16 / sizeof(T);
        const bool wide = std::min({abreast_of(in), abreast_of(out), abreast_of(others)...}) >= kMost;
        if (wide) return f(x, y, std::integral_constant<int, kMost>{});
        return f(x, y, std::integral_constant<int, 1>{});
      }
    });
  });
}

}  // namespace dlcore::cuda
