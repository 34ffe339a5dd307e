#include "rng.h"

#include <algorithm>

#include "parallel.h"

namespace dlcore {
template <class T>
void fill_noise(Noise noise, const int64_t* keys, int64_t key_count, int64_t count, T* out, int threads) {
  constexpr int64_t chunk = 4096;
  const int64_t chunks = (count + chunk - 1) / chunk;
  parallel_for(key_count * chunks, threads, [&](int64_t i) {
    const int64_t k = i / chunks, begin = i % chunks * chunk, end = std::min(begin + chunk, count);
    const Key key{keys[2 * k], keys[2 * k + 1]};
    T* row = out + k * count;
    for (int64_t j = begin; j < end; j += 2) {
      const wide::Pair pair = wide::draw(noise, block(key, Domain::kElement, j / 2));
      row[j] = wide::rounded<T>(noise, pair.even);
      if (j + 1 < end) row[j + 1] = wide::rounded<T>(noise, pair.odd);
    }
  });
}
template void fill_noise(Noise, const int64_t*, int64_t, int64_t, float*, int);
template void fill_noise(Noise, const int64_t*, int64_t, int64_t, double*, int);

void fold_in_all(const int64_t* keys, int64_t key_stride, const int64_t* data, int64_t data_stride,
                 int64_t count, int64_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* key = keys + i * key_stride;
    const Key folded = fold_in({key[0], key[1]}, data[i * data_stride]);
    out[2 * i] = folded.seed;
    out[2 * i + 1] = folded.offset;
  }
}

}  // namespace dlcore
