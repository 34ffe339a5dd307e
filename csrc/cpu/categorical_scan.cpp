// One read of the logits: statistics and an exact draw. Compiled once per ISA level.
//
// A segment of 65,536 tokens is scanned twice, the second time from the cache: first the largest entry of
// every group of 256, then Σ exp of the groups that can still matter. What may be skipped is thus known
// before any exponential is taken, and the same whatever the order, the threads or the ISA.
#include <vector>

#include "categorical.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace dlcore::DLCORE_ISA {
namespace {

constexpr int kSegmentGroups = kSegment / kGroup;
constexpr float kNone = -std::numeric_limits<float>::infinity();
// exp(-17.4) = 2^-25.1: a sum below it does not change a float32 result.
constexpr float kResolution = 17.4f;
constexpr float kLogGroup = 5.5451775f;
// Rounding of a group's score can't reach this.
constexpr float kSlack = 1e-3f;

// Lane by lane; their horizontal sums, a chain of latencies, are taken for several groups together.
struct GroupSum {
  Floats sum, weighted;
};

// The largest entries by lane; `check` turns to NaN or infinity where an entry is NaN or +inf.
template <class T>
inline Floats group_largest(const T* p, Floats& check) {
  Floats m[2] = {broadcast(kNone), broadcast(kNone)}, total[2] = {broadcast(0.0f), broadcast(0.0f)};
  for (int64_t i = 0; i < kGroup; i += kAbreast * kLanes) {
    prefetch<kAbreast * kLanes>(p + i, kAhead);
    const WideFloats x = load_wide(p + i);
    for (int k = 0; k < kAbreast; ++k) {
      m[k % 2] = max(slice(x, k), m[k % 2]);
      total[k % 2] = total[k % 2] + slice(x, k);
    }
  }
  check = check + (total[0] + total[1]);
  return max(m[0], m[1]);
}

// Σ e and Σ e·d with e = exp((x - top)/T), d = log2 e.
template <class T>
inline GroupSum group_sum(const T* p, float top, float scale) {
  const Floats zero = broadcast(0.0f);
  Floats total[2] = {zero, zero}, weighted[2] = {zero, zero};
#pragma GCC unroll 1
  for (int64_t i = 0; i < kGroup; i += kAbreast * kLanes) {
    const WideFloats d = max(kExponentFloor, (load_wide(p + i) - top) * scale);
    const WideFloats e = exp2(d);
    for (int k = 0; k < kAbreast; ++k) {
      total[k % 2] = total[k % 2] + slice(e, k);
      weighted[k % 2] = fused(slice(e, k), slice(d, k), weighted[k % 2]);
    }
  }
  return {total[0] + total[1], weighted[0] + weighted[1]};
}

template <class T>
bool holds_invalid(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = scalar(p[i]);
    if (!(x < std::numeric_limits<float>::infinity())) return true;
  }
  return false;
}

// One segment of one row: `count` tokens from id `first`.
template <class T>
class Segment {
 public:
  // `next`: what is read after this segment, or null; it is fetched while this one is computed.
  Segment(const T* data, int64_t first, int64_t count, const RowSoftmax& row, const T* next)
      : data_(data),
        next_(next),
        first_(first),
        count_(count),
        groups_((count + kGroup - 1) / kGroup),
        row_(row) {}

  Summary scan(const Key* key, int64_t target) {
    Summary s;
    find_largest(s);
    if (s.empty()) return s;
    if (key) fill_group_noise(*key);
    mark_live(key != nullptr);
    sum_live(s);
    s.argmax = first_ + best_ * kGroup + find_best_in_group(s);
    if (key) draw(*key, s);
    s.index_logit = logit(row_.index);
    s.target_logit = logit(target);
    return s;
  }

 private:
  bool plain(int64_t g) const { return (g + 1) * kGroup <= count_ && !row_.special(first_ + g * kGroup); }

  int64_t padded_groups() const { return (groups_ + kLanes - 1) / kLanes * kLanes; }

  // What is read next, asked for at an even pace, into the second-level cache: the first is busy.
  template <int64_t tokens>
  void fetch() {
    if (!next_) return;
    prefetch_lines<tokens * sizeof(T), 0, 2>(next_, fetched_);
    fetched_ += tokens * sizeof(T);
  }

  const float* buffered(int64_t g) {
    const int64_t at = g * kGroup;
    read_transformed(data_ + at, std::min(kGroup, count_ - at), first_ + at, row_, buffer_);
    return buffer_;
  }

