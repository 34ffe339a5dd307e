// The posterior, the step and the losses of bits, each in one pass. Compiled once per ISA level.
#include "bits.h"

#include <type_traits>

#include "kernels.h"
#include "normal.h"
#include "parallel.h"
#include "rows.h"

namespace dlcore::DLCORE_ISA {
namespace {

// A group of 256 columns as floats, whole lanes of sixteen.
struct alignas(64) Group {
  float at[kGroup];
};

// Where a group stands.
struct Place {
  int64_t row, first, count;
  bool whole() const { return count % kLanes == 0; }
};

// The entries at a place: where they lie if they are floats and whole lanes, else copied to `group`.
template <class T>
const float* lanes(const T* p, const Place& place, Group& group) {
  if constexpr (std::is_same_v<T, float>)
    if (place.whole()) return p;
  int64_t i = 0;
  for (; i + kLanes <= place.count; i += kLanes) store(group.at + i, load(p + i));
  if (i == place.count) return group.at;
  T tail[kLanes] = {};
  std::memcpy(tail, p + i, static_cast<size_t>(place.count - i) * sizeof(T));
  store(group.at + i, load(tail));
  return group.at;
}

const float* lanes(const View& v, const Place& place, Group& group) {
  const float* found = nullptr;
  with_dtype(v.dtype, [&](auto type) {
    found = lanes(v.row<const decltype(type)>(place.row) + place.first, place, group);
  });
  return found;
}

// Where results of a place are stored lane by lane, and what is then left to do.
class Result {
 public:
  template <class T>
  Result(T* out, const Place& place, Group& group) : count_(place.count), group_(group) {
    if constexpr (std::is_same_v<T, float>)
      if (place.whole()) direct_ = out;
  }
  float* at() { return direct_ ? direct_ : group_.at; }
  template <class T>
  void finish(T* out) const {
    if (!direct_) write_group(out, count_, group_.at);
  }

 private:
  int64_t count_;
  Group& group_;
  float* direct_ = nullptr;
};

// Numbers along a group: one for all, or one of each place.
struct Numbers {
  const float* at;
  int64_t mask;  // 0: one for all
  Floats operator[](int64_t i) const { return load(at + (i & mask)); }
};

// The k-th parameter of a row.
class Parameter {
 public:
  Parameter(const BitParameters& p, int k, int64_t row) : data_(p.data + k * p.apart + row * p.row) {
    own_ = p.column != 0;
    if (!own_) store(group_.at, broadcast(*data_));
  }
  Numbers along(const Place& place) {
    if (!own_) return {group_.at, 0};
    return {lanes(data_ + place.first, place, group_), -1};
  }
  bool all_zero() const { return !own_ && *data_ == 0; }

 private:
  const float* data_;
  bool own_;
  Group group_;
};

// The residual of a row, or zeros.
class Residual {
 public:
  explicit Residual(const View& view) : view_(view) {
    if (!view.data) store(group_.at, broadcast(0.0f));
  }
  Numbers along(const Place& place) {
    if (!view_.data) return {group_.at, 0};
    return {lanes(view_, place, group_), -1};
  }

