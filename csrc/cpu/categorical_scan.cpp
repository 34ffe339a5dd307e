// One read of the logits: statistics and an exact draw. Compiled once per ISA level.
//
// A segment of 65,536 tokens is scanned twice, the second time from the cache: first the largest entry of
// every group of 256, then Σ exp of the groups that can still matter. What may be skipped is thus known
// before any exponential is taken, and the same whatever the order, the threads or the ISA. The first pass,
// bound by memory, runs beside the second of the segment before, bound by arithmetic.
#include <type_traits>
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
// How many bytes ahead of the first pass the second-level cache is filled, the first being busy; found by
// trial.
constexpr uintptr_t kFetchAhead = 65536;

// Lane by lane; their horizontal sums, a chain of latencies, are taken for several groups together.
struct GroupSum {
  Floats sum, weighted;
};

// The largest entries by lane; `check` turns to NaN or infinity where an entry is NaN or +inf.
template <class T>
inline Floats group_largest(const T* p, Floats& check) {
  Floats m[2] = {broadcast(kNone), broadcast(kNone)}, total[2] = {broadcast(0.0f), broadcast(0.0f)};
  for (int64_t i = 0; i < kGroup; i += kAbreast * kLanes) {
    prefetch_lines<kAbreast * kLanes * sizeof(T), 0, 2>(p + i, kFetchAhead);
    const WideFloats x = load_wide(p + i);
    for (int k = 0; k < kAbreast; ++k) {
      m[k % 2] = max(slice(x, k), m[k % 2]);
      total[k % 2] = total[k % 2] + slice(x, k);
    }
  }
  check = check + (total[0] + total[1]);
  return max(m[0], m[1]);
}

// d = log2 exp((x - top)/T). With `fold` it is x·scale - product, one operation, which is too large by
// `excess`.
struct Relative {
  float top = 0, scale = 1, product = 0;
  bool fold = false;
  double excess = 0;

  Relative() = default;
  Relative(float top, float scale) : top(top), scale(scale), product(top * scale) {
    // Only a fused product keeps its digits; beyond, `excess` grows with the product's own rounding.
    fold = kFused && std::fabs(product) < 0x1p16f;
    if (fold) excess = static_cast<double>(top) * scale - product;
  }
};

