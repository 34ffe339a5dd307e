// Draws of the von Mises-Fisher and the spherical Cauchy law. Compiled once per ISA level.
//
// A point is W·μ + √(1 - W²)·v with v uniform across the mean direction μ, a projected normal vector; for the
// cosine W see csrc/common/sphere_draw.h.
#include <cmath>
#include <vector>

#include "../common/sphere_draw.h"
#include "doubles.h"
#include "kernels.h"
#include "normal.h"
#include "parallel.h"
#include "vectors.h"

namespace dlcore::DLCORE_ISA {
namespace {

// What rows are drawn by, sixteen at a time.
struct Sixteen {
  Key key[kLanes];
  double kappa[kLanes];
  double cosine[kLanes], sine[kLanes];
};

// The register of a spread word's halves, and the row of its lane.
WidePart half(const SpreadWords<kParts>& words, int k) {
  return (k % 2 ? words.odd : words.even)[k / 2] & 0xFFFFFFFFu;
}
int row_of(int k, int lane) { return k / 2 * kPartLanes + 2 * lane + k % 2; }

// The laws of a register's rows.
struct Law {
  double q;
  DoublePart m, rest, width;  // rest = 1 - m, width² = 1 - m²

  Law(const double* kappa, int64_t d, int k) : q(static_cast<double>(d - 1)) {
    DoublePart twice;
    for (int lane = 0; lane < kWideLanes; ++lane) twice[lane] = 2 * kappa[row_of(k, lane)];
    const DoublePart b = q / (twice + root(twice * twice + q * q));
    m = (1.0 - b) / (1.0 + b);
    rest = 2.0 * b / (1.0 + b);
    width = 2.0 * root(b) / (1.0 + b);
  }
};

struct Candidate {
  DoublePart cosine, sine, excess;  // excess = log(1 + s) - s/(1 + s), s = my
};

// y = t/√(q + t²) for Student's t with q = d - 1 degrees of freedom (Bailey 1994), from an exponential number
// and the cosine of a circle. 1 + y and 1 - m are kept beside y and m: where κ is large and y next to -1, the
// sums cancel.
Candidate candidate(const Law& law, DoublePart exponential, DoublePart turn) {
  const Decay e = decay(exponential * (2 / law.q));
  const DoublePart square = turn * turn * e.gone, whole = e.left + square;
  const DoublePart y = root(square / whole), across = root(e.left / whole);
  const DoublePart above = turn < 0.0 ? across * across / (1.0 + y) : 1.0 + y;
  const DoublePart one = law.rest + law.m * above;
  return {(above - law.rest) / one, law.width * across / one, log(one) + (1.0 / one - 1.0)};
}

// The cosines to the means, and their sines: candidate k has draws 4k and 4k + 1, and is taken where the
// exponential number of draw 4k + 2 is at least q·excess.
void draw_cosines(Sixteen& rows, int64_t d, bool reject) {
  uint32_t seeds[2][kLanes], offsets[2][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const auto seed = static_cast<uint64_t>(rows.key[i].seed);
    const auto offset = static_cast<uint64_t>(rows.key[i].offset);
    seeds[0][i] = low_word(seed);
    seeds[1][i] = high_word(seed);
    offsets[0][i] = low_word(offset);
    offsets[1][i] = high_word(offset);
  }
  const auto spread = [](const uint32_t* words) { return spread_words(load_lanes<Words>(words)); };
  const auto block = [&](int index) {
    return philox(same_words<kParts>(static_cast<uint32_t>(index)),
                  same_words<kParts>(domain_word(Domain::kCosine, index)), spread(offsets[0]),
                  spread(offsets[1]), spread(seeds[0]), spread(seeds[1]));
  };
  bool open[kLanes];
  std::fill(open, open + kLanes, true);
  for (int k = 0, left = kLanes; k < sphere::kCandidates && left > 0; ++k) {
    const auto first = block(2 * k), second = block(2 * k + 1);
    for (int r = 0; r < 2 * kParts; ++r) {
      const Law law(rows.kappa, d, r);
      const Candidate found = candidate(law, exponential(half(first.even_high, r), half(first.even_low, r)),
                                        circle(half(first.odd_high, r), half(first.odd_low, r)).cosine);
      const DoublePart chance = exponential(half(second.even_high, r), half(second.even_low, r));
      const auto taken = (LongPart)(chance >= law.q * found.excess);
      for (int lane = 0; lane < kWideLanes; ++lane) {
        const int row = row_of(r, lane);
        if (!open[row]) continue;
        rows.cosine[row] = found.cosine[lane];
        rows.sine[row] = found.sine[lane];
        open[row] = reject && !taken[lane];
        left -= !open[row];
      }
    }
  }
}

struct Products {
  double mean, across, square;  // |μ|², <g, μ>, |g|²
};

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
void draw_row(const SphereSampleArguments& a, int64_t r, Key key, double cosine, double sine, float* g) {
  const int64_t columns = a.mean.columns;
  const T* mean = a.mean.row<const T>(r);
  T* out = a.out.row<T>(r);
  // A normal vector; the row's memory is asked for meanwhile.
  fill_normal(key, Domain::kDirection, 0, columns, g, [=](int64_t i, int64_t n) {
    for (int64_t at = i; at < i + n; at += kLanes) {
      prefetch_lines<kLanes * sizeof(T), 0>(mean + at, 0);
      prefetch_lines<kLanes * sizeof(T), 1>(out + at, 0);
    }
  });
  std::fill(g + columns, g + (columns + kLanes - 1) / kLanes * kLanes, 0.0f);
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
  const bool directed = p.mean > 0;
  const double across = (directed ? sine : 1) / std::sqrt(square);
  const double along = (directed ? cosine / std::sqrt(p.mean) : 0) - across * share;
  each_sixteen<T>(columns, [&](int64_t i, auto sixteen, auto place) {
    const Floats w = sixteen(mean) * factor;
    place(out, fused(w, static_cast<float>(along), load(g + i) * static_cast<float>(across)));
  });
}

}  // namespace

void sphere_sample(const SphereSampleArguments& a) {
  const int64_t padded = (a.mean.columns + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  parallel_for((a.mean.rows + kLanes - 1) / kLanes, a.threads, [&](int64_t c) {
    const int64_t first = c * kLanes, count = std::min<int64_t>(a.mean.rows - first, kLanes);
    Sixteen rows;
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t r = first + std::min(i, count - 1);
      rows.key[i] = a.keys[r];
      rows.kappa[i] = a.kappa[r];
    }
    draw_cosines(rows, a.mean.columns, a.reject);
    std::vector<float> g(static_cast<size_t>(padded));
    for (int64_t i = 0; i < count; ++i)
      with_dtype(a.mean.dtype, [&](auto type) {
        draw_row<decltype(type)>(a, first + i, rows.key[i], rows.cosine[i], rows.sine[i], g.data());
      });
  });
}

}  // namespace dlcore::DLCORE_ISA
