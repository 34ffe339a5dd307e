// Weights of the vocabulary drifts on the sphere. Compiled once per ISA level.
#include "sphere_velocity.h"

#include <algorithm>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace dlcore::DLCORE_ISA {
namespace {

constexpr float kPi = 3.14159265f;
// Next to -1 the weight ω / sin ω has no bound: cosines below this count as this.
constexpr float kLowestCosine = -1 + 0x1p-20f;
// ω / sin ω = Σ kSlerp[n]·u^n for u = 1 - cos ω in [0, 1], relative error 4e-10.
constexpr float kSlerp[] = {0x1.000000p+0f,  0x1.55555ap-2f, 0x1.110f18p-3f,  0x1.d4ae12p-5f,
                            0x1.95741ep-6f,  0x1.ef54d6p-7f, -0x1.c7ee00p-8f, 0x1.e83394p-6f,
                            -0x1.3961eep-5f, 0x1.2b10eap-5f, -0x1.344dbep-6f, 0x1.396fa8p-8f};
constexpr int kSlerpTerms = sizeof kSlerp / sizeof *kSlerp;

// A radial weight and its derivative in the cosine.
template <class L>
struct Weight {
  L value, slope;
};

// 1 / sqrt(x) for positive normal x, relative error 2^-22: a first guess from the exponent, and three steps of
// Newton's iteration.
template <int N>
Lanes<FloatPart, N> reciprocal_root(const Lanes<FloatPart, N>& x) {
  auto r = floats_of(each([](WordPart b) { return 0x5F3759DFu - (b >> 1); }, words_of(x)));
  for (int step = 0; step < 3; ++step) r = fused(r, fused(x * r, r * -0.5f, 0.5f), r);
  return r;
}

// ω / sin ω: of the angle itself up to a right angle, else of the supplement ω': π / sin ω' - ω' / sin ω'.
struct Slerp {
  explicit Slerp(const Radial&, int64_t) {}

  template <bool with_slope, int N>
  Weight<Lanes<FloatPart, N>> weigh(const Lanes<FloatPart, N>& cosine) const {
    const auto c = max(kLowestCosine, cosine);
    const auto u = 1.0f - floats_of(words_of(c) & 0x7FFFFFFFu);
    auto p = fused(u, kSlerp[kSlerpTerms - 1], kSlerp[kSlerpTerms - 2]);
    for (int n = kSlerpTerms - 3; n >= 0; --n) p = fused(p, u, kSlerp[n]);
    const auto obtuse = less(c, 0.0f);
    const auto root = reciprocal_root((1.0f - c) * (c + 1.0f));
    Weight<Lanes<FloatPart, N>> w;
    w.value = select(obtuse, root * kPi - p, p);
    if constexpr (with_slope) {
      auto s = u * (kSlerp[kSlerpTerms - 1] * (1 - kSlerpTerms)) - kSlerp[kSlerpTerms - 2] * (kSlerpTerms - 2);
      for (int n = kSlerpTerms - 3; n >= 1; --n) s = fused(s, u, -kSlerp[n] * static_cast<float>(n));
      const auto steep = select(less(cosine, kLowestCosine), 0.0f, fused(root * root * root, c * kPi, s));
      w.slope = select(obtuse, steep, s);
    }
    return w;
  }
};

// scale / (1 + mc)·Σ a_n T_n(z) with z = (c + m) / (1 + mc), by Clenshaw's recurrence. c + 1 is exact next to
// -1, where both sums cancel.
struct VonMisesFisher {
  const float *sum, *derivative;
  float m, rest, scale;
  int64_t terms;

  VonMisesFisher(const Radial& radial, int64_t r) : terms(radial.terms) {
    const float* row = &radial.rows[r];
    m = row[0], rest = row[1], scale = row[2];
    sum = row + 3, derivative = sum + terms;
  }

  template <int N>
  Lanes<FloatPart, N> series(const float* coefficients, const Lanes<FloatPart, N>& z) const {
    const auto twice = z + z;
    auto last = z * 0.0f, before = last;
    for (int64_t n = terms - 1; n > 0; --n) {
      const auto next = fused(twice, last, coefficients[n] - before);
      before = last, last = next;
    }
    return fused(z, last, coefficients[0] - before);
  }

