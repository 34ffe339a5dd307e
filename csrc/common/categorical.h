// The categorical family: what a scan of the logits leaves behind, and what is made of it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "view.h"

namespace dlcore {

constexpr int64_t kGroup = 256;             // tokens that share one Gumbel number of the first level
constexpr int64_t kSegment = 256 * kGroup;  // tokens that are scanned at once: they stay in the cache
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Softmax's parameters: (softcap(logits) + shift·1[index]) / temperature, `exclude` at probability 0.
struct Softmax {
  PerRow<int64_t> index;
  PerRow<float> shift;
  PerRow<float> temperature;  // 0 counts as 1; the draw is then the argmax
  float softcap = 0;          // 0: none
  int64_t exclude = -1;
};

// All that one read of (part of) a row tells. Logits are scaled by 1/temperature here.
struct Summary {
  double top = -kInfinity;     // largest logit
  double second = -kInfinity;  // largest other logit
  double sum = 0;              // Σ exp(logit - top)
  double weighted = 0;         // Σ exp(logit - top)·(logit - top)
  double score = -kInfinity;   // the draw's group score
  double token_logit = -kInfinity;
  double index_logit = kNaN;
  double target_logit = kNaN;
  int64_t argmax = -1;
  int64_t token = -1;
  bool invalid = false;  // NaN or +inf seen

  DLCORE_HD bool empty() const { return invalid || !(top > -kInfinity); }
  DLCORE_HD double logsumexp() const { return empty() ? kNaN : top + std::log(sum); }
  // Of a logit; differences first, so that a common offset costs no digits.
  DLCORE_HD double log_prob(double logit) const { return empty() ? kNaN : logit - top - std::log(sum); }
};

// What two parts of a row tell together; `a` comes first.
DLCORE_HD inline Summary merge(const Summary& a, const Summary& b) {
  Summary r = a;
  r.invalid = a.invalid || b.invalid;
  if (b.index_logit == b.index_logit) r.index_logit = b.index_logit;
  if (b.target_logit == b.target_logit) r.target_logit = b.target_logit;
  if (r.invalid || b.empty()) return r;
  r.top = a.top > b.top ? a.top : b.top;
  const auto add = [&r](const Summary& s) {
    const double drop = s.empty() ? 0 : s.top - r.top, factor = s.empty() ? 0 : std::exp(drop);
    r.sum += factor * s.sum;
    r.weighted += factor * (s.weighted + drop * s.sum);
  };
  r.sum = r.weighted = 0;
  add(a);
  add(b);
  const bool b_leads = b.top > a.top;
  r.argmax = b_leads ? b.argmax : a.argmax;
  r.second = b_leads ? (a.top > b.second ? a.top : b.second) : (a.second > b.top ? a.second : b.top);
  if (b.score > a.score) {
    r.score = b.score;
    r.token = b.token;
    r.token_logit = b.token_logit;
  }
  return r;
}

// The part of a row's order that a truncated draw keeps: above `threshold`, and `ties` entries equal to it.
struct Cut {
  float threshold;
  int64_t ties;
};

struct ScanArguments {
  View logits;              // (rows, columns): tokens [first_token, first_token + columns)
  int64_t first_token = 0;  // a multiple of kGroup, or all tokens lie in one group
  Softmax softmax;
  PerRow<int64_t> target;         // a second token to read; rows with target < 0 are not read at all
  Keys keys;                      // null: no draw
  const uint8_t* skip = nullptr;  // rows not to read
  Cut* cuts = nullptr;            // null: no truncation; ties are used up as they are met
  Summary* state = nullptr;       // (rows), merged into
  bool start = true;              // or started anew
  int threads = 1;
};

// One digit of the logits' ordered bits: how many entries have it, and their Σ exp(logit - top).
struct Bin {
  double mass;
  int64_t count;
};
constexpr int kLevels = 3;
// Digits of 11, 11 and 10 bits.
DLCORE_HD constexpr int level_shift(int level) { return level == 0 ? 21 : level == 1 ? 10 : 0; }
constexpr int64_t kBins = 1 << 11;

// The search for the last kept entry of one row, digit by digit, the largest first.
struct Selection {
  int64_t max_count;  // keep at most so many
  double max_mass;    // keep while the mass before does not exceed it
  int64_t count = 0;  // entries above the digits found so far
  double mass = 0;
  uint32_t prefix = 0;  // the digits found so far, in place
  bool everything = false;
};

struct HistogramArguments {
  View logits;
  int64_t first_token = 0, vocab = 0;
  Softmax softmax;
  const Summary* state = nullptr;
  const Selection* selections = nullptr;
  int level = 0;
  Bin* bins = nullptr;  // (rows, kBins), added to
  int threads = 1;
};

struct SoftmaxTileArguments {
  View logits;
  int64_t first_token = 0;
  Softmax softmax;
  const double* logsumexp = nullptr;  // (rows)
  View out;                           // (rows, columns) float32
  int threads = 1;
};

struct LogProbsBackwardArguments {
  View logits;
  int64_t first_token = 0;
  Softmax softmax;
  PerRow<int64_t> target;
  const double* grad = nullptr;     // (3, rows)
  const double* numbers = nullptr;  // (3, rows)
  View out;                         // (rows, columns) of the logits' dtype
  int threads = 1;
};

// Running sums of a KL divergence over the vocabulary: gap = Σ exp(p - p_top)·((p - p_top) - (q - q_top)).
struct KLSummary {
  double p_top = -kInfinity, q_top = -kInfinity;
  double p_sum = 0, q_sum = 0, gap = 0;
  bool invalid = false;
};

DLCORE_HD inline KLSummary merge(const KLSummary& a, const KLSummary& b) {
  KLSummary r;
  r.invalid = a.invalid || b.invalid;
  r.p_top = a.p_top > b.p_top ? a.p_top : b.p_top;
  r.q_top = a.q_top > b.q_top ? a.q_top : b.q_top;
  const auto add = [&r](const KLSummary& s) {
    const double q_drop = s.q_top > -kInfinity ? s.q_top - r.q_top : 0;
    if (s.q_top > -kInfinity) r.q_sum += std::exp(q_drop) * s.q_sum;
    if (!(s.p_top > -kInfinity)) return;
    const double p_drop = s.p_top - r.p_top, factor = std::exp(p_drop);
    r.p_sum += factor * s.p_sum;
    r.gap += factor * (s.gap + s.p_sum * (p_drop - q_drop));
  };
  add(a);
  add(b);
  return r;
}

struct KLArguments {
  View p, q;
  PerRow<float> temperature;
  KLSummary* state = nullptr;
  int threads = 1;
};

struct KLBackwardArguments {
  View p, q;
  PerRow<float> temperature;
  const double* grad = nullptr;     // (3, rows)
  const double* numbers = nullptr;  // (3, rows): KL and the logsumexps
  View p_out, q_out;
  int threads = 1;
};

struct MixtureArguments {
  int64_t rows = 0, vocab = 0;
  const int64_t* z = nullptr;
  PerRow<double> coefficients;  // stride 6 or 0
  int64_t prior = -1;           // a token, or -1: uniform
  int64_t exclude = -1;
  PerRow<float> temperature;
  Keys keys;
};

}  // namespace dlcore
