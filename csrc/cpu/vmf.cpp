// Draws of the von Mises-Fisher and the spherical Cauchy law. Compiled once per ISA level.
//
// A point is W·μ + √(1 - W²)·v with v uniform across the mean direction μ, a projected normal vector; for the
// cosine W see csrc/common/sphere_draw.h.
#include <cmath>
#include <vector>

#include "../common/sphere_draw.h"
#include "kernels.h"
#include "normal.h"
#include "parallel.h"
#include "vectors.h"

namespace dlcore::DLCORE_ISA {
namespace {

// The first candidate that is taken, the last one if none is.
sphere::Candidate draw_cosine(Key key, double kappa, int64_t d, bool reject) {
  const sphere::CosineLaw law(kappa, d, reject);
  sphere::Candidate found;
  for (int k = 0; k < sphere::kCandidates; ++k) {
    found = law.candidate(key, k);
    if (found.taken) break;
  }
  return found;
}

struct Products {
  double mean, across, square;  // |μ|², <g, μ>, |g|²
};

// A normal vector g.
void draw_direction(Key key, int64_t columns, float* g) {
  fill_normal(key, Domain::kDirection, 0, columns, g);
  std::fill(g + columns, g + (columns + kLanes - 1) / kLanes * kLanes, 0.0f);
}

// The products of g and factor·μ.
template <class T>
Products multiply(float factor, const T* mean, int64_t columns, const float* g) {
  Floats sums[3] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
  each_sixteen<T>(columns, [&](int64_t i, auto sixteen, auto) {
    const Floats w = sixteen(mean) * factor, x = load(g + i);
    sums[0] = fused(w, w, sums[0]);
    sums[1] = fused(w, x, sums[1]);
    sums[2] = fused(x, x, sums[2]);
  });
  return {sum(sums[0]), sum(sums[1]), sum(sums[2])};
}

// Takes share·factor·μ off g; the new products.
template <class T>
Products project(float share, float factor, const T* mean, int64_t columns, float* g, double mean_square) {
  Floats sums[2] = {broadcast(0.0f), broadcast(0.0f)};
  each_sixteen<T>(columns, [&](int64_t i, auto sixteen, auto) {
    const Floats w = sixteen(mean) * factor, x = fused(w, -share, load(g + i));
    store(g + i, x);
    sums[0] = fused(w, x, sums[0]);
    sums[1] = fused(x, x, sums[1]);
  });
  return {mean_square, sum(sums[0]), sum(sums[1])};
}

template <class T>
void draw_row(const SphereSampleArguments& a, int64_t r, float* g) {
  const Key key = a.keys[r];
  const int64_t columns = a.mean.columns;
  const T* mean = a.mean.row<const T>(r);
  T* out = a.out.row<T>(r);
  draw_direction(key, columns, g);
  Products p = multiply(1.0f, mean, columns, g);
  const float factor = sphere::Sized(p.mean, Entries<T, 1>{{mean}, columns}, 0).factor;
  if (factor != 1) p = multiply(factor, mean, columns, g);
  double share = 0;
  // What is left across the mean: formed anew, and once more, where little of g is.
  const auto left = [&] {
    share = p.mean > 0 ? p.across / p.mean : 0;
    return p.square - share * p.across;
  };
  double square = left();
  for (int again = 0; again < 2 && square < 0.5 * p.square; ++again) {
    p = project(static_cast<float>(share), factor, mean, columns, g, p.mean);
    square = left();
  }
  // A mean that is zero gives the uniform law.
  const sphere::Candidate c =
      p.mean > 0 ? draw_cosine(key, a.kappa[r], columns, a.reject) : sphere::Candidate{};
  const double across = c.sine / std::sqrt(square);
  const double along = (p.mean > 0 ? c.cosine / std::sqrt(p.mean) : 0) - across * share;
  each_sixteen<T>(columns, [&](int64_t i, auto sixteen, auto place) {
    const Floats w = sixteen(mean) * factor;
    place(out, fused(w, static_cast<float>(along), load(g + i) * static_cast<float>(across)));
  });
}

}  // namespace

void sphere_sample(const SphereSampleArguments& a) {
  const int64_t padded = (a.mean.columns + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  constexpr int64_t chunk = 16;
  parallel_for((a.mean.rows + chunk - 1) / chunk, a.threads, [&](int64_t c) {
    std::vector<float> g(static_cast<size_t>(padded));
    for (int64_t r = c * chunk; r < std::min(a.mean.rows, (c + 1) * chunk); ++r)
      with_dtype(a.mean.dtype, [&](auto type) { draw_row<decltype(type)>(a, r, g.data()); });
  });
}

}  // namespace dlcore::DLCORE_ISA