  void find_largest(Summary& s) {
    Floats check = broadcast(0.0f), lanes[kLanes];
    for (int64_t g = 0; g < groups_; ++g) {
      Floats padded = check;
      lanes[g % kLanes] =
          plain(g) ? group_largest(data_ + g * kGroup, check) : group_largest(buffered(g), padded);
      fetch<kGroup / 4>();
      // A group of its own may hold -inf by right (past the end, excluded): it is looked at by itself.
      if (!plain(g)) s.invalid |= holds_invalid(buffer_, std::min(kGroup, count_ - g * kGroup));
      if (g % kLanes == kLanes - 1 || g + 1 == groups_)
        for (int64_t i = g / kLanes * kLanes; i <= g; ++i) largest_[i] = largest(lanes[i % kLanes]);
    }
    // Finite sums and -inf are fine; anything else may also be an overflow, so look closer.
    if (!(sum(check) < std::numeric_limits<float>::infinity()))
      for (int64_t g = 0; g < groups_; ++g)
        s.invalid |= plain(g) && holds_invalid(data_ + g * kGroup, kGroup);
    std::fill(largest_ + groups_, largest_ + padded_groups(), kNone);
    const Largest best = first_largest(largest_, padded_groups());
    best_ = best.at;
    top_ = best.value;
    s.top = static_cast<double>(top_) * row_.inverse_temperature;
  }

  // Draws come in pairs, so an odd first group is the second of its pair.
  void fill_group_noise(const Key& key) {
    const int64_t first = first_ / kGroup, odd = first % 2;
    fill_gumbel(key, Domain::kGroup, first - odd, groups_ + odd, noise_buffer_);
    noise_ = noise_buffer_ + odd;
  }

  // A group matters for the sum if it is above float32's resolution, for the draw if it could still win.
  void mark_live(bool with_draw) {
    const float scale = row_.inverse_temperature;
    const float sum_limit = -kResolution - std::log(static_cast<float>(groups_ * kGroup));
    const auto relative = [&](int64_t g) { return (load(largest_ + g) - top_) * scale; };
    float lead = 0;
    if (with_draw) {
      Floats most = broadcast(kNone);
      for (int64_t g = 0; g < groups_; g += kLanes) most = max(relative(g) + load(noise_ + g), most);
      lead = largest(most) - kLogGroup - kSlack;
    }
    for (int64_t g = 0; g < groups_; g += kLanes) {
      Floats above = relative(g) - sum_limit;
      if (with_draw) above = max(above, relative(g) + load(noise_ + g) - lead);
      store(live_ + g, above);
    }
  }

  void sum_live(Summary& s) {
    const float scale = row_.inverse_temperature * kLog2E;
    std::fill(sums_, sums_ + padded_groups(), 0.0f);
    int64_t groups[kLanes];
    GroupSum parts[kLanes];
    int waiting = 0;
    const auto add_up = [&] {
      for (int i = 0; i < waiting; ++i) {
        s.sum += sums_[groups[i]] = sum(parts[i].sum);
        s.weighted += sum(parts[i].weighted);
      }
      waiting = 0;
    };
    for (int64_t g = 0; g < groups_; ++g) {
      if (!(live_[g] >= 0) || largest_[g] == kNone) continue;
      fetch<kGroup - kGroup / 4>();
      groups[waiting] = g;
      parts[waiting] =
          plain(g) ? group_sum(data_ + g * kGroup, top_, scale) : group_sum(buffered(g), top_, scale);
      if (++waiting == kLanes) add_up();
    }
    add_up();
    s.weighted *= kLn2;
  }

  // The first entry equal to the largest; the largest other entry of the whole segment goes to s.second.
  int64_t find_best_in_group(Summary& s) {
    const float* x = buffered(best_);
    int64_t at = 0;
    while (at + 1 < kGroup && x[at] != top_) ++at;
    float second = kNone;
    for (int64_t i = 0; i < kGroup; ++i)
      if (i != at && x[i] > second) second = x[i];
    for (int64_t g = 0; g < groups_; ++g)
      if (g != best_ && largest_[g] > second) second = largest_[g];
    s.second = static_cast<double>(second) * row_.inverse_temperature;
    return at;
  }

  void draw(const Key& key, Summary& s) {
    float* scores = sums_;
    for (int64_t i = 0; i < groups_; i += kLanes) {
      const Floats total = load(sums_ + i);
      const Floats score = log(max(0x1p-120f, total)) + load(noise_ + i);
      store(scores + i, select(equal(total, 0.0f), kNone, score));
    }
    const Largest winner = first_largest(scores, padded_groups());
    s.score = s.top + winner.value;
    if (row_.greedy) {
      s.token = s.argmax;
      s.token_logit = s.top;
      return;
    }
    draw_in_group(key, winner.at, s);
  }

  void draw_in_group(const Key& key, int64_t g, Summary& s) {
    const float* x = buffered(g);
    alignas(64) float noise[kGroup];
    fill_gumbel(key, Domain::kToken, first_ + g * kGroup, kGroup, noise);
    for (int64_t i = 0; i < kGroup; i += kLanes)
      store(noise + i, fused(load(x + i) - top_, row_.inverse_temperature, load(noise + i)));
    const int64_t best = first_largest(noise, kGroup).at;
    s.token = first_ + g * kGroup + best;
    s.token_logit = static_cast<double>(x[best]) * row_.inverse_temperature;
  }

  double logit(int64_t token) const {
    if (token < first_ || token >= first_ + count_) return kNaN;
    return static_cast<double>(row_.transform(scalar(data_[token - first_]), token)) *
           row_.inverse_temperature;
  }

