#include "rng.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel.h"

namespace dlcore {
namespace {

// 64 bits as a number in (0, 1].
double unit(uint64_t b) { return high_word(b) * 0x1p-32 + (low_word(b) + 0.5) * 0x1p-64; }

// -log1p(-u); where u is large, 1 - u comes from the complemented bits.
double exponential(uint64_t b) { return b >> 63 ? -std::log(unit(~b)) : -std::log1p(-unit(b)); }

struct Pair {
  double even, odd;
};

Pair draw_pair(Noise noise, const Block& b) {
  const uint64_t even = bits(b, 0), odd = bits(b, 1);
  if (noise == Noise::kUniform) return {uniform(even), uniform(odd)};
  return {-std::log(exponential(even)), -std::log(exponential(odd))};
}

// A uniform number that rounds up to 1 becomes the largest one below it.
template <class T>
T rounded(Noise noise, double x) {
  const auto r = static_cast<T>(x);
  return noise == Noise::kUniform && r >= 1 ? 1 - std::numeric_limits<T>::epsilon() / 2 : r;
}

}  // namespace

template <class T>
void fill_noise(Noise noise, const int64_t* keys, int64_t key_count, int64_t count, T* out, int threads) {
  constexpr int64_t chunk = 4096;
  const int64_t chunks = (count + chunk - 1) / chunk;
  parallel_for(key_count * chunks, threads, [&](int64_t i) {
    const int64_t k = i / chunks, begin = i % chunks * chunk, end = std::min(begin + chunk, count);
    const Key key{keys[2 * k], keys[2 * k + 1]};
    T* row = out + k * count;
    for (int64_t j = begin; j < end; j += 2) {
      const Pair pair = draw_pair(noise, block(key, Domain::kElement, j / 2));
      row[j] = rounded<T>(noise, pair.even);
      if (j + 1 < end) row[j + 1] = rounded<T>(noise, pair.odd);
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
