// A draw from two blended streams in one read of both. Compiled once per ISA level.
//
// First the groups of 256 tokens of each stream are summed up, which gives its normaliser. The same sums
// bound what a group can score in the draw, and only groups that may win are blended, from the cache.
#include "../common/guidance.h"

#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace dlcore::DLCORE_ISA {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLogGroup = 5.5451775f;
// Rounding of scores and bounds can't reach this, and this part of them.
constexpr float kSlack = 1e-3f, kSlackPart = 1e-5f;
// Loops over a group take so many entries a step, or half as many.
constexpr int64_t kStep = 4 * kLanes;

int64_t rounded_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

template <class T>
float largest_ahead(const T* p, int64_t count) {
  Floats m[2] = {broadcast(kNone), broadcast(kNone)};
  for (int64_t i = 0; i < count; i += kAbreast * kLanes) {
    prefetch<kAbreast * kLanes>(p + i, kAhead);
    const WideFloats x = load_wide(p + i);
    for (int k = 0; k < kAbreast; ++k) m[k % 2] = max(slice(x, k), m[k % 2]);
  }
  return largest(max(m[0], m[1]));
}

// Σ 2^((x - top)·slope), NaN where an entry is NaN or +inf.
template <class T>
float sum_below(float top, const T* p, int64_t count, float slope) {
  Floats total[2] = {broadcast(0.0f), broadcast(0.0f)};
#pragma GCC unroll 1
  for (int64_t i = 0; i < count; i += kAbreast * kLanes) {
    const WideFloats e = exp2(max(kExponentFloor, (load_wide(p + i) - top) * slope));
    for (int k = 0; k < kAbreast; ++k) total[k % 2] = total[k % 2] + slice(e, k);
  }
  return sum(total[0] + total[1]);
}

// Logarithms of a stream's masses: over the noise, or over the largest one where there is none.
template <bool noisy>
struct LogMasses {
  float top, inverse_temperature, odds;
  WideFloats operator()(const float* x) const {
    const WideFloats drop = load_wide(x) - top;
    if constexpr (!noisy) return max(kNever, drop * inverse_temperature);
    return log(exp2(max(kExponentFloor, drop * (inverse_temperature * kLog2E))) * odds + 1.0f);
  }
};

// Of sixteen groups, over the noise: the logarithms of the mass of their largest entries, and of all.
struct GroupMasses {
  Floats largest, total;
};

// One stream, row by row.
class Stream {
 public:
  explicit Stream(const View& logits)
      : logits_(logits),
        groups_((logits.columns + kGroup - 1) / kGroup),
        largest_(static_cast<size_t>(rounded_up(groups_, kLanes)), kNone),
        sums_(largest_.size()) {}

  // Takes in row r; false if it is broken.
  bool read(int64_t r, const RowSoftmax& softmax, const GuidedRow& row) {
    softmax_ = softmax;
    slope_ = softmax.inverse_temperature * kLog2E;
    with_dtype(logits_.dtype, [&](auto type) { sum_groups(logits_.row<const decltype(type)>(r)); });
    top_ = groups_ == 1 ? largest_[0] : largest(largest_.data(), static_cast<int64_t>(largest_.size()));
    if (top_ == kNone) return false;
    const float total = groups_ == 1 ? sums_[0] : total_below_top();
    odds_ = row.odds(total);
    return total == total;
  }

  template <bool noisy>
  LogMasses<noisy> log_masses() const {
    return {top_, softmax_.inverse_temperature, odds_};
  }

  // The entries of a group, -inf past the end.
  const float* group(int64_t g) {
    if (g != held_)
      with_dtype(logits_.dtype,
                 [&](auto type) { read_group_of(static_cast<const decltype(type)*>(data_), g); });
    return buffer_;
  }

  // Of sixteen groups from g on.
  GroupMasses masses(int64_t g) const {
    const Floats largest = below_top(g) * odds_;
    return {log(largest + 1.0f), log(largest * load(&sums_[g]) + static_cast<float>(kGroup))};
  }

 private:
  // exp of the largest entries of sixteen groups over the row's.
  Floats below_top(int64_t g) const {
    return exp2(max(kExponentFloor, (load(&largest_[g]) - top_) * slope_));
  }

  float total_below_top() const {
    Floats total = broadcast(0.0f);
    for (int64_t g = 0; g < groups_; g += kLanes) total = fused(below_top(g), load(&sums_[g]), total);
    return sum(total);
  }

  template <class T>
  void read_group_of(const T* p, int64_t g) {
    held_ = g;
    const int64_t at = g * kGroup;
    read_transformed(p + at, std::min(kGroup, logits_.columns - at), at, softmax_, buffer_);
  }

  template <class T>
  void sum_groups(const T* p) {
    data_ = p;
    held_ = -1;
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t at = g * kGroup;
      if (at + kGroup <= logits_.columns && !softmax_.special(at)) {
        sum_group(g, p + at, kGroup);
        continue;
      }
      read_group_of(p, g);
      sum_group(g, buffer_, rounded_up(std::min(kGroup, logits_.columns - at), kStep));
    }
  }

  template <class T>
  void sum_group(int64_t g, const T* p, int64_t count) {
    largest_[g] = largest_ahead(p, count);
    // A group with nothing but -inf has the sum of nothing, not NaN.
    sums_[g] = sum_below(std::max(largest_[g], std::numeric_limits<float>::lowest()), p, count, slope_);
  }

  View logits_;
  const void* data_ = nullptr;
  int64_t groups_, held_ = -1;  // the group that the buffer holds
  RowSoftmax softmax_;
  float slope_ = 0, top_ = 0, odds_ = 0;
  std::vector<float> largest_, sums_;  // of groups: the sums over their own largest entries
  alignas(64) float buffer_[kGroup];
};

