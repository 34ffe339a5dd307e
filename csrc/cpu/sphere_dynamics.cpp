// The Langevin corrector on the sphere: noise, drift and projection in one pass. Compiled once per ISA level.
#include <cmath>
#include <vector>

#include "../common/sphere_correct.h"
#include "../common/sphere_rows.h"
#include "kernels.h"
#include "normal.h"
#include "parallel.h"
#include "vectors.h"

namespace dlcore::DLCORE_ISA {
namespace {

// One row; `moved` has room for whole pairs of sixteens.
template <class T>
void correct_row(const SphereCorrectArguments& a, int64_t r, float* moved) {
  const int64_t columns = a.x.columns;
  const T *x = a.x.row<const T>(r), *score = a.score.row<const T>(r);
  fill_normal(a.keys[r], Domain::kElement, 0, columns, moved);
  Floats product = broadcast(0.0f);
  each_sixteen<T>(
      columns, [&](int64_t i, auto sixteen, auto) { product = fused(sixteen(x), load(moved + i), product); });
  const sphere::Correction c(static_cast<double>(columns - 1), a.step_size[r]);
  const auto by_noise = static_cast<float>(c.spread), by_score = static_cast<float>(c.by_score);
  const auto by_x = static_cast<float>(c.decay - c.spread * sum(product));
  Floats square = broadcast(0.0f);
  each_sixteen<T>(columns, [&](int64_t i, auto sixteen, auto) {
    const Floats noise = load(moved + i) * by_noise;
    Floats y = fused(sixteen(x), by_x, fused(sixteen(score), by_score, noise));
    if (columns - i < kLanes)
      for (int64_t lane = columns - i; lane < kLanes; ++lane)
        y.part[lane / kPartLanes][lane % kPartLanes] = 0;
    store(moved + i, y);
    square = fused(y, y, square);
  });
  const sphere::Sized sized(sum(square), Entries<float, 1>{{moved}, columns}, 0);
  const auto scale = static_cast<float>(sphere::over(1, std::sqrt(sized.square)));
  T* out = a.out.row<T>(r);
  each_sixteen<T>(columns,
                  [&](int64_t i, auto, auto place) { place(out, load(moved + i) * sized.factor * scale); });
}

}  // namespace

void sphere_correct(const SphereCorrectArguments& a) {
  const int64_t padded = (a.x.columns + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  constexpr int64_t chunk = 16;
  parallel_for((a.x.rows + chunk - 1) / chunk, a.threads, [&](int64_t c) {
    std::vector<float> moved(static_cast<size_t>(padded));
    for (int64_t r = c * chunk; r < std::min(a.x.rows, (c + 1) * chunk); ++r)
      with_dtype(a.x.dtype, [&](auto type) { correct_row<decltype(type)>(a, r, moved.data()); });
  });
}

}  // namespace dlcore::DLCORE_ISA
