// Passes over logits whose log-sum-exp is known: softmax tiles, histograms, gradients. Compiled once per ISA
// level.
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "../common/categorical_cut.h"
#include "categorical.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace dlcore::DLCORE_ISA {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// Calls f(at, count, x) for every group of a row: transformed entries [at, at + count) in x, -inf past the
// end.
template <class F>
void each_group(const View& logits, int64_t first_token, const RowSoftmax& row, int64_t r, F f) {
  with_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    const T* data = logits.row<const T>(r);
    alignas(64) float x[kGroup];
    for (int64_t at = 0; at < logits.columns; at += kGroup) {
      const int64_t count = std::min(kGroup, logits.columns - at);
      prefetch<kGroup>(data + at, kAhead);
      read_transformed(data + at, count, first_token + at, row, x);
      f(at, count, x);
    }
  });
}

void write(const View& out, int64_t r, int64_t at, int64_t count, const float* values) {
  with_dtype(out.dtype, [&](auto type) {
    using T = decltype(type);
    T* to = out.row<T>(r) + at;
    prefetch_lines<kGroup * sizeof(T), 1>(to, kAhead);
    write_group(to, count, values);
  });
}

// exp((x - reference)·scale) where scale is log2 e / temperature; -inf and far below give 2^-125, set to 0.
inline Floats probability(const Floats& x, float reference, float scale) {
  const Floats d = (x - reference) * scale;
  return select(less(d, kExponentFloor), 0.0f, exp2(max(kExponentFloor, d)));
}

// The bits of a float as a word that grows with it.
Words ordered(const Floats& x) {
  return each([](WordPart b) { return b ^ ((WordPart)((IntPart)b >> 31) | 0x80000000u); }, words_of(x));
}

// Entries below this can't be among the row's `most` largest: of every 16 take the largest, of these the
// most-th.
float floor_by_count(const View& logits, int64_t first_token, const RowSoftmax& row, int64_t r,
                     int64_t most) {
  thread_local std::vector<float> largest;
  largest.clear();
  each_group(logits, first_token, row, r, [&](int64_t, int64_t, const float* x) {
    Floats m = load(x);
    for (int64_t i = kLanes; i < kGroup; i += kLanes) m = max(load(x + i), m);
    largest.resize(largest.size() + kLanes);
    store(&*largest.end() - kLanes, m);
  });
  if (most > static_cast<int64_t>(largest.size())) return kNone;
  std::nth_element(largest.begin(), largest.begin() + (most - 1), largest.end(), std::greater<float>());
  return largest[static_cast<size_t>(most - 1)];
}

}  // namespace

void softmax_tile(const SoftmaxTileArguments& a) {
  parallel_for(a.logits.rows, a.threads, [&](int64_t r) {
    const RowSoftmax row(a.softmax, r);
    const Probability probability(a.logsumexp[r], 1, row.inverse_temperature);
    each_group(a.logits, a.first_token, row, r, [&](int64_t at, int64_t count, float* x) {
      for (int64_t i = 0; i < kGroup; i += kLanes) store(x + i, probability(load(x + i)));
      write(a.out, r, at, count, x);
    });
  });
}