// Σ 2^d and Σ 2^d·d.
template <bool fold, class T>
inline GroupSum group_sum(const T* p, const Relative& relative) {
  const float top = relative.top, scale = relative.scale, product = relative.product;
  const Floats zero = broadcast(0.0f);
  Floats total[2] = {zero, zero}, weighted[2] = {zero, zero};
#pragma GCC unroll 1
  for (int64_t i = 0; i < kGroup; i += kAbreast * kLanes) {
    const WideFloats x = load_wide(p + i);
    const WideFloats d = max(kExponentFloor, fold ? fused(x, scale, -product) : (x - top) * scale);
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

// One segment of one row.
template <class T>
class Segment {
 public:
  // `count` tokens from id `first`. Without a key nothing is drawn, nor where the draw's score is below
  // `beaten`.
  void open(const T* data, int64_t first, int64_t count, const RowSoftmax& row, const Key* key,
            double beaten) {
    data_ = data;
    first_ = first;
    count_ = count;
    groups_ = (count + kGroup - 1) / kGroup;
    row_ = row;
    draws_ = key != nullptr;
    beaten_ = beaten;
    if (key) key_ = *key;
    // Draws come in pairs, so an odd first group is the second of its pair.
    noise_ = noise_buffer_ + first / kGroup % 2;
    looked_ = drawn_ = 0;
    check_ = broadcast(0.0f);
    invalid_ = false;
  }

  // The first pass over one more group, if there is one.
  void look() {
    if (looked_ == groups_) return;
    const int64_t g = looked_++;
    if (draws_) fill_group_noise(g);
    Floats padded = check_;
    if (plain(g)) {
      lanes_[g % kLanes] = group_largest(data_ + g * kGroup, check_);
    } else {
      // It may hold -inf by right (past the end, excluded), so it is checked by itself.
      lanes_[g % kLanes] = group_largest(buffered(g), padded);
      invalid_ |= holds_invalid(buffer_, std::min(kGroup, count_ - g * kGroup));
    }
    if (looked_ % kLanes == 0 || looked_ == groups_)
      for (int64_t i = g / kLanes * kLanes; i <= g; ++i) largest_[i] = largest(lanes_[i % kLanes]);
  }

  // The rest of the first pass and the second one; `beside` is called once a group.
  template <class Beside>
  Summary close(int64_t target, Beside beside) {
    Summary s;
    while (looked_ < groups_) look();
    find_largest(s);
    if (s.invalid) return s;
    s.index_logit = logit(row_.index);
    s.target_logit = logit(target);
    if (s.empty()) return s;
    mark_live();
    sum_live(s, beside);
    s.argmax = first_ + best_ * kGroup + find_best_in_group(s);
    if (draws_) draw(s);
    return s;
  }

 private:
  bool plain(int64_t g) const { return (g + 1) * kGroup <= count_ && !row_.special(first_ + g * kGroup); }

  int64_t padded_groups() const { return (groups_ + kLanes - 1) / kLanes * kLanes; }

  const float* buffered(int64_t g) {
    const int64_t at = g * kGroup;
    read_transformed(data_ + at, std::min(kGroup, count_ - at), first_ + at, row_, buffer_);
    return buffer_;
  }

  // The noise up to group g, a few groups ahead.
  void fill_group_noise(int64_t g) {
    const int64_t odd = noise_ - noise_buffer_, first = first_ / kGroup - odd;
    for (; drawn_ <= g + odd; drawn_ += 2 * kLanes)
      fill_gumbel(key_, Domain::kGroup, first + drawn_, 2 * kLanes, noise_buffer_ + drawn_);
  }

  void find_largest(Summary& s) {
    s.invalid = invalid_;
    // Finite sums and -inf are fine; anything else may also be an overflow, so look closer.
    if (!(sum(check_) < std::numeric_limits<float>::infinity()))
      for (int64_t g = 0; g < groups_; ++g)
        s.invalid |= plain(g) && holds_invalid(data_ + g * kGroup, kGroup);
    std::fill(largest_ + groups_, largest_ + padded_groups(), kNone);
    const Largest best = first_largest(largest_, padded_groups());
    best_ = best.at;
    top_ = best.value;
    s.top = static_cast<double>(top_) * row_.inverse_temperature;
    relative_ = Relative(top_, row_.inverse_temperature * kLog2E);
  }

  // A group matters for the sum if it is above float32's resolution, for the draw if it could still win.
  void mark_live() {
    const float scale = row_.inverse_temperature;
    const float sum_limit = -kResolution - std::log(static_cast<float>(groups_ * kGroup));
    const auto relative = [&](int64_t g) { return (load(largest_ + g) - top_) * scale; };
    float lead = 0;
    if (draws_) {
      Floats most = broadcast(kNone);
      for (int64_t g = 0; g < groups_; g += kLanes) most = max(relative(g) + load(noise_ + g), most);
      lead = largest(most) - kLogGroup - kSlack;
    }
    for (int64_t g = 0; g < groups_; g += kLanes) {
      Floats above = relative(g) - sum_limit;
      if (draws_) above = max(above, relative(g) + load(noise_ + g) - lead);
      store(live_ + g, above);
    }
  }

  template <class U>
  GroupSum sum_group(const U* p) const {
    return relative_.fold ? group_sum<true>(p, relative_) : group_sum<false>(p, relative_);
  }

  template <class Beside>
  void sum_live(Summary& s, Beside& beside) {
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
      beside();
      if (!(live_[g] >= 0) || largest_[g] == kNone) continue;
      groups[waiting] = g;
      parts[waiting] = plain(g) ? sum_group(data_ + g * kGroup) : sum_group(buffered(g));
      if (++waiting == kLanes) add_up();
    }
    add_up();
    const double excess = relative_.excess, factor = std::exp2(-excess);
    // The largest entry's own part is 1 and 0; rounding may not put the sums on their other side.
    s.weighted = std::min(0.0, factor * kLn2 * (s.weighted - excess * s.sum));
    s.sum = std::max(1.0, factor * s.sum);
  }

  // The first entry equal to the largest; the largest other entry of the whole segment goes to s.second.
  int64_t find_best_in_group(Summary& s) {
    buffered(best_);
    const int64_t at = first_equal(buffer_, kGroup, top_);
    buffer_[at] = largest_[best_] = kNone;
    const float second = std::max(largest(buffer_, kGroup), largest(largest_, padded_groups()));
    s.second = static_cast<double>(second) * row_.inverse_temperature;
    return at;
  }

  void draw(Summary& s) {
    if (row_.greedy) {
      // Without noise, so that the largest of all parts wins.
      s.score = s.token_logit = s.top;
      s.token = s.argmax;
      return;
    }
    float* scores = sums_;
    for (int64_t i = 0; i < groups_; i += kLanes) {
      const Floats total = load(sums_ + i);
      const Floats score = log(max(0x1p-120f, total)) + load(noise_ + i);
      store(scores + i, select(equal(total, 0.0f), kNone, score));
    }
    const Largest winner = first_largest(scores, padded_groups());
    s.score = s.top + (winner.value - relative_.excess * kLn2);
    if (!(s.score > beaten_)) return;
    draw_in_group(winner.at, s);
  }

  void draw_in_group(int64_t g, Summary& s) {
    const float* x = buffered(g);
    alignas(64) float noise[kGroup + 2 * kLanes], scores[kGroup];
    // Draws come in pairs: an odd first token is the second of its pair.
    const int64_t odd = first_ % 2;
    fill_gumbel(key_, Domain::kToken, first_ + g * kGroup - odd, kGroup + odd, noise);
    for (int64_t i = 0; i < kGroup; i += kLanes)
      store(scores + i, fused(load(x + i) - top_, row_.inverse_temperature, load(noise + odd + i)));
    const int64_t best = first_largest(scores, kGroup).at;
    s.token = first_ + g * kGroup + best;
    s.token_logit = static_cast<double>(x[best]) * row_.inverse_temperature;
  }

  double logit(int64_t token) const {
    if (token < first_ || token >= first_ + count_) return kNaN;
    return static_cast<double>(row_.transform(scalar(data_[token - first_]), token)) *
           row_.inverse_temperature;
  }

  const T* data_ = nullptr;
  int64_t first_ = 0, count_ = 0, groups_ = 0, best_ = 0;
  int64_t looked_ = 0, drawn_ = 0;  // groups seen by the first pass, and draws made for them
  bool draws_ = false, invalid_ = false;
  double beaten_ = -kInfinity;
  float top_ = kNone;
  Relative relative_;
  Key key_ = {};
  RowSoftmax row_;
  Floats check_, lanes_[kLanes];
  alignas(64) float buffer_[kGroup];
  alignas(64) float largest_[kSegmentGroups];
  alignas(64) float noise_buffer_[kSegmentGroups + 2 * kLanes] = {};
  const float* noise_ = noise_buffer_;
  alignas(64) float sums_[kSegmentGroups];
  alignas(64) float live_[kSegmentGroups];  // negative: the group can be skipped
};

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

bool unread(const ScanArguments& a, int64_t r) {
  return (a.skip && a.skip[r]) || (a.target && a.target[r] < 0);
}

int64_t segments_of(const ScanArguments& a) { return (a.logits.columns + kSegment - 1) / kSegment; }

// Scans the segments [begin, end), counted through all rows, less those of unread rows; done(i, summary) of
// each in order. `copies`: the logits must be transformed or cut first.
template <class T, bool copies, class Done>
void scan_segments(const ScanArguments& a, int64_t begin, int64_t end, Done done) {
  using Read = std::conditional_t<copies, float, T>;
  thread_local std::vector<float> copied[2];
  Segment<Read> pair[2];
  const int64_t segments = segments_of(a);
  const auto read_from = [&](int64_t i) {
    while (i < end && unread(a, i / segments)) i += segments - i % segments;
    return std::min(i, end);
  };
  const auto open = [&](int64_t i, int which) {
    const int64_t r = i / segments, at = i % segments * kSegment, first = a.first_token + at;
    const int64_t count = std::min(kSegment, a.logits.columns - at);
    const T* data = a.logits.row<const T>(r) + at;
    RowSoftmax row(a.softmax, r);
    const Key key = a.keys ? a.keys[r] : Key{};
    const Key* draw = a.keys ? &key : nullptr;
    const double beaten = draw ? a.state[r].score : -kInfinity;
    if constexpr (copies) {
      Cut* cut = a.cuts ? a.cuts + r : nullptr;
      const float* copy = copy_transformed(data, count, first, row, cut, copied[which]);
      row.softcap = row.shift = 0;
      row.exclude = -1;
      pair[which].open(copy, first, count, row, draw, beaten);
    } else {
      pair[which].open(data, first, count, row, draw, beaten);
    }
  };
  int64_t at = read_from(begin);
  if (at < end) open(at, 0);
  for (int which = 0; at < end; which = 1 - which) {
    const int64_t next = read_from(at + 1);
    Segment<Read>* following = next < end ? &pair[1 - which] : nullptr;
    if (following) open(next, 1 - which);
    const int64_t target = a.target ? a.target[at / segments] : -1;
    done(at, pair[which].close(target, [following] {
      if (following) following->look();
    }));
    at = next;
  }
}

template <class Done>
void scan_segments(const ScanArguments& a, int64_t begin, int64_t end, Done done) {
  with_dtype(a.logits.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.softmax.softcap > 0 || a.cuts)
      scan_segments<T, true>(a, begin, end, done);
    else
      scan_segments<T, false>(a, begin, end, done);
  });
}

}  // namespace

