// The mathematics of bits, element by element: templates over L, which is sixteen lanes or more on the CPU
// (csrc/cpu/simd.h) and a float on a device (one_lane.h).
#pragma once

#include "bits.h"
#include "one_lane.h"

// Inlined always: GCC gives up in large units, and a call would pass its registers through memory.
#define DLCORE_LANES \
  template <class L> \
  [[gnu::always_inline]] DLCORE_HD inline

namespace dlcore {

// What a coding makes of x; FUSED: whether the machine rounds a multiply-add once.
template <bool FUSED>
struct BitFilter {
  float centre, clip;
  DLCORE_HD explicit BitFilter(const BitCoding& c) : centre((c.low + c.high) / 2), clip(c.clip) {}
  // (x - centre)·slope: a centre of ½ or 0 times slope is exact, so one rounding where the machine fuses.
  DLCORE_LANES L raw(const L& x, const L& slope) const {
    if constexpr (FUSED) return fused(x, slope, slope * -centre);
    return (x - centre) * slope;
  }
  DLCORE_LANES L operator()(const L& x, const L& slope) const { return clamped(raw(x, slope), clip); }
};

DLCORE_LANES L sigmoid(const L& l) { return inverse(exp_minus(l) + 1.0f); }

// sigmoid(l) and 1 - sigmoid(l), both with small relative errors.
template <class L>
struct Sigmoid {
  L set, clear;
  [[gnu::always_inline]] DLCORE_HD explicit Sigmoid(const L& l) {
    const L tail = exp_minus(magnitude(l)), large = inverse(tail + 1.0f), small = tail * large;
    const auto negative = less(l, 0.0f);
    set = select(negative, small, large);
    clear = select(negative, large, small);
  }
};

// keep·x + (1 - keep)·(low + width·p): where σ stays (keep = 1), so does x, to the bit.
DLCORE_LANES L stepped(const L& x, const L& p, const L& keep, float low, float width) {
  const L rest = 1.0f - keep;
  return fused(rest * width, p, fused(keep, x, rest * low));
}

// (high - low)², the square of the units.
DLCORE_HD inline float weight(const BitCoding& c) { return (c.high - c.low) * (c.high - c.low); }

// p - b without cancellation at either end.
DLCORE_LANES L error(const Sigmoid<L>& s, const L& bit) {
  return fused(s.set, 1.0f - bit, 0.0f - s.clear * bit);
}

DLCORE_LANES L squared_error(const L& logit, const L& bit) {
  const L d = error(Sigmoid<L>(logit), bit);
  return d * d;
}

DLCORE_LANES L cross_entropy(const L& logit, const L& bit) {
  return positive_part(logit) - bit * logit + log1p(exp_minus(magnitude(logit)));
}

// The gradient in the logit of scale·error² / 2 or of scale·cross_entropy.
DLCORE_LANES L logit_gradient(const L& logit, const L& bit, float scale, bool squared) {
  const Sigmoid<L> s(logit);
  const L grad = error(s, bit) * scale;
  return squared ? grad * (s.set * s.clear) : grad;
}

// From a gradient in the logit to that in x: none where the clip binds.
DLCORE_LANES L through_filter(const L& grad, const L& raw, const L& slope, const L& limit) {
  return select(less(limit, magnitude(raw)), 0.0f, grad * slope);
}

#undef DLCORE_LANES

DLCORE_HD inline uint64_t to_gray(uint64_t code) { return code ^ code >> 1; }

DLCORE_HD inline uint64_t from_gray(uint64_t code) {
  for (int shift = 1; shift < 64; shift *= 2) code ^= code >> shift;
  return code;
}

// A code that goes around at `vocab` unless that is 0. Seldom more than once: a subtraction takes less than a
// division.
DLCORE_HD inline int64_t wrapped(int64_t token, int64_t vocab) {
  if (vocab == 0) return token;
  token -= token >= vocab ? vocab : 0;
  return token >= vocab ? token % vocab : token;
}

}  // namespace dlcore
