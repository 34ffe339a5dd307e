// The posterior, the step and the losses of bits, each in one pass. Compiled once per ISA level.
#include <type_traits>

#include "../common/bits_functions.h"
#include "kernels.h"
#include "normal.h"
#include "parallel.h"
#include "rows.h"

namespace dlcore::DLCORE_ISA {
namespace {

// Columns that are worked on at once: enough to hide what a pass begins with, few enough for the cache.
constexpr int64_t kPass = 1024;

// A pass of columns as floats, whole lanes of sixteen.
struct alignas(64) Group {
  float at[kPass];
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

// Where results of a place are stored lane by lane: at once where they are floats and whole lanes.
template <class T>
class Result {
 public:
  Result(T* out, const Place& place, Group& group) : out_(out), count_(place.count), lanes_(group.at) {
    if constexpr (std::is_same_v<T, float>)
      if (place.whole()) lanes_ = out;
  }
  float* lanes() { return lanes_; }
  void finish() const {
    if (static_cast<void*>(lanes_) != out_) write_group(out_, count_, lanes_);
  }
  template <class F>
  void fill(F of) {
    float* to = lanes_;
    for_lanes(count_, [&](int64_t i, auto like) { store(to + i, of(i, like)); });
    finish();
  }

 private:
  T* out_;
  int64_t count_;
  float* lanes_;
};

// What goes through a pass side by side: as many lines of each stream at once hide latencies, of memory too.
// (Narrower vectors have too few registers for it.)
using Abreast = std::conditional_t<kParts == 1, WideFloats, Floats>;
constexpr int64_t kAbreastLanes = sizeof(Abreast) / sizeof(float);

// Calls f(i, lanes) with an Abreast or Floats to be read at i, over `count` entries rounded up to sixteens.
template <class F>
void for_lanes(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kAbreastLanes <= count; i += kAbreastLanes) f(i, Abreast{});
  for (; i < count; i += kLanes) f(i, Floats{});
}

// Numbers along a group: one for all, which stays in a register, or one of each place.
struct Same {
  float value;
  template <class L>
  L at(int64_t, L like) const {
    return each([v = value](FloatPart) { return spread(v); }, like);
  }
};
struct Each {
  const float* data;
  template <class L>
  L at(int64_t i, L) const {
    return load_lanes<L>(data + i);
  }
};

// The k-th parameter of a row, all along it as Kind says: Same or Each.
template <class Kind>
class Parameter {
 public:
  Parameter(const BitParameters& p, int k, int64_t row) : data_(p.data + k * p.apart + row * p.row) {}
  Kind along(const Place& place) {
    if constexpr (std::is_same_v<Kind, Same>)
      return {*data_};
    else
      return {lanes(data_ + place.first, place, group_)};
  }
  bool all_zero() const { return std::is_same_v<Kind, Same> && *data_ == 0; }

