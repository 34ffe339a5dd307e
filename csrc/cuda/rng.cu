// Keyed noise in double, rounded once: a thread two blocks of the stream at a time, which are four numbers.
#include "device.h"
#include "launch.h"
#include "normals.h"
#include "rng.h"

namespace dlcore::cuda {
namespace {

constexpr int kThreads = 256;

// Numbers of a thread at a time.
constexpr int kQuad = 4;

template <class T>
struct Noises {
  const int64_t* keys;
  int64_t key_count, count;
  T* out;
  bool aligned;  // every quad lies at a multiple of 16 bytes

  __host__ __device__ int64_t quads() const { return (count + kQuad - 1) / kQuad; }
};

template <Noise NOISE>
__device__ wide::Pair draw(const Block& b) {
  if constexpr (NOISE == Noise::kNormal) return normal_pair(b);
  return wide::draw(NOISE, b);
}

template <class T>
__device__ void store(T* to, const T (&x)[kQuad]) {
  constexpr int kAbreast = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < kQuad; i += kAbreast) {
    Packed<T, kAbreast> some;
#pragma unroll
    for (int j = 0; j < kAbreast; ++j) some.elements[j] = x[i + j];
    some.store(to + i);
  }
}

// A thread's quads are far apart; those of one key in turn.
template <Noise NOISE, class T>
__global__ void fill_kernel(const __grid_constant__ Noises<T> a) {
  const int64_t quads = a.quads(), step = all_threads();
  for (int64_t i = global_thread(); i < a.key_count * quads;) {
    const int64_t k = i / quads;
    const Key key{a.keys[2 * k], a.keys[2 * k + 1]};
    T* row = a.out + k * a.count;
    int64_t first = kQuad * (i - k * quads);
    for (; first < a.count; first += kQuad * step, i += step) {
      T x[kQuad];
#pragma unroll
      for (int j = 0; j < kQuad; j += 2) {
        const wide::Pair drawn = draw<NOISE>(block(key, Domain::kElement, (first + j) / 2));
        x[j] = wide::rounded<T>(NOISE, drawn.even);
        x[j + 1] = wide::rounded<T>(NOISE, drawn.odd);
      }
      if (a.aligned && first + kQuad <= a.count) {
        store(row + first, x);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kQuad; ++j)
        if (first + j < a.count) row[first + j] = x[j];
    }
  }
}

template <class T>
void fill(Noise noise, const int64_t* keys, int64_t key_count, int64_t count, void* out,
          cudaStream_t stream) {
  const auto kernel = noise == Noise::kUniform  ? fill_kernel<Noise::kUniform, T>
                      : noise == Noise::kGumbel ? fill_kernel<Noise::kGumbel, T>
                                                : fill_kernel<Noise::kNormal, T>;
  const auto element = static_cast<int64_t>(sizeof(T));
  const bool aligned =
      reinterpret_cast<uintptr_t>(out) % 16 == 0 && (count * element % 16 == 0 || key_count == 1);
  const Noises<T> a{keys, key_count, count, static_cast<T*>(out), aligned};
  launch("rng", kernel, ceil_div(key_count * a.quads(), kThreads), kThreads, stream, a);
}

__global__ void fold_in_kernel(const int64_t* keys, int64_t key_stride, const int64_t* data,
                               int64_t data_stride, int64_t count, int64_t* out) {
  for (int64_t i = global_thread(); i < count; i += all_threads()) {
    const int64_t* key = keys + i * key_stride;
    const Key folded = dlcore::fold_in({key[0], key[1]}, data[i * data_stride]);
    out[2 * i] = folded.seed;
    out[2 * i + 1] = folded.offset;
  }
}

}  // namespace

void fill_noise(Noise noise, const int64_t* keys, int64_t key_count, int64_t count, bool wide, void* out,
                cudaStream_t stream) {
  if (wide) return fill<double>(noise, keys, key_count, count, out, stream);
  fill<float>(noise, keys, key_count, count, out, stream);
}

void fold_in(const int64_t* keys, int64_t key_stride, const int64_t* data, int64_t data_stride, int64_t count,
             int64_t* out, cudaStream_t stream) {
  launch("rng.fold_in", fold_in_kernel, ceil_div(count, kThreads), kThreads, stream, keys, key_stride, data,
         data_stride, count, out);
}

}  // namespace dlcore::cuda