void histogram(const HistogramArguments& a) {
  const int shift = level_shift(a.level);
  const auto digit = static_cast<uint32_t>(most_digit(a.level));
  // The digits above this level, as a mask.
  const uint32_t above = a.level == 0 ? 0 : ~0u << level_shift(a.level - 1);
  parallel_for(a.logits.rows, a.threads, [&](int64_t r) {
    const Selection& selection = a.selections[r];
    if (selection.everything || a.state[r].empty()) return;
    const RowSoftmax row(a.softmax, r);
    const auto top = static_cast<float>(a.state[r].top / row.inverse_temperature);
    float floor = kNone;
    if (a.level == 0 && selection.max_count < a.vocab)
      floor = floor_by_count(a.logits, a.first_token, row, r, selection.max_count);
    else if (a.level == 0)
      floor = floor_by_mass(a.state[r], selection, a.vocab, row.inverse_temperature);
    Bin* bins = a.bins + r * kBins;
    each_group(a.logits, a.first_token, row, r, [&](int64_t, int64_t, const float* x) {
      for (int64_t i = 0; i < kGroup; i += kLanes) {
        const Floats logit = load(x + i);
        const Words key = ordered(logit);
        const Mask same = each([&](WordPart k) { return (IntPart)((k & above) == selection.prefix); }, key);
        const Mask high = each([&](FloatPart v) { return (IntPart)(v >= floor && v > kNone); }, logit);
        uint32_t counted = lane_bits(each([](IntPart p, IntPart q) { return p & q; }, same, high));
        if (counted == 0) continue;
        alignas(64) float mass[kLanes];
        alignas(64) uint32_t keys[kLanes];
        store(mass, probability(logit, top, row.inverse_temperature * kLog2E));
        store(keys, key);
        for (; counted != 0; counted &= counted - 1) {
          const int lane = __builtin_ctz(counted);
          Bin& bin = bins[keys[lane] >> shift & digit];
          bin.mass += mass[lane];
          ++bin.count;
        }
      }
    });
  });
}

void log_probs_backward(const LogProbsBackwardArguments& a) {
  const int64_t rows = a.logits.rows;
  parallel_for(rows, a.threads, [&](int64_t r) {
    const RowSoftmax row(a.softmax, r);
    const int64_t target = a.target[r];
    const bool read = target >= 0;
    const auto part = [&](int64_t k) { return read ? static_cast<float>(a.grad[k * rows + r]) : 0; };
    const float at_target = part(0), at_index = a.softmax.index ? part(1) : 0,
                spread = part(2) - at_target - at_index;
    const Probability probability(a.numbers[2 * rows + r]);
    const float cap = row.softcap;
    each_group(a.logits, a.first_token, row, r, [&](int64_t at, int64_t count, float* x) {
      alignas(64) float grad[kGroup];
      for (int64_t i = 0; i < kGroup; i += kLanes)
        store(grad + i, read ? probability(load(x + i)) * spread : broadcast(0.0f));
      const int64_t token = a.first_token + at;
      const auto inside = [&](int64_t id) { return id >= token && id < token + count && id != row.exclude; };
      if (inside(target)) grad[target - token] += at_target;
      if (inside(row.index)) grad[row.index - token] += at_index;
      if (cap > 0) {
        // d softcap / dx = 1 - tanh^2, of the entry before its shift.
        if (inside(row.index)) x[row.index - token] -= row.shift;
        for (int64_t i = 0; i < kGroup; i += kLanes) {
          const Floats t = load(x + i) * (1.0f / cap);
          store(grad + i, load(grad + i) * select(equal(load(x + i), kNone), 0.0f, 1.0f - t * t));
        }
      }
      write(a.out, r, at, count, grad);
    });
  });
}