 private:
  const float* data_;
  Group group_;
};

template <class F>
void with_kind(const BitParameters& p, F f) {
  if (p.column == 0) return f(Same{});
  f(Each{});
}

// The residual of a row, or zeros.
class Residual {
 public:
  explicit Residual(const View& view) : view_(view) {
    if (!view.data) std::fill(group_.at, group_.at + kPass, 0.0f);
  }
  Each along(const Place& place) { return {view_.data ? lanes(view_, place, group_) : group_.at}; }

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
  for (int64_t at = first; at < first + count; at += kPass)
    body(Place{row, at, std::min(kPass, first + count - at)});
}

using Filter = BitFilter<kFused>;

}  // namespace

void bit_logits(const BitLogitsArguments& a) {
  const Filter filter(a.coding);
  with_kind(a.slope, [&](auto kind) {
    for_spans(a.x.rows, a.x.columns, a.threads, [&](int64_t row, int64_t first, int64_t count) {
      Parameter<decltype(kind)> slopes(a.slope, 0, row);
      Residual residuals(a.residual);
      Group x_group, out_group;
      for_groups(row, first, count, [&](const Place& place) {
        const float* x = lanes(a.x, place, x_group);
        const auto residual = residuals.along(place);
        const auto slope = slopes.along(place);
        Result<float> result(a.out + row * a.x.columns + place.first, place, out_group);
        const auto logit = [&](int64_t i, auto as) {
          return residual.at(i, as) + filter(Each{x}.at(i, as), slope.at(i, as));
        };
        if (a.sigmoid)
          result.fill([&](int64_t i, auto as) { return sigmoid(logit(i, as)); });
        else
          result.fill(logit);
      });
    });
  });
}

namespace {

// `churned`: whether the result gets noise.
template <class Kind, class Churned>
void step_span(const BitStepArguments& a, int64_t row, int64_t first, int64_t count, Churned churned) {
  const Filter filter(a.coding);
  const float low = a.coding.low, width = a.coding.high - a.coding.low;
  Parameter<Kind> slopes(a.parameters, 0, row), ratios(a.parameters, 1, row), spreads(a.parameters, 2, row);
  Residual residuals(a.residual);
  const Key key = churned ? a.keys[row] : Key{};
  Group x_group, noise, next_group, probs_group;
  for_groups(row, first, count, [&](const Place& place) {
    const float* x = lanes(a.x, place, x_group);
    const auto residual = residuals.along(place);
    const auto slope = slopes.along(place), ratio = ratios.along(place), spread = spreads.along(place);
    const int64_t at = row * a.x.columns + place.first;
    Result<float> next(a.next + at, place, next_group), probs(a.probs + at, place, probs_group);
    if (churned) fill_normal(key, Domain::kElement, place.first, place.count, noise.at);
    float *p_to = probs.lanes(), *to = next.lanes();
    for_lanes(place.count, [&](int64_t i, auto as) {
      const auto here = Each{x}.at(i, as);
      const auto p = sigmoid(residual.at(i, as) + filter(here, slope.at(i, as)));
      auto moved = stepped(here, p, ratio.at(i, as), low, width);
      if constexpr (churned) moved = fused(spread.at(i, as), Each{noise.at}.at(i, as), moved);
      store(p_to + i, p);
      store(to + i, moved);
    });
    probs.finish();
    next.finish();
  });
}

}  // namespace

void bit_step(const BitStepArguments& a) {
  with_kind(a.parameters, [&](auto kind) {
    using Kind = decltype(kind);
    for_spans(a.x.rows, a.x.columns, a.threads, [&](int64_t row, int64_t first, int64_t count) {
      if (a.keys && !Parameter<Kind>(a.parameters, 2, row).all_zero())
        step_span<Kind>(a, row, first, count, std::true_type{});
      else
        step_span<Kind>(a, row, first, count, std::false_type{});
    });
  });
}

void bit_perturb(const BitPerturbArguments& a) {
  with_kind(a.spread, [&](auto kind) {
    for_spans(a.x.rows, a.x.columns, a.threads, [&](int64_t row, int64_t first, int64_t count) {
      Parameter<decltype(kind)> spreads(a.spread, 0, row);
      const Key key = a.keys[row];
      Group x_group, noise, out_group;
      for_groups(row, first, count, [&](const Place& place) {
        const float* x = lanes(a.x, place, x_group);
        const auto spread = spreads.along(place);
        fill_normal(key, Domain::kElement, place.first, place.count, noise.at);
        Result<float> result(a.out + row * a.x.columns + place.first, place, out_group);
        result.fill([&](int64_t i, auto as) {
          return fused(spread.at(i, as), Each{noise.at}.at(i, as), Each{x}.at(i, as));
        });
      });
    });
  });
}

namespace {

// A group of a loss.
template <class Kind>
struct LossGroup {
  const float *residual, *x, *bits;
  Kind slope;
  Filter filter;
  float low, inverse_width;

