// The categorical family on the CPU: what a scan of the logits leaves behind, and what is made of it.
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

  bool empty() const { return invalid || !(top > -kInfinity); }
  double logsumexp() const { return empty() ? kNaN : top + std::log(sum); }
  // Of a logit; differences first, so that a common offset costs no digits.
  double log_prob(double logit) const { return empty() ? kNaN : logit - top - std::log(sum); }
};

// The part of a row's order that a truncated draw keeps: above `threshold`, and `ties` entries equal to it.
struct Cut {
  float threshold;
  int64_t ties;
};

struct ScanArguments {
  View logits;              // (rows, columns): tokens [first_token, first_token + columns)
  int64_t first_token = 0;  // a multiple of kGroup
  Softmax softmax;
  PerRow<int64_t> target;         // a second token to read; rows with target < 0 are not read at all
  Keys keys;                      // null: no draw
  const uint8_t* skip = nullptr;  // rows not to read
  Cut* cuts = nullptr;            // null: no truncation; ties are used up as they are met
  Summary* state = nullptr;       // (rows), merged into; started anew at token 0
  int threads = 1;
};

// One digit of the logits' ordered bits: how many entries have it, and their Σ exp(logit - top).
struct Bin {
  double mass;
  int64_t count;
};
constexpr int kLevels = 3;
constexpr int kLevelShift[kLevels] = {21, 10, 0};
constexpr int kLevelBits[kLevels] = {11, 11, 10};
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

// --- From scanned rows to results (the same code on every ISA level) ---

// numbers (6, rows): logsumexp, argmax_logprob, margin, entropy, index_logprob, runner_up_logprob.
void finish_stats(const Summary* state, int64_t rows, int64_t* argmax, float* numbers);

// tokens (2, rows): drawn, argmax; numbers (7, rows): those of finish_stats and the draw's log-probability.
// `drawn` is the state of the scan that drew, `state` that of the whole row.
void finish_sample(const Summary* state, const Summary* drawn, int64_t rows, int64_t* tokens, float* numbers);

// numbers (3, rows): log p[target], log p[index], logsumexp; 0 where target < 0.
void finish_log_probs(const Summary* state, PerRow<int64_t> target, bool with_index, int64_t rows,
                      double* numbers);

// references (2, rows): the largest logit so far or -inf, and the same with 0 for -inf, which exp is taken
// relative to. `factor` scales what was summed before; false if it is 1 for all rows.
bool follow_largest(const Summary* state, int64_t rows, bool start, double* references, float* factor);

void finish_logsumexp(const Summary* state, int64_t rows, double* logsumexp);

// numbers (3, rows): KL, and the two logsumexps.
void finish_kl(const KLSummary* state, int64_t rows, double* numbers);

struct MixtureArguments {
  int64_t rows = 0, vocab = 0;
  const int64_t* z = nullptr;
  PerRow<double> coefficients;  // stride 6 or 0
  int64_t prior = -1;           // a token, or -1: uniform
  int64_t exclude = -1;
  PerRow<float> temperature;
  Keys keys;
};

// Marks rows whose outcome does not depend on their logits.
void plan_mixture(const MixtureArguments&, uint8_t* skip);
void finish_mixture(const MixtureArguments&, const Summary* state, const uint8_t* skip, int64_t* tokens);

// Truncation: a selection is narrowed level by level; what it found is a cut.
void start_selections(const Summary* state, int64_t rows, PerRow<int64_t> top_k, PerRow<float> top_p,
                      const Selection* within, Selection* selections);
void narrow(const Bin* bins, int64_t rows, int level, Selection* selections);
void finish_selections(const Summary* state, int64_t rows, PerRow<float> min_p, PerRow<float> temperature,
                       const Selection* selections, Cut* cuts);

}  // namespace dlcore