class GuidedDraw {
 public:
  explicit GuidedDraw(const GuidedStepArguments& a)
      : a_(a),
        vocab_(a.cond.columns),
        groups_((vocab_ + kGroup - 1) / kGroup),
        cond_(a.cond),
        uncond_(a.uncond),
        bounds_(static_cast<size_t>(rounded_up(groups_, 2 * kLanes))),
        noise_(bounds_.size()) {}

  int64_t operator()(int64_t r) {
    row_ = GuidedRow(&a_.coefficients[r], vocab_ - (a_.exclude >= 0));
    z_ = a_.z[r];
    if (row_.keeps) return z_;
    RowSoftmax softmax;
    softmax.index = z_;
    softmax.exclude = a_.exclude;
    softmax.shift = row_.shift;
    softmax.inverse_temperature = row_.inverse_temperature;
    if (!cond_.read(r, softmax, row_) || !uncond_.read(r, softmax, row_)) return -1;
    blended_ = -1;
    const Key key = a_.keys[r];
    return draw_in_group(groups_ == 1 ? 0 : best_group(key), key);
  }

 private:
  int64_t tokens_of(int64_t g) const { return std::min(kGroup, vocab_ - g * kGroup); }

  // The group of the highest score, the first of several; groups that can't have it are not looked at.
  int64_t best_group(Key key) {
    fill_gumbel(key, Domain::kGroup, 0, static_cast<int64_t>(noise_.size()), noise_.data());
    set_bounds();
    double best = kNone;
    int64_t winner = 0;
    const auto consider = [&](int64_t g) {
      const double score = group_score(g, best);
      if (score < best || (score == best && g > winner)) return;
      best = score;
      winner = g;
    };
    const int64_t likely = first_largest(bounds_.data(), static_cast<int64_t>(bounds_.size())).at;
    consider(likely);
    for (int64_t g = 0; g < groups_; ++g)
      if (bounds_[g] >= best && g != likely) consider(g);
    return winner;
  }

  // At least the score of each group; without noise there is no such bound.
  void set_bounds() {
    if (!row_.noisy()) return std::fill(bounds_.begin(), bounds_.end(), -kNone);
    for (int64_t g = 0; g < groups_; g += kLanes) {
      const GroupMasses c = cond_.masses(g), u = uncond_.masses(g);
      const Floats bound = row_.bound(row_.nearer_is_cond() ? c.largest : u.largest, c.total, u.total);
      store(&bounds_[g], bound * (1.0f + kSlackPart) + (load(&noise_[g]) + kSlack));
    }
    std::fill(bounds_.begin() + groups_, bounds_.end(), kNone);
    if (z_ >= 0 && z_ < vocab_) bounds_[z_ / kGroup] += std::max(0.0f, row_.bonus) * (1.0f + kSlackPart);
  }

  // logsumexp of a group and its noise, or less than `best`.
  double group_score(int64_t g, double best) {
    blend(g);
    const int64_t count = rounded_up(tokens_of(g), kStep);
    const float top = largest(guided_, count);
    // In double: a large γ makes the slack less than a rounding of float.
    if (top == kNone || static_cast<double>(top) + kLogGroup + kSlack + noise_[g] < best) return kNone;
    return top + std::log(static_cast<double>(sum_below(top, guided_, count, kLog2E))) + noise_[g];
  }

  int64_t draw_in_group(int64_t g, Key key) {
    if (blended_ != g) blend(g);
    const int64_t count = rounded_up(tokens_of(g), 2 * kLanes);
    alignas(64) float scores[kGroup];
    fill_gumbel(key, Domain::kToken, g * kGroup, count, scores);
    for (int64_t i = 0; i < count; i += kLanes) store(scores + i, load(guided_ + i) + load(scores + i));
    const Largest best = first_largest(scores, count);
    return best.value == kNone ? -1 : g * kGroup + best.at;
  }

  void blend(int64_t g) {
    row_.noisy() ? blend<true>(g) : blend<false>(g);
    blended_ = g;
  }

  // The guided logarithms of a group, -inf past the end.
  template <bool noisy>
  void blend(int64_t g) {
    const float *c = cond_.group(g), *u = uncond_.group(g);
    const LogMasses<noisy> of_c = cond_.log_masses<noisy>(), of_u = uncond_.log_masses<noisy>();
    const GuidedRow row = row_;
    const int64_t count = tokens_of(g), first = g * kGroup;
    for (int64_t i = 0; i < count; i += kAbreast * kLanes)
      store(guided_ + i, row.blend(of_c(c + i), of_u(u + i)));
    std::fill(guided_ + count, guided_ + rounded_up(count, kStep), kNone);
    if (z_ >= first && z_ < first + count) guided_[z_ - first] += row_.bonus;
    if (a_.exclude >= first && a_.exclude < first + count) guided_[a_.exclude - first] = kNone;
  }

  GuidedStepArguments a_;
  int64_t vocab_, groups_, z_ = 0, blended_ = -1;
  GuidedRow row_;
  Stream cond_, uncond_;
  std::vector<float> bounds_, noise_;  // of groups
  alignas(64) float guided_[kGroup];
};

}  // namespace

void guided_step(const GuidedStepArguments& a) {
  parallel_ranges(a.cond.rows, a.threads, [&](int64_t begin, int64_t end) {
    GuidedDraw draw(a);
    for (int64_t r = begin; r < end; ++r) a.tokens[r] = draw(r);
  });
}

}  // namespace dlcore::DLCORE_ISA