  template <class L>
  L raw(int64_t i, L as) const {
    return filter.raw(Each{x}.at(i, as), slope.at(i, as));
  }
  template <class L>
  L logit(int64_t i, L as) const {
    return Each{residual}.at(i, as) + clamped(raw(i, as), filter.clip);
  }
  template <class L>
  L bit(int64_t i, L as) const {
    return (Each{bits}.at(i, as) - low) * inverse_width;
  }
};

// Reads the groups of a row.
template <class Kind>
class LossRow {
 public:
  LossRow(const BitLossArguments& a, int64_t row) : a_(a), slopes_(a.slope, 0, row) {}
  LossGroup<Kind> along(const Place& place) {
    return {lanes(a_.residual, place, residual_),
            lanes(a_.x, place, x_),
            lanes(a_.bits, place, bits_),
            slopes_.along(place),
            Filter(a_.coding),
            a_.coding.low,
            1 / (a_.coding.high - a_.coding.low)};
  }

 private:
  const BitLossArguments& a_;
  Parameter<Kind> slopes_;
  Group x_, residual_, bits_;
};

// The first `count` lanes, and zeros.
Floats first_lanes(const Floats& x, int64_t count) {
  float lanes[kLanes];
  store(lanes, x);
  std::fill(lanes + count, lanes + kLanes, 0.0f);
  return load(lanes);
}

// The sum of `of` over a group, sixteen after sixteen on every level; what lies past its end counts nothing.
template <class F>
float sum_over(int64_t count, F of) {
  Floats sums = broadcast(0.0f);
  for_lanes(count, [&](int64_t i, auto as) {
    const auto x = of(i, as);
    if constexpr (std::is_same_v<decltype(as), Floats>)
      sums = sums + (i + kLanes > count ? first_lanes(x, count - i) : x);
    else
      for (int k = 0; k < kAbreast; ++k) sums = sums + slice(x, k);
  });
  return sum(sums);
}

}  // namespace

void bit_loss(const BitLossArguments& a) {
  const int64_t columns = a.x.columns, spans = bit_spans(columns);
  const double scale = a.squared ? weight(a.coding) : 1;
  with_kind(a.slope, [&](auto kind) {
    for_spans(a.x.rows, columns, a.threads, [&](int64_t row, int64_t first, int64_t count) {
      LossRow<decltype(kind)> groups(a, row);
      double total = 0;
      for_groups(row, first, count, [&](const Place& place) {
        const auto group = groups.along(place);
        const auto sum_of = [&](auto loss) {
          return sum_over(place.count,
                          [&](int64_t i, auto as) { return loss(group.logit(i, as), group.bit(i, as)); });
        };
        total += a.squared ? sum_of([](const auto& l, const auto& b) { return squared_error(l, b); })
                           : sum_of([](const auto& l, const auto& b) { return cross_entropy(l, b); });
      });
      a.sums[row * spans + first / kBitSpan] = scale * total;
    });
  });
}

void bit_loss_backward(const BitLossBackwardArguments& b) {
  const BitLossArguments& a = b.loss;
  with_kind(a.slope, [&](auto kind) {
    for_spans(a.x.rows, a.x.columns, b.threads, [&](int64_t row, int64_t first, int64_t count) {
      LossRow<decltype(kind)> groups(a, row);
      const float scale = b.grad[row] * (a.squared ? 2 * weight(a.coding) : 1);
      Group in_logit, in_x;
      const auto write = [&](const View& out, const Place& place, const Group& grads) {
        with_dtype(out.dtype, [&](auto type) {
          write_group(out.row<decltype(type)>(row) + place.first, place.count, grads.at);
        });
      };
      for_groups(row, first, count, [&](const Place& place) {
        const auto group = groups.along(place);
        for_lanes(place.count, [&](int64_t i, auto as) {
          store(in_logit.at + i, logit_gradient(group.logit(i, as), group.bit(i, as), scale, a.squared));
        });
        write(b.residual_grad, place, in_logit);
        if (!b.x_grad.data) return;
        for_lanes(place.count, [&](int64_t i, auto as) {
          store(in_x.at + i, through_filter(Each{in_logit.at}.at(i, as), group.raw(i, as),
                                            group.slope.at(i, as), Same{group.filter.clip}.at(i, as)));
        });
        write(b.x_grad, place, in_x);
      });
    });
  });
}

}  // namespace dlcore::DLCORE_ISA
