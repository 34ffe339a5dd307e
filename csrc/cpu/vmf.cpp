// Draws of the von Mises-Fisher and the spherical Cauchy law. Compiled once per ISA level.
//
// A point is W·μ + √(1 - W²)·v with v uniform across the mean direction μ, a projected normal vector. The
// cosine W is (m + y)/(1 + my), y the cosine of a uniform point: as it is for the Cauchy law, after Wood's
// rejection for von Mises-Fisher, in a form without κ's large differences.
#include <cmath>
#include <vector>

#include "kernels.h"
#include "normal.h"
#include "parallel.h"
#include "vectors.h"

namespace dlcore::DLCORE_ISA {
namespace {

// Each is taken with probability 0.65 or more, so that a row has none with probability 1e-14; it keeps its
// last.
constexpr int kCandidates = 32;

struct Cosine {
  double cosine, sine;
};

// -log1p(-u) and u for 64 bits.
double exponential(uint64_t bits) {
  const auto unit = [](uint64_t b) { return high_word(b) * 0x1p-32 + (low_word(b) + 0.5) * 0x1p-64; };
  return bits >> 63 ? -std::log(unit(~bits)) : -std::log1p(-unit(bits));
}

// Candidate k: y = t/√(q + t²) for Student's t with q = d - 1 degrees of freedom (Bailey 1994), from draws 4k
// and 4k + 1; it is taken where the exponential number of draw 4k + 2 exceeds q·(log(1 + s) - s/(1 + s)), s =
// my.
Cosine draw_cosine(Key key, double kappa, int64_t d, bool reject) {
  const auto q = static_cast<double>(d - 1);
  const double b = q / (2 * kappa + std::sqrt(4 * kappa * kappa + q * q));
  const double m = (1 - b) / (1 + b), width = 2 * std::sqrt(b) / (1 + b);  // width² = 1 - m²
  Cosine found{};
  for (int k = 0; k < kCandidates; ++k) {
    const Block first = block(key, Domain::kCosine, 2 * k);
    const double turn = std::cos(6.283185307179586 * uniform(bits(first, 1)));
    const double square = turn * turn * std::expm1(2 / q * exponential(bits(first, 0)));  // t²/q
    const double y = std::copysign(std::sqrt(square / (1 + square)), turn), s = m * y;
    found = {(m + y) / (1 + s), width / (std::sqrt(1 + square) * (1 + s))};
    if (!reject) break;
    const Block second = block(key, Domain::kCosine, 2 * k + 1);
    if (exponential(bits(second, 0)) >= q * (std::log1p(s) - s / (1 + s))) break;
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
  const float factor = Sized(p.mean, mean, columns).factor;
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
  const Cosine c = p.mean > 0 ? draw_cosine(key, a.kappa[r], columns, a.reject) : Cosine{0, 1};
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
