// Normal numbers of stream v1 in double, a register at a time. Compiled once per ISA level.
#include <algorithm>

#include "doubles.h"
#include "kernels.h"
#include "parallel.h"

namespace dlcore::DLCORE_ISA {
namespace {

// Normals 0 to 31 of blocks [first, first + 16), by Box-Muller: draw 2i is the radius, 2i + 1 the angle of
// normals 2i and 2i + 1.
void normals(Key key, int64_t first, double* out) {
  const auto b =
      spread_blocks(key, domain_word(Domain::kElement, first), low_word(static_cast<uint64_t>(first)));
  const SpreadWords<kParts>* words[] = {&b.even_high, &b.even_low, &b.odd_high, &b.odd_low};
  for (int i = 0; i < kParts; ++i)
    for (int odd = 0; odd < 2; ++odd) {
      const auto word = [&](int k) { return (odd ? words[k]->odd[i] : words[k]->even[i]) & 0xFFFFFFFFu; };
      const DoublePart radius = root(exponential(word(0), word(1)) * 2.0);
      const Circle p = circle(word(2), word(3));
      double cosines[kWideLanes], sines[kWideLanes];
      const DoublePart even_draws = radius * p.cosine, odd_draws = radius * p.sine;
      std::memcpy(cosines, &even_draws, sizeof cosines);
      std::memcpy(sines, &odd_draws, sizeof sines);
      for (int lane = 0; lane < kWideLanes; ++lane) {
        double* to = out + 2 * (i * kPartLanes + 2 * lane + odd);
        to[0] = cosines[lane];
        to[1] = sines[lane];
      }
    }
}

template <class T>
void fill(const NormalArguments& a, T* out) {
  constexpr int64_t chunk = 4096, at_once = 2 * kLanes;
  const int64_t chunks = (a.count + chunk - 1) / chunk;
  parallel_for(a.key_count * chunks, a.threads, [&](int64_t i) {
    const int64_t k = i / chunks, begin = i % chunks * chunk, end = std::min(begin + chunk, a.count);
    for (int64_t j = begin; j < end; j += at_once) {
      double drawn[at_once];
      normals({a.keys[2 * k], a.keys[2 * k + 1]}, j / 2, drawn);
      std::transform(drawn, drawn + std::min(at_once, end - j), out + k * a.count + j,
                     [](double x) { return static_cast<T>(x); });
    }
  });
}

}  // namespace

void normal(const NormalArguments& a) {
  if (a.wide) return fill(a, static_cast<double*>(a.out));
  fill(a, static_cast<float*>(a.out));
}

}  // namespace dlcore::DLCORE_ISA