 private:
  const View& view_;
  Group group_;
};

// Calls body(row, first, count) on spans that cover all rows.
template <class Body>
void for_spans(int64_t rows, int64_t columns, int threads, Body body) {
  const int64_t spans = bit_spans(columns);
  parallel_for(rows * spans, threads, [&](int64_t i) {
    const int64_t first = i % spans * kBitSpan;
    body(i / spans, first, std::min(kBitSpan, columns - first));
  });
}

// Calls body(place) on the groups of a span.
template <class Body>
void for_groups(int64_t row, int64_t first, int64_t count, Body body) {
  for (int64_t at = first; at < first + count; at += kGroup)
    body(Place{row, at, std::min(kGroup, first + count - at)});
}

Floats clamped(const Floats& x, float limit) { return max(-limit, min(limit, x)); }

Floats magnitude(const Floats& x) { return floats_of(words_of(x) & 0x7FFFFFFFu); }

// e^x for |x| <= 86, relative error 2^-22, and as of the nearer end elsewhere.
Floats exp_within(const Floats& x) {
  const Floats y = clamped(x, 86.0f);
  const auto n = each([](FloatPart v) { return Exponent(v); }, y * kLog2E);
  // y·log2(e) less n, with the digits of log2(e) that a float lacks.
  Floats f = fused(y, kLog2E, 0.0f - each([](Exponent e) { return e.value(); }, n));
  f = fused(y, 0x1.4ae0cp-26f, f);
  return each([](Exponent e, FloatPart v) { return e.scale(v); }, n, exp2_fraction(f));
}

Floats sigmoid(const Floats& l) { return 1.0f / (exp_within(0.0f - l) + 1.0f); }

// sigmoid(l) and 1 - sigmoid(l), both with small relative errors, and exp(-|l|).
struct Sigmoid {
  Floats set, clear, tail;
  explicit Sigmoid(const Floats& l) : tail(exp_within(0.0f - magnitude(l))) {
    const Floats large = 1.0f / (tail + 1.0f), small = tail * large;
    const Mask negative = less(l, 0.0f);
    set = select(negative, small, large);
    clear = select(negative, large, small);
  }
};

// What a coding makes of x.
struct Filter {
  float centre, clip;
  explicit Filter(const BitCoding& c) : centre((c.low + c.high) / 2), clip(c.clip) {}
  Floats raw(const Floats& x, const Floats& slope) const { return (x - centre) * slope; }
  Floats operator()(const Floats& x, const Floats& slope) const { return clamped(raw(x, slope), clip); }
};

}  // namespace

void bit_logits(const BitLogitsArguments& a) {
  const Filter filter(a.coding);
  for_spans(a.x.rows, a.x.columns, a.threads, [&](int64_t row, int64_t first, int64_t count) {
    Parameter slopes(a.slope, 0, row);
    Residual residuals(a.residual);
    Group x_group, out_group;
    for_groups(row, first, count, [&](const Place& place) {
      const float* x = lanes(a.x, place, x_group);
      const Numbers residual = residuals.along(place), slope = slopes.along(place);
      float* out = a.out + row * a.x.columns + place.first;
      Result result(out, place, out_group);
      for (int64_t i = 0; i < place.count; i += kLanes) {
        const Floats l = residual[i] + filter(load(x + i), slope[i]);
        store(result.at() + i, a.sigmoid ? sigmoid(l) : l);
      }
      result.finish(out);
    });
  });
}

void bit_step(const BitStepArguments& a) {
  const Filter filter(a.coding);
  const float low = a.coding.low, width = a.coding.high - a.coding.low;
  for_spans(a.x.rows, a.x.columns, a.threads, [&](int64_t row, int64_t first, int64_t count) {
    Parameter slopes(a.parameters, 0, row), ratios(a.parameters, 1, row), spreads(a.parameters, 2, row);
    Residual residuals(a.residual);
    const bool noisy = a.keys && !spreads.all_zero();
    const Key key = noisy ? a.keys[row] : Key{};
    Group x_group, noise, next_group, probs_group;
    for_groups(row, first, count, [&](const Place& place) {
      const float* x = lanes(a.x, place, x_group);
      const Numbers residual = residuals.along(place);
      const Numbers slope = slopes.along(place), ratio = ratios.along(place), spread = spreads.along(place);
      const int64_t at = row * a.x.columns + place.first;
      Result next(a.next + at, place, next_group), probs(a.probs + at, place, probs_group);
      if (noisy) fill_normal(key, Domain::kElement, place.first, place.count, noise.at);
      const auto move = [&](auto churned, int64_t i) {
        const Floats here = load(x + i);
        const Floats p = sigmoid(residual[i] + filter(here, slope[i]));
        const Floats mean = fused(p, width, low);
        // Where σ stays, so does x, to the bit.
        Floats moved = select(equal(ratio[i], 1.0f), here, fused(ratio[i], here - mean, mean));
        if constexpr (churned) moved = fused(spread[i], load(noise.at + i), moved);
        store(probs.at() + i, p);
        store(next.at() + i, moved);
      };
      if (noisy)
        for (int64_t i = 0; i < place.count; i += kLanes) move(std::true_type{}, i);
      else
        for (int64_t i = 0; i < place.count; i += kLanes) move(std::false_type{}, i);
      probs.finish(a.probs + at);
      next.finish(a.next + at);
    });
  });
}

void bit_perturb(const BitPerturbArguments& a) {
  for_spans(a.x.rows, a.x.columns, a.threads, [&](int64_t row, int64_t first, int64_t count) {
    Parameter spreads(a.spread, 0, row);
    const Key key = a.keys[row];
    Group x_group, noise, out_group;
    for_groups(row, first, count, [&](const Place& place) {
      const float* x = lanes(a.x, place, x_group);
      const Numbers spread = spreads.along(place);
      float* out = a.out + row * a.x.columns + place.first;
      Result result(out, place, out_group);
      fill_normal(key, Domain::kElement, place.first, place.count, noise.at);
      for (int64_t i = 0; i < place.count; i += kLanes)
        store(result.at() + i, fused(spread[i], load(noise.at + i), load(x + i)));
      result.finish(out);
    });
  });
}

namespace {

// A row of a loss, read group by group.
class LossRow {
 public:
  const float weight, inverse_width;
  LossRow(const BitLossArguments& a, int64_t row)
      : weight((a.coding.high - a.coding.low) * (a.coding.high - a.coding.low)),
        inverse_width(1 / (a.coding.high - a.coding.low)),
        a_(a),
        filter_(a.coding),
        slopes_(a.slope, 0, row) {}

