// The V-long sums of the uniform-state NELBO, and its gradient. Compiled once per ISA level.
#include "uniform.h"

#include <cmath>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace dlcore::DLCORE_ISA {
namespace {

struct Sums {
  double logs = 0, ratios = 0;
};

// Σ log1p(y) and Σ y / (1 + y). Four factors share one logarithm and one division, as (Π (1 + y)) - 1 and its
// derivative, where that can't overflow.
template <bool together>
void add_group(const float* x, const Probability& scaled, Sums& sums) {
  Floats logs = broadcast(0.0f), ratios = logs;
  for (int64_t i = 0; i < kGroup; i += 4 * kLanes) {
    const Floats a = scaled(load(x + i)), b = scaled(load(x + i + kLanes));
    const Floats c = scaled(load(x + i + 2 * kLanes)), d = scaled(load(x + i + 3 * kLanes));
    if constexpr (together) {
      const Floats ab = a * b, cd = c * d;
      const Floats left = a + b + ab, right = c + d + cd;
      const Floats product = left + right + left * right;
      logs = logs + log1p(product);
      ratios = ratios + ((left + ab) * (right + 1.0f) + (right + cd) * (left + 1.0f)) / (product + 1.0f);
    } else {
      logs = logs + log1p(a) + log1p(b) + log1p(c) + log1p(d);
      ratios = ratios + a / (a + 1.0f) + b / (b + 1.0f) + c / (c + 1.0f) + d / (d + 1.0f);
    }
  }
  sums.logs += sum(logs);
  sums.ratios += sum(ratios);
}

}  // namespace

void nelbo(const NelboArguments& a) {
  const int64_t rows = a.logits.rows;
  parallel_for(rows, a.threads, [&](int64_t r) {
    const RowSoftmax row(a.softmax, r);
    const NelboRow state(a.alpha[r], -1, a.vocab);
    const Probability scaled(a.saved[r], state.c);
    // Four factors 1 + y, Σ y <= c, stay below (1 + c/4)^4.
    const bool together = state.c < 0x1p31;
    Sums sums;
    with_dtype(a.logits.dtype, [&](auto type) {
      using T = decltype(type);
      const T* data = a.logits.row<const T>(r);
      alignas(64) float x[kGroup];
      for (int64_t at = 0; at < a.logits.columns; at += kGroup) {
        const int64_t count = std::min(kGroup, a.logits.columns - at);
        read_transformed(data + at, count, a.first_token + at, row, x);
        together ? add_group<true>(x, scaled, sums) : add_group<false>(x, scaled, sums);
      }
    });
    a.saved[3 * rows + r] += sums.logs;
    a.saved[4 * rows + r] += sums.ratios;
  });
}

// dL/da_k = p_k (G_k - Σ p G) with G_k = w·{-A c r_k + [k=z]·(c r_z (AV + c n) - V/(1-α) c r_z^2) - [k=x] n
// c^2 r_x}, r = 1 / (1 + c p), A = 1/(1+c) and n = 0 where z = x, else 1 and 1.
void nelbo_backward(const NelboBackwardArguments& a) {
  const int64_t rows = a.logits.rows;
  const auto v = static_cast<double>(a.vocab);
  parallel_for(rows, a.threads, [&](int64_t r) {
    const RowSoftmax row(a.softmax, r);
    const NelboRow state(a.alpha[r], a.dalpha[r], a.vocab);
    const double c = state.c, w = state.w * static_cast<double>(a.grad[r]);
    const bool same = a.z[r] == a.x[r];
    const double spread = same ? 1 / (1 + c) : 1, miss = same ? 0 : 1;
    const double p_z = std::exp(a.saved[rows + r]), p_x = std::exp(a.saved[2 * rows + r]);
    const double r_z = 1 / (1 + c * p_z), r_x = 1 / (1 + c * p_x);
    const double at_z = w * p_z * c * r_z * (spread * v + c * miss - v / (1 - state.alpha) * r_z);
    const double at_x = -w * p_x * miss * c * c * r_x;
    const double mean = -w * spread * a.saved[4 * rows + r] + at_z + at_x;
    const Probability probability(a.saved[r]);
    const auto slope = static_cast<float>(-w * spread * c), level = static_cast<float>(-mean);
    const auto ratio = static_cast<float>(c);
    with_dtype(a.logits.dtype, [&](auto type) {
      using T = decltype(type);
      const T* data = a.logits.row<const T>(r);
      alignas(64) float x[kGroup];
      for (int64_t at = 0; at < a.logits.columns; at += kGroup) {
        const int64_t count = std::min(kGroup, a.logits.columns - at), token = a.first_token + at;
        read_transformed(data + at, count, token, row, x);
        for (int64_t i = 0; i < kGroup; i += kLanes) {
          const Floats p = probability(load(x + i));
          store(x + i, p * (slope / (p * ratio + 1.0f) + level));
        }
        const auto add = [&](int64_t id, double g) {
          if (id >= token && id < token + count) x[id - token] += static_cast<float>(g);
        };
        add(a.z[r], at_z);
        add(a.x[r], at_x);
        with_dtype(a.out.dtype, [&](auto out) { write_group(a.out.row<decltype(out)>(r) + at, count, x); });
      }
    });
  });
}

}  // namespace dlcore::DLCORE_ISA