  template <bool with_slope, int N>
  Weight<Lanes<FloatPart, N>> weigh(const Lanes<FloatPart, N>& cosine) const {
    const auto above = max(-1.0f, cosine) + 1.0f;
    const auto inverse = reciprocal(fused(above, m, rest));
    const auto z = (above - rest) * inverse;
    const auto rho = series(sum, z);
    Weight<Lanes<FloatPart, N>> w;
    w.value = inverse * scale * rho;
    if constexpr (with_slope) {
      // dz/dc = (1 - m²) / (1 + mc)².
      const auto turn = inverse * (rest * (m + 1));
      const auto slope = inverse * inverse * scale * (turn * series(derivative, z) - rho * m);
      w.slope = select(less(cosine, -1.0f), 0.0f, slope);
    }
    return w;
  }
};

template <class F>
void with_radial(const Radial& radial, F f) {
  if (radial.rows)
    f([&](int64_t r) { return VonMisesFisher(radial, r); });
  else
    f([&](int64_t r) { return Slerp(radial, r); });
}

// Calls f(at, count, x) for every group of a row: entries [at, at + count) in x, -inf past the end.
template <class F>
void each_group(const View& logits, int64_t r, F f) {
  with_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    const T* data = logits.row<const T>(r);
    alignas(64) float x[kGroup];
    for (int64_t at = 0; at < logits.columns; at += kGroup) {
      const int64_t count = std::min(kGroup, logits.columns - at);
      prefetch<kGroup>(data + at, kAhead);
      read_group(data + at, count, x);
      f(at, count, x);
    }
  });
}

}  // namespace

void sphere_weights(const SphereWeightsArguments& a) {
  with_radial(a.radial, [&](auto radial_of) {
    parallel_for(a.logits.rows, a.threads, [&](int64_t r) {
      const auto radial = radial_of(r);
      const Probability probability(a.reference[r]);
      float* row = a.cosines + r * a.logits.columns;
      each_group(a.logits, r, [&](int64_t at, int64_t count, const float* x) {
        alignas(64) float c[kGroup];
        read_group(row + at, count, c);
        for (int64_t i = 0; i < kGroup; i += kAbreast * kLanes)
          store(c + i, probability(load_wide(x + i)) * radial.template weigh<false>(load_wide(c + i)).value);
        write_group(row + at, count, c);
      });
    });
  });
}

void sphere_velocity_backward(const SphereVelocityBackwardArguments& a) {
  with_radial(a.radial, [&](auto radial_of) {
    parallel_for(a.logits.rows, a.threads, [&](int64_t r) {
      const auto radial = radial_of(r);
      const Probability probability(a.logsumexp[r]);
      float *cosines = a.cosines + r * a.logits.columns, *pulls = a.pulls + r * a.logits.columns;
      const float mean = a.mean[r];
      each_group(a.logits, r, [&](int64_t at, int64_t count, float* x) {
        alignas(64) float c[kGroup], h[kGroup];
        read_group(cosines + at, count, c);
        read_group(pulls + at, count, h);
        for (int64_t i = 0; i < kGroup; i += kLanes) {
          const Floats p = probability(load(x + i)), pull = load(h + i);
          const auto w = radial.template weigh<true>(load(c + i));
          store(x + i, p * (w.value * pull - mean));
          store(h + i, p * w.slope * pull);
          store(c + i, p * w.value);
        }
        write_group(cosines + at, count, c);
        write_group(pulls + at, count, h);
        with_dtype(a.out.dtype, [&](auto out) { write_group(a.out.row<decltype(out)>(r) + at, count, x); });
      });
    });
  });
}

namespace {

// The largest entries of a row so far.
struct Kept {
  float* values;
  int64_t* ids;
  int64_t most, size;

  bool takes(float x) const { return size < most || x > values[most - 1]; }
  void insert(float x, int64_t id) {
    if (size < most) ++size;
    int64_t place = size - 1;
    for (; place > 0 && x > values[place - 1]; --place)
      values[place] = values[place - 1], ids[place] = ids[place - 1];
    values[place] = x;
    ids[place] = id;
  }
};

}  // namespace

void largest(const LargestArguments& a) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  parallel_for(a.logits.rows, a.threads, [&](int64_t r) {
    Kept kept{a.values + r * a.count, a.ids + r * a.count, a.count, std::min(a.first_token, a.count)};
    bool valid = kept.size == 0 || kept.values[0] < infinity;
    each_group(a.logits, r, [&](int64_t at, int64_t count, const float* x) {
      for (int64_t i = 0; i < count && valid; i += kLanes) {
        const Floats sixteen = load(x + i);
        const bool fine = lane_bits(less(sixteen, infinity)) == 0xFFFF;
        if (fine && !kept.takes(DLCORE_ISA::largest(sixteen))) continue;
        for (int64_t j = i; j < std::min(count, i + kLanes); ++j) {
          valid &= x[j] < infinity;
          if (kept.takes(x[j])) kept.insert(x[j], a.first_token + at + j);
        }
      }
    });
    if (!valid) kept.values[0] = std::numeric_limits<float>::quiet_NaN();
  });
}

}  // namespace dlcore::DLCORE_ISA
