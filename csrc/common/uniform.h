// The uniform-state NELBO.
#pragma once

#include "categorical.h"
#include "numbers.h"

namespace dlcore {

struct NelboArguments {
  bool scan = false;       // whole rows: scan each for the first three of `saved` while the cache holds it
  PerRow<int64_t> target;  // x, for the scan
  View logits;
  int64_t first_token = 0, vocab = 0;
  Softmax softmax;  // index: z, shift: from a denoiser to leave-one-out
  PerRow<double> alpha;
  double* saved = nullptr;  // (5, rows): logsumexp, log p(z), log p(x), Σ log1p(c p), Σ c p / (1 + c p)
  int threads = 1;
};

struct NelboBackwardArguments {
  View logits;
  int64_t first_token = 0, vocab = 0;
  Softmax softmax;
  const int64_t* z = nullptr;
  const int64_t* x = nullptr;
  PerRow<double> alpha, dalpha;
  const float* grad = nullptr;  // (rows)
  const double* saved = nullptr;
  View out;
  int threads = 1;
};

// A token's part in the NELBO; c = Vα / (1 - α), w = -α' / (Vα).
struct NelboRow {
  double alpha, c, w;
  DLCORE_HD NelboRow(double alpha, double dalpha, int64_t vocab)
      : alpha(alpha),
        c(static_cast<double>(vocab) * alpha / (1 - alpha)),
        w(-dalpha / (static_cast<double>(vocab) * alpha)) {}
};

// The first three of a row's saved numbers, from its scan.
DLCORE_HD inline void start_nelbo(const Summary& s, int64_t r, int64_t rows, double* saved) {
  const double lse = s.logsumexp();
  saved[r] = lse;
  saved[rows + r] = s.index_logit - lse;
  saved[2 * rows + r] = s.target_logit - lse;
}

// The loss of a row, nats. With ℓ = log1p(c p), S = Σ ℓ, Λ = log1p(c), n = V / (1 - α):
// z = x: w·{(V·ℓ_z - S - (V-1)·Λ) / (1+c) - n·(1 / (1+c) - e^-ℓ_z)}
// z ≠ x: w·{(1+c)·Λ + c·(ℓ_z - ℓ_x) + V·ℓ_z - S - n·(1 - e^-ℓ_z)}
DLCORE_HD inline float finish_nelbo_row(const double* saved, int64_t rows, int64_t r, int64_t vocab,
                                        bool same, double alpha, double dalpha) {
  const auto v = static_cast<double>(vocab);
  const NelboRow row(alpha, dalpha, vocab);
  const double c = row.c, n = v / (1 - row.alpha), lambda = std::log1p(c), s = saved[3 * rows + r];
  const double at_z = std::log1p(c * std::exp(saved[rows + r]));
  const double at_x = std::log1p(c * std::exp(saved[2 * rows + r]));
  if (same)
    return static_cast<float>(
        row.w * ((v * at_z - s - (v - 1) * lambda) / (1 + c) - n * (1 / (1 + c) - std::exp(-at_z))));
  return static_cast<float>(row.w *
                            ((1 + c) * lambda + c * (at_z - at_x) + v * at_z - s + n * std::expm1(-at_z)));
}

// The gradient of a row's loss times `grad`. dL/da_k = p_k (G_k - Σ p G) with G_k = w·{-A c r_k + [k=z]·(c
// r_z (AV + c n) - V/(1-α) c r_z^2) - [k=x] n c^2 r_x}, r = 1 / (1 + c p), A = 1/(1+c) and n = 0 where z = x,
// else 1 and 1.
struct NelboSlopes {
  float ratio, slope, level;  // p·(slope / (1 + ratio·p) + level)
  double at_z, at_x;          // terms of their own of these entries
  DLCORE_HD NelboSlopes(const double* saved, int64_t rows, int64_t r, int64_t vocab, bool same, double alpha,
                        double dalpha, double grad) {
    const auto v = static_cast<double>(vocab);
    const NelboRow state(alpha, dalpha, vocab);
    const double c = state.c, w = state.w * grad;
    const double spread = same ? 1 / (1 + c) : 1, miss = same ? 0 : 1;
    const double p_z = std::exp(saved[rows + r]), p_x = std::exp(saved[2 * rows + r]);
    const double r_z = 1 / (1 + c * p_z), r_x = 1 / (1 + c * p_x);
    at_z = w * p_z * c * r_z * (spread * v + c * miss - v / (1 - state.alpha) * r_z);
    at_x = -w * p_x * miss * c * c * r_x;
    const double mean = -w * spread * saved[4 * rows + r] + at_z + at_x;
    ratio = static_cast<float>(c);
    slope = static_cast<float>(-w * spread * c);
    level = static_cast<float>(-mean);
  }
};

// Of several factors 1 + y: their product less 1, and Σ y / (1 + y) times the product. Nothing cancels.
template <class Number>
struct Product {
  Number excess, weighted;
  DLCORE_HD explicit Product(const Number& y) : excess(y), weighted(y) {}
  DLCORE_HD Product(const Product& a, const Product& b)
      : excess(fused(a.excess, b.excess, a.excess + b.excess)),
        weighted(fused(a.weighted, b.excess + 1.0f, fused(b.weighted, a.excess, b.weighted))) {}
};

}  // namespace dlcore