void scan_rows(const ScanArguments& a, int64_t begin, int64_t end, const RowDone& done) {
  const int64_t segments = segments_of(a);
  Summary row;
  scan_segments(a, begin * segments, end * segments, [&](int64_t i, const Summary& s) {
    row = merge(i % segments == 0 ? Summary{} : row, s);
    if ((i + 1) % segments == 0) done(i / segments, row);
  });
}

void scan(const ScanArguments& a) {
  const int64_t rows = a.logits.rows, segments = segments_of(a);
  if (a.start) std::fill_n(a.state, rows, Summary{});
  const auto take = [&](int64_t r, const Summary& s) { a.state[r] = merge(a.state[r], s); };
  // Ties are used up in order, and whole rows merge without a workspace; few long rows are shared by segment.
  if (a.cuts || segments == 1 || rows >= 4 * a.threads) {
    parallel_ranges(rows, a.threads, [&](int64_t begin, int64_t end) { scan_rows(a, begin, end, take); });
    return;
  }
  std::vector<Summary> parts(static_cast<size_t>(rows * segments));
  parallel_ranges(rows * segments, a.threads, [&](int64_t begin, int64_t end) {
    scan_segments(a, begin, end, [&](int64_t i, const Summary& s) { parts[static_cast<size_t>(i)] = s; });
  });
  // In the order of scan_rows, for the same rounding with any number of threads.
  for (int64_t r = 0; r < rows; ++r) {
    if (unread(a, r)) continue;
    Summary row;
    for (int64_t i = r * segments; i < (r + 1) * segments; ++i)
      row = merge(row, parts[static_cast<size_t>(i)]);
    take(r, row);
  }
}

}  // namespace dlcore::DLCORE_ISA