  void move_to(const Place& place) {
    x_ = lanes(a_.x, place, x_group_);
    residual_ = lanes(a_.residual, place, residual_group_);
    bits_ = lanes(a_.bits, place, bits_group_);
    slope_ = slopes_.along(place);
  }
  Floats slope(int64_t i) const { return slope_[i]; }
  Floats raw(int64_t i) const { return filter_.raw(load(x_ + i), slope_[i]); }
  Floats logit(int64_t i) const { return load(residual_ + i) + clamped(raw(i), filter_.clip); }
  Floats bit(int64_t i) const { return (load(bits_ + i) - a_.coding.low) * inverse_width; }
  // 0 in lanes where the clip binds.
  Floats unclipped(int64_t i, const Floats& gradient) const {
    return select(less(broadcast(filter_.clip), magnitude(raw(i))), 0.0f, gradient);
  }

 private:
  const BitLossArguments& a_;
  Filter filter_;
  Parameter slopes_;
  Numbers slope_{nullptr, 0};
  const float *x_ = nullptr, *residual_ = nullptr, *bits_ = nullptr;
  Group x_group_, residual_group_, bits_group_;
};

// p - b without cancellation at either end.
Floats error(const Sigmoid& s, const Floats& bit) { return fused(s.set, 1.0f - bit, 0.0f - s.clear * bit); }

}  // namespace

void bit_loss(const BitLossArguments& a) {
  const int64_t columns = a.x.columns, spans = bit_spans(columns);
  for_spans(a.x.rows, columns, a.threads, [&](int64_t row, int64_t first, int64_t count) {
    LossRow loss(a, row);
    double total = 0;
    for_groups(row, first, count, [&](const Place& place) {
      loss.move_to(place);
      const auto squared = [&](int64_t i) {
        const Floats d = error(Sigmoid(loss.logit(i)), loss.bit(i));
        return d * d * loss.weight;
      };
      const auto cross_entropy = [&](int64_t i) {
        const Floats l = loss.logit(i);
        return max(0.0f, l) - loss.bit(i) * l + log1p(Sigmoid(l).tail);
      };
      Floats sums = broadcast(0.0f);
      const auto add = [&](auto of) {
        int64_t i = 0;
        for (; i + kLanes <= place.count; i += kLanes) sums = sums + of(i);
        if (i == place.count) return;
        // What lies past the end counts nothing.
        float tail[kLanes];
        store(tail, of(i));
        std::fill(tail + (place.count - i), tail + kLanes, 0.0f);
        sums = sums + load(tail);
      };
      if (a.squared)
        add(squared);
      else
        add(cross_entropy);
      total += sum(sums);
    });
    a.sums[row * spans + first / kBitSpan] = total;
  });
}

void bit_loss_backward(const BitLossBackwardArguments& b) {
  const BitLossArguments& a = b.loss;
  for_spans(a.x.rows, a.x.columns, b.threads, [&](int64_t row, int64_t first, int64_t count) {
    LossRow loss(a, row);
    const float scale = b.grad[row] * (a.squared ? 2 * loss.weight : 1);
    Group group;
    for_groups(row, first, count, [&](const Place& place) {
      loss.move_to(place);
      const auto gradient = [&](int64_t i) {
        const Sigmoid s(loss.logit(i));
        const Floats g = error(s, loss.bit(i)) * scale;
        return a.squared ? g * (s.set * s.clear) : g;
      };
      const auto write = [&](const View& out, auto of) {
        with_dtype(out.dtype, [&](auto type) {
          auto* to = out.row<decltype(type)>(row) + place.first;
          Result result(to, place, group);
          for (int64_t i = 0; i < place.count; i += kLanes) store(result.at() + i, of(i));
          result.finish(to);
        });
      };
      write(b.residual_grad, gradient);
      if (b.x_grad.data)
        write(b.x_grad, [&](int64_t i) { return loss.unclipped(i, gradient(i) * loss.slope(i)); });
    });
  });
}

}  // namespace dlcore::DLCORE_ISA
