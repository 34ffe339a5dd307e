// From a scanned row to statistics and a token: a few numbers, in double, on the host or a device.
#pragma once

#include <cmath>

#include "categorical.h"

namespace dlcore {

// Row r of a (count, rows) array.
template <class T, class... V>
DLCORE_HD void put_column(T* data, int64_t rows, int64_t r, V... values) {
  T* p = data + r;
  ((*p = static_cast<T>(values), p += rows), ...);
}

// numbers (6, rows): logsumexp, argmax_logprob, margin, entropy, index_logprob, runner_up_logprob.
DLCORE_HD inline void finish_stats_row(const Summary& s, int64_t rows, int64_t r, int64_t* argmax,
                                       float* numbers) {
  argmax[r] = s.empty() ? -1 : s.argmax;
  if (s.empty()) return put_column(numbers, rows, r, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN);
  const double log_sum = std::log(s.sum), second = s.second - s.top - log_sum;
  const double margin = std::exp(-log_sum) - std::exp(second), entropy = log_sum - s.weighted / s.sum;
  put_column(numbers, rows, r, s.top + log_sum, -log_sum, margin, entropy, s.index_logit - s.top - log_sum,
             second);
}

// tokens (2, rows): drawn, argmax; numbers (7, rows): those of finish_stats_row and the draw's
// log-probability. `drawn` is the state of the scan that drew, `s` that of the whole row.
DLCORE_HD inline void finish_sample_row(const Summary& s, const Summary& drawn, int64_t rows, int64_t r,
                                        int64_t* tokens, float* numbers) {
  finish_stats_row(s, rows, r, tokens + rows, numbers);
  tokens[r] = s.empty() ? -1 : drawn.token;
  numbers[6 * rows + r] = static_cast<float>(s.log_prob(drawn.token_logit));
}

// What merges with other parts of the vocabulary. numbers (8, rows): top, second, sum (NaN where NaN or +inf
// was seen), weighted, the draw's score and logit, the logits at index and at target; tokens (2, rows):
// argmax, draw.
DLCORE_HD inline void finish_summary_row(const Summary& s, int64_t rows, int64_t r, int64_t* tokens,
                                         double* numbers) {
  put_column(tokens, rows, r, s.empty() ? -1 : s.argmax, s.empty() ? -1 : s.token);
  put_column(numbers, rows, r, s.top, s.second, s.invalid ? kNaN : s.sum, s.weighted, s.score, s.token_logit,
             s.index_logit, s.target_logit);
}

// numbers (3, rows): log p[target], log p[index], logsumexp; 0 where target < 0.
DLCORE_HD inline void finish_log_probs_row(const Summary& s, int64_t target, bool with_index, int64_t rows,
                                           int64_t r, double* numbers) {
  if (target < 0) return put_column(numbers, rows, r, 0, 0, 0);
  const double lse = s.logsumexp();
  put_column(numbers, rows, r, s.log_prob(s.target_logit), with_index ? s.log_prob(s.index_logit) : 0 * lse,
             lse);
}

// numbers (3, rows): KL, and the two logsumexps; NaN and -inf where one of the rows has nothing but -inf.
DLCORE_HD inline void finish_kl_row(const KLSummary& s, int64_t rows, int64_t r, double* numbers) {
  if (s.invalid) return put_column(numbers, rows, r, kNaN, kNaN, kNaN);
  const bool both = s.p_top > -kInfinity && s.q_top > -kInfinity;
  const double p = std::log(s.p_sum), q = std::log(s.q_sum);
  put_column(numbers, rows, r, both ? s.gap / s.p_sum - p + q : kNaN, s.p_top + p, s.q_top + q);
}

enum class Route { kKeep, kDraw, kPrior };

// The three ways of a reverse step, weighed by numbers that are affine in p(z).
struct Coefficients {
  double d0, d1, k0, k1, p0, p1;
  DLCORE_HD explicit Coefficients(const double* c)
      : d0(c[0]), d1(c[1]), k0(c[2]), k1(c[3]), p0(c[4]), p1(c[5]) {}
  DLCORE_HD bool need_p() const { return d1 != 0 || k1 != 0 || p1 != 0; }
  DLCORE_HD Route route(double p_z, double u) const {
    const double total = d0 + d1 * p_z, keep = k0 + k1 * p_z, take = p0 + p1 * p_z;
    // A state without any mass (a clean position with p(z) = 0) stays what it is.
    if (!(total > 0) || u * total < keep) return Route::kKeep;
    return u * total < keep + take ? Route::kDraw : Route::kPrior;
  }
};

// Whether a row's outcome does not depend on its logits.
DLCORE_HD inline bool mixture_skips(const MixtureArguments& a, int64_t r) {
  const Coefficients c(&a.coefficients[r]);
  const double u = uniform(bits(block(a.keys[r], Domain::kRoute, 0), 0));
  return !c.need_p() && c.route(0, u) != Route::kDraw;
}

DLCORE_HD inline int64_t finish_mixture_row(const MixtureArguments& a, const Summary& s, bool skipped,
                                            int64_t r) {
  if (!skipped && s.empty()) return -1;
  const Coefficients c(&a.coefficients[r]);
  const Block noise = block(a.keys[r], Domain::kRoute, 0);
  const bool greedy = a.temperature && a.temperature[r] == 0;
  double p_z = 0;
  if (c.need_p()) p_z = greedy ? (s.argmax == a.z[r]) : std::exp(s.log_prob(s.index_logit));
  const Route route = c.route(p_z, uniform(bits(noise, 0)));
  if (route == Route::kKeep) return a.z[r];
  if (route == Route::kDraw) return s.token;
  if (a.prior >= 0) return a.prior;
  const int64_t token = below(bits(noise, 1), a.vocab - (a.exclude >= 0));
  return a.exclude >= 0 && token >= a.exclude ? token + 1 : token;
}

}  // namespace dlcore