  const T* data_;
  const T* next_;
  uintptr_t fetched_ = 0;
  int64_t first_, count_, groups_, best_ = 0;
  float top_ = kNone;
  const RowSoftmax row_;
  alignas(64) float buffer_[kGroup];
  alignas(64) float largest_[kSegmentGroups];
  alignas(64) float noise_buffer_[kSegmentGroups + 2 * kLanes];
  const float* noise_ = noise_buffer_;
  alignas(64) float sums_[kSegmentGroups];
  alignas(64) float live_[kSegmentGroups];  // negative: the group can be skipped
};

bool set(double x) { return !std::isnan(x); }

Summary merge(const Summary& a, const Summary& b) {
  Summary r = a;
  r.invalid = a.invalid || b.invalid;
  if (set(b.index_logit)) r.index_logit = b.index_logit;
  if (set(b.target_logit)) r.target_logit = b.target_logit;
  if (r.invalid || b.empty()) return r;
  r.top = std::max(a.top, b.top);
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
  r.second = b_leads ? std::max(a.top, b.second) : std::max(a.second, b.top);
  if (b.score > a.score) {
    r.score = b.score;
    r.token = b.token;
    r.token_logit = b.token_logit;
  }
  return r;
}

// Groups of a row copied, transformed and cut, for what the plain loops can't read directly.
template <class T>
const float* copy_transformed(const T* p, int64_t count, int64_t first, const RowSoftmax& row, Cut* cut,
                              std::vector<float>& out) {
  out.resize(static_cast<size_t>(kSegment));
  for (int64_t at = 0; at < count; at += kGroup)
    read_transformed(p + at, std::min(kGroup, count - at), first + at, row, out.data() + at);
  if (!cut) return out.data();
  for (int64_t i = 0; i < count; ++i) {
    float& x = out[static_cast<size_t>(i)];
    if (x > cut->threshold || std::isnan(x)) continue;
    if (x == cut->threshold && cut->ties > 0)
      --cut->ties;
    else
      x = kNone;
  }
  return out.data();
}

template <class T>
Summary scan_segment(const ScanArguments& a, int64_t r, int64_t begin) {
  const int64_t first = a.first_token + begin, count = std::min(kSegment, a.logits.columns - begin);
  const T* row_data = a.logits.row<const T>(r);
  const T* data = row_data + begin;
  RowSoftmax row(a.softmax, r);
  const Key key = a.keys ? a.keys[r] : Key{};
  const Key* draw = a.keys ? &key : nullptr;
  const int64_t target = a.target ? a.target[r] : -1;
  if (row.softcap == 0 && !a.cuts) {
    const T* next = row_data;
    if (begin + count < a.logits.columns)
      next = data + count;
    else
      next = r + 1 < a.logits.rows ? a.logits.row<const T>(r + 1) : nullptr;
    return Segment<T>(data, first, count, row, next).scan(draw, target);
  }
  thread_local std::vector<float> copy;
  const float* transformed = copy_transformed(data, count, first, row, a.cuts ? a.cuts + r : nullptr, copy);
  row.softcap = row.shift = 0;
  row.exclude = -1;
  return Segment<float>(transformed, first, count, row, nullptr).scan(draw, target);
}

Summary scan_at(const ScanArguments& a, int64_t r, int64_t begin) {
  Summary s;
  with_dtype(a.logits.dtype, [&](auto type) { s = scan_segment<decltype(type)>(a, r, begin); });
  return s;
}

bool unread(const ScanArguments& a, int64_t r) {
  return (a.skip && a.skip[r]) || (a.target && a.target[r] < 0);
}

}  // namespace

Summary scan_row(const ScanArguments& a, int64_t r) {
  Summary s;
  for (int64_t begin = 0; begin < a.logits.columns; begin += kSegment) s = merge(s, scan_at(a, r, begin));
  return s;
}

void scan(const ScanArguments& a) {
  const int64_t segments = (a.logits.columns + kSegment - 1) / kSegment;
  // Ties are used up in order, and whole rows merge without a workspace; few long rows are shared by segment.
  if (a.cuts || segments == 1 || a.logits.rows >= 4 * a.threads) {
    parallel_for(a.logits.rows, a.threads, [&](int64_t r) {
      if (a.first_token == 0) a.state[r] = {};
      if (!unread(a, r)) a.state[r] = merge(a.state[r], scan_row(a, r));
    });
    return;
  }
  std::vector<Summary> parts(static_cast<size_t>(a.logits.rows * segments));
  parallel_for(a.logits.rows * segments, a.threads, [&](int64_t i) {
    if (!unread(a, i / segments))
      parts[static_cast<size_t>(i)] = scan_at(a, i / segments, i % segments * kSegment);
  });
  for (int64_t i = 0; i < a.logits.rows * segments; ++i) {
    Summary& s = a.state[i / segments];
    if (a.first_token == 0 && i % segments == 0) s = {};
    if (!unread(a, i / segments)) s = merge(s, parts[static_cast<size_t>(i)]);
  }
}

}  // namespace dlcore::DLCORE_ISA
