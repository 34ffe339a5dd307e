// Keyed noise in double, rounded once: a thread a block of the stream, which is a pair of numbers.
#include "device.h"
#include "launch.h"
#include "rng.h"

namespace dlcore::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct Noises {
  const int64_t* keys;
  int64_t key_count, count;
  T* out;
  bool paired;  // every pair lies at a multiple of its size

  __host__ __device__ int64_t pairs() const { return (count + 1) / 2; }
};

template <Noise NOISE, class T>
__global__ void fill_kernel(const __grid_constant__ Noises<T> a) {
  for (int64_t i = global_thread(); i < a.key_count * a.pairs(); i += all_threads()) {
    const int64_t k = i / a.pairs(), pair = i % a.pairs();
    const wide::Pair drawn =
        wide::draw(NOISE, block({a.keys[2 * k], a.keys[2 * k + 1]}, Domain::kElement, pair));
    const T even = wide::rounded<T>(NOISE, drawn.even), odd = wide::rounded<T>(NOISE, drawn.odd);
    T* to = a.out + k * a.count + 2 * pair;
    const bool both = 2 * pair + 1 < a.count;
    if (a.paired && both) {
      Packed<T, 2> x;
      x.elements[0] = even;
      x.elements[1] = odd;
      x.store(to);
      continue;
    }
    to[0] = even;
    if (both) to[1] = odd;
  }
}

template <class T>
void fill(Noise noise, const Noises<T>& a, cudaStream_t stream) {
  const auto kernel = noise == Noise::kUniform  ? fill_kernel<Noise::kUniform, T>
                      : noise == Noise::kGumbel ? fill_kernel<Noise::kGumbel, T>
                                                : fill_kernel<Noise::kNormal, T>;
  launch("rng", kernel, ceil_div(a.key_count * a.pairs(), kThreads), kThreads, stream, a);
}

template <class T>
void fill(Noise noise, const int64_t* keys, int64_t key_count, int64_t count, void* out,
          cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(out) % (2 * sizeof(T)) == 0;
  fill(noise,
       Noises<T>{keys, key_count, count, static_cast<T*>(out), aligned && (count % 2 == 0 || key_count == 1)},
       stream);
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
