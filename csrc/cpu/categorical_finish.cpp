// From scanned rows to statistics, tokens and cuts: a few numbers per row, in double.
#include "../common/categorical_finish.h"

#include <algorithm>
#include <cstring>

#include "categorical.h"

namespace dlcore {

void finish_stats(const Summary* state, int64_t rows, int64_t* argmax, float* numbers) {
  for (int64_t r = 0; r < rows; ++r) finish_stats_row(state[r], rows, r, argmax, numbers);
}

void finish_sample(const Summary* state, const Summary* drawn, int64_t rows, int64_t* tokens,
                   float* numbers) {
  for (int64_t r = 0; r < rows; ++r) finish_sample_row(state[r], drawn[r], rows, r, tokens, numbers);
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

void finish_logsumexp(const Summary* state, int64_t rows, double* logsumexp) {
  for (int64_t r = 0; r < rows; ++r) logsumexp[r] = state[r].logsumexp();
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
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t count = top_k ? top_k[r] : std::numeric_limits<int64_t>::max();
    const double total = within && !within[r].everything ? within[r].mass : state[r].sum;
    selections[r] = {count, top_p ? top_p[r] * total : kInfinity};
  }
}

void narrow(const Bin* bins, int64_t rows, int level, Selection* selections) {
  for (int64_t r = 0; r < rows; ++r) {
    Selection& s = selections[r];
    if (s.everything) continue;
    const Bin* row = bins + r * kBins;
    int64_t b = (int64_t{1} << kLevelBits[level]) - 1;
    for (; b >= 0; --b) {
      if (s.count + row[b].count >= s.max_count || s.mass + row[b].mass > s.max_mass) break;
      s.count += row[b].count;
      s.mass += row[b].mass;
    }
    s.everything = b < 0;
    if (b >= 0) s.prefix |= static_cast<uint32_t>(b) << kLevelShift[level];
    if (level < kLevels - 1 || b < 0 || row[b].count == 0) continue;
    // All entries of the last bin are equal: keep as many of them as both limits allow.
    const double each = row[b].mass / static_cast<double>(row[b].count);
    const double by_mass = each > 0 ? std::floor((s.max_mass - s.mass) / each) + 1 : kInfinity;
    int64_t ties = std::min(row[b].count, s.max_count - s.count);
    if (by_mass < static_cast<double>(ties)) ties = static_cast<int64_t>(by_mass);
    s.mass += static_cast<double>(ties) * each;
    s.max_count = s.count + ties;
  }
}

void finish_selections(const Summary* state, int64_t rows, PerRow<float> min_p, PerRow<float> temperature,
                       const Selection* selections, Cut* cuts) {
  for (int64_t r = 0; r < rows; ++r) {
    cuts[r] = {-std::numeric_limits<float>::infinity(), std::numeric_limits<int64_t>::max()};
    if (selections && !selections[r].everything) {
      const uint32_t ordered = selections[r].prefix;
      const uint32_t raw = ordered & 0x80000000u ? ordered & 0x7FFFFFFFu : ~ordered;
      std::memcpy(&cuts[r].threshold, &raw, sizeof raw);
      cuts[r].ties = selections[r].max_count - selections[r].count;
    }
    if (!min_p || !(min_p[r] > 0)) continue;
    // The summary is scaled by the rounded 1/temperature; undone with the same number, the largest entry is
    // exact.
    const double inverse = temperature && temperature[r] > 0 ? 1.0f / temperature[r] : 1.0f;
    const auto bound = static_cast<float>((state[r].top + std::log(static_cast<double>(min_p[r]))) / inverse);
    // Entries equal to the bound are kept, so the threshold lies just below it.
    const float under = std::nextafter(bound, -std::numeric_limits<float>::infinity());
    if (under > cuts[r].threshold || (under == cuts[r].threshold && cuts[r].ties > 0)) cuts[r] = {under, 0};
  }
}

}  // namespace dlcore