namespace {

// x·scale - logsumexp, by a reference close to x and the rest.
struct LogProbability {
  float reference, rest, scale;
  LogProbability(double logsumexp, float scale)
      : reference(static_cast<float>(logsumexp / scale)),
        rest(static_cast<float>(static_cast<double>(reference) * scale - logsumexp)),
        scale(scale) {}
  Floats operator()(const Floats& x) const { return fused(x - reference, scale, broadcast(rest)); }
};

struct KLRow {
  alignas(64) float p[kGroup];
  alignas(64) float q[kGroup];
};

// Calls f(at, count, groups) for every group of both rows.
template <class F>
void each_pair(const View& p, const View& q, int64_t r, int64_t begin, int64_t end, F f) {
  KLRow x;
  const auto read = [r](const View& v, int64_t at, int64_t count, float* out) {
    with_dtype(v.dtype, [&](auto type) { read_group(v.row<const decltype(type)>(r) + at, count, out); });
  };
  for (int64_t at = begin; at < end; at += kGroup) {
    const int64_t count = std::min(kGroup, end - at);
    read(p, at, count, x.p);
    read(q, at, count, x.q);
    f(at, count, x);
  }
}

KLSummary kl_segment(const KLArguments& a, int64_t r, int64_t begin, float scale) {
  const int64_t end = std::min(begin + kSegment, a.p.columns);
  Floats p_most = broadcast(kNone), q_most = p_most, check = broadcast(0.0f);
  bool invalid = false;
  each_pair(a.p, a.q, r, begin, end, [&](int64_t, int64_t count, const KLRow& x) {
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      p_most = max(load(x.p + i), p_most);
      q_most = max(load(x.q + i), q_most);
      check = check + load(x.p + i) * 0.0f + load(x.q + i) * 0.0f;
    }
    if (sum(check) == 0) return;
    // NaN by now, by right where there is a -inf: look closer at this group.
    check = broadcast(0.0f);
    for (int64_t i = 0; i < count; ++i) {
      const float infinity = std::numeric_limits<float>::infinity();
      invalid |= !(x.p[i] < infinity) || !(x.q[i] < infinity);
    }
  });
  KLSummary s;
  s.invalid = invalid;
  const float p_top = largest(p_most), q_top = largest(q_most);
  const float p_reference = p_top > kNone ? p_top : 0, q_reference = q_top > kNone ? q_top : 0;
  s.p_top = static_cast<double>(p_top) * scale;
  s.q_top = static_cast<double>(q_top) * scale;
  each_pair(a.p, a.q, r, begin, end, [&](int64_t, int64_t, const KLRow& x) {
    Floats p_sum = broadcast(0.0f), q_sum = p_sum, gap = p_sum;
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      const Floats p = load(x.p + i), dp = (p - p_reference) * (scale * kLog2E);
      const Floats dq = (load(x.q + i) - q_reference) * (scale * kLog2E);
      const Mask gone = equal(p, kNone);
      const Floats e = select(gone, 0.0f, exp2(max(kExponentFloor, dp)));
      p_sum = p_sum + e;
      q_sum = q_sum + probability(load(x.q + i), q_reference, scale * kLog2E);
      // 0 · (-inf - log q) is 0: what p excludes costs nothing.
      gap = gap + select(gone, 0.0f, e * (dp - dq));
    }
    s.p_sum += sum(p_sum);
    s.q_sum += sum(q_sum);
    s.gap += static_cast<double>(sum(gap)) * kLn2;
  });
  return s;
}

}  // namespace

void kl(const KLArguments& a) {
  parallel_for(a.p.rows, a.threads, [&](int64_t r) {
    const float scale = a.temperature ? 1.0f / a.temperature[r] : 1.0f;
    for (int64_t at = 0; at < a.p.columns; at += kSegment)
      a.state[r] = merge(a.state[r], kl_segment(a, r, at, scale));
  });
}

void kl_backward(const KLBackwardArguments& a) {
  const int64_t rows = a.p.rows;
  parallel_for(rows, a.threads, [&](int64_t r) {
    const float scale = a.temperature ? 1.0f / a.temperature[r] : 1.0f;
    const auto divergence = static_cast<float>(a.numbers[r]), weight = static_cast<float>(a.grad[r] * scale);
    const LogProbability log_p_of(a.numbers[rows + r], scale), log_q_of(a.numbers[2 * rows + r], scale);
    each_pair(a.p, a.q, r, 0, a.p.columns, [&](int64_t at, int64_t count, KLRow& x) {
      for (int64_t i = 0; i < kGroup; i += kLanes) {
        const Floats log_p = log_p_of(load(x.p + i)), log_q = log_q_of(load(x.q + i));
        const Floats p = probability(log_p, 0, kLog2E), q = probability(log_q, 0, kLog2E);
        const Floats pull = select(equal(load(x.p + i), kNone), 0.0f, p * (log_p - log_q - divergence));
        store(x.p + i, pull * weight);
        store(x.q + i, (q - p) * weight);
      }
      write(a.p_out, r, at, count, x.p);
      write(a.q_out, r, at, count, x.q);
    });
  });
}

}  // namespace dlcore::DLCORE_ISA
