// From scanned rows to statistics, tokens and cuts: a few numbers per row, in double.
#include "../common/categorical_finish.h"

#include <algorithm>

#include "../common/categorical_cut.h"
#include "categorical.h"

namespace dlcore {

void finish_stats(const Summary* state, int64_t rows, int64_t* argmax, float* numbers) {
  for (int64_t r = 0; r < rows; ++r) finish_stats_row(state[r], rows, r, argmax, numbers);
}

void finish_sample(const Summary* state, const Summary* drawn, int64_t rows, int64_t* tokens,
                   float* numbers) {
  for (int64_t r = 0; r < rows; ++r) finish_sample_row(state[r], drawn[r], rows, r, tokens, numbers);
}

void finish_summary(const Summary* state, int64_t rows, int64_t* tokens, double* numbers) {
  for (int64_t r = 0; r < rows; ++r) finish_summary_row(state[r], rows, r, tokens, numbers);
}

void finish_log_probs(const Summary* state, PerRow<int64_t> target, bool with_index, int64_t rows,
                      double* numbers) {
  for (int64_t r = 0; r < rows; ++r) finish_log_probs_row(state[r], target[r], with_index, rows, r, numbers);
}

bool follow_largest(const Summary* state, int64_t rows, bool start, double* references, float* factor) {
  bool moved = false;
  for (int64_t r = 0; r < rows; ++r) {
    const double before = start ? -kInfinity : references[r], top = state[r].top;
    factor[r] = before > -kInfinity ? static_cast<float>(std::exp(before - top)) : 0.0f;
    moved |= !start && before != top;
    references[r] = top;
    references[rows + r] = top > -kInfinity ? top : 0;
  }
  return moved;
}

void finish_logsumexp(const Summary* state, int64_t rows, double nothing, double* logsumexp) {
  for (int64_t r = 0; r < rows; ++r)
    logsumexp[r] = state[r].empty() && !state[r].invalid ? nothing : state[r].logsumexp();
}

void finish_kl(const KLSummary* state, int64_t rows, double* numbers) {
  for (int64_t r = 0; r < rows; ++r) finish_kl_row(state[r], rows, r, numbers);
}

void plan_mixture(const MixtureArguments& a, uint8_t* skip) {
  for (int64_t r = 0; r < a.rows; ++r) skip[r] = mixture_skips(a, r);
}

void finish_mixture(const MixtureArguments& a, const Summary* state, const uint8_t* skip, int64_t* tokens) {
  for (int64_t r = 0; r < a.rows; ++r) tokens[r] = finish_mixture_row(a, state[r], skip[r] != 0, r);
}

// `within`: an earlier selection by count alone; max_mass is then a part of the mass that it keeps.
void start_selections(const Summary* state, int64_t rows, PerRow<int64_t> top_k, PerRow<float> top_p,
                      const Selection* within, Selection* selections) {
  for (int64_t r = 0; r < rows; ++r)
    selections[r] = start_selection(state[r], top_k, top_p, within ? within + r : nullptr, r);
}

void narrow(const Bin* bins, int64_t rows, int level, Selection* selections) {
  for (int64_t r = 0; r < rows; ++r)
    if (!selections[r].everything) narrow_row(bins + r * kBins, most_digit(level), level, selections[r]);
}

void finish_selections(const Summary* state, int64_t rows, PerRow<float> min_p, PerRow<float> temperature,
                       const Selection* selections, Cut* cuts) {
  for (int64_t r = 0; r < rows; ++r)
    cuts[r] = finish_selection(state[r], min_p, temperature, selections ? selections + r : nullptr, r);
}

}  // namespace dlcore
