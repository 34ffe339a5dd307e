// From scanned rows to statistics, tokens and cuts: a few numbers per row, in double.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "categorical.h"

namespace dlcore {
namespace {

// A row's numbers, column r of a (count, rows) array.
template <class T>
class Column {
 public:
  Column(T* data, int64_t rows, int64_t r) : data_(data + r), rows_(rows) {}
  void operator=(std::initializer_list<double> values) {
    T* p = data_;
    for (double v : values) {
      *p = static_cast<T>(v);
      p += rows_;
    }
  }

 private:
  T* data_;
  int64_t rows_;
};

struct RowStats {
  double logsumexp, top, margin, entropy, index, second;
};

RowStats row_stats(const Summary& s) {
  if (s.empty()) return {kNaN, kNaN, kNaN, kNaN, kNaN, kNaN};
  const double log_sum = std::log(s.sum), second = s.second - s.top - log_sum;
  const double margin = std::exp(-log_sum) - std::exp(second), entropy = log_sum - s.weighted / s.sum;
  return {s.top + log_sum, -log_sum, margin, entropy, s.index_logit - s.top - log_sum, second};
}

}  // namespace

void finish_stats(const Summary* state, int64_t rows, int64_t* argmax, float* numbers) {
  for (int64_t r = 0; r < rows; ++r) {
    const RowStats s = row_stats(state[r]);
    argmax[r] = state[r].empty() ? -1 : state[r].argmax;
    Column(numbers, rows, r) = {s.logsumexp, s.top, s.margin, s.entropy, s.index, s.second};
  }
}

void finish_sample(const Summary* state, const Summary* drawn, int64_t rows, int64_t* tokens,
                   float* numbers) {
  finish_stats(state, rows, tokens + rows, numbers);
  for (int64_t r = 0; r < rows; ++r) {
    const bool empty = state[r].empty();
    tokens[r] = empty ? -1 : drawn[r].token;
    numbers[6 * rows + r] = static_cast<float>(state[r].log_prob(drawn[r].token_logit));
  }
}

void finish_log_probs(const Summary* state, PerRow<int64_t> target, bool with_index, int64_t rows,
                      double* numbers) {
  for (int64_t r = 0; r < rows; ++r) {
    const Summary& s = state[r];
    const double lse = s.logsumexp();
    if (target[r] < 0)
      Column(numbers, rows, r) = {0, 0, 0};
    else
      Column(numbers, rows, r) = {s.log_prob(s.target_logit),
                                  with_index ? s.log_prob(s.index_logit) : 0 * lse, lse};
  }
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
  for (int64_t r = 0; r < rows; ++r) {
    const KLSummary& s = state[r];
    const bool empty = s.invalid || !(s.p_top > -kInfinity) || !(s.q_top > -kInfinity);
    const double p = std::log(s.p_sum), q = std::log(s.q_sum);
    if (empty)
      Column(numbers, rows, r) = {kNaN, kNaN, kNaN};
    else
      Column(numbers, rows, r) = {s.gap / s.p_sum - p + q, s.p_top + p, s.q_top + q};
  }
}

namespace {

struct Coefficients {
  double d0, d1, k0, k1, p0, p1;
  explicit Coefficients(const double* c) : d0(c[0]), d1(c[1]), k0(c[2]), k1(c[3]), p0(c[4]), p1(c[5]) {}
  bool need_p() const { return d1 != 0 || k1 != 0 || p1 != 0; }
};

enum class Route { kKeep, kDraw, kPrior };

Route route(const Coefficients& c, double p_z, double u) {
  const double total = c.d0 + c.d1 * p_z, keep = c.k0 + c.k1 * p_z, take = c.p0 + c.p1 * p_z;
  // A state without any mass (a clean position with p(z) = 0) stays what it is.
  if (!(total > 0) || u * total < keep) return Route::kKeep;
  return u * total < keep + take ? Route::kDraw : Route::kPrior;
}

}  // namespace

void plan_mixture(const MixtureArguments& a, uint8_t* skip) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const Coefficients c(&a.coefficients[r]);
    const double u = uniform(bits(block(a.keys[r], Domain::kRoute, 0), 0));
    skip[r] = !c.need_p() && route(c, 0, u) != Route::kDraw;
  }
}

void finish_mixture(const MixtureArguments& a, const Summary* state, const uint8_t* skip, int64_t* tokens) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const Summary& s = state[r];
    if (!skip[r] && s.empty()) {
      tokens[r] = -1;
      continue;
    }
    const Coefficients c(&a.coefficients[r]);
    const Block noise = block(a.keys[r], Domain::kRoute, 0);
    const bool greedy = a.temperature && a.temperature[r] == 0;
    double p_z = 0;
    if (c.need_p()) p_z = greedy ? (s.argmax == a.z[r]) : std::exp(s.log_prob(s.index_logit));
    switch (route(c, p_z, uniform(bits(noise, 0)))) {
      case Route::kKeep:
        tokens[r] = a.z[r];
        break;
      case Route::kDraw:
        tokens[r] = s.token;
        break;
      case Route::kPrior:
        tokens[r] = a.prior;
        if (a.prior >= 0) break;
        tokens[r] = below(bits(noise, 1), a.vocab - (a.exclude >= 0));
        if (a.exclude >= 0 && tokens[r] >= a.exclude) ++tokens[r];
    }
  }
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
