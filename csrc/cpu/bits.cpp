// The posterior, the step and the losses of bits, each in one pass. Compiled once per ISA level.
#include "bits.h"

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

template <class T>
void read_lanes(const T* p, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(p + i));
  if (i == count) return;
  T tail[kLanes] = {};
  std::memcpy(tail, p + i, static_cast<size_t>(count - i) * sizeof(T));
  store(out + i, load(tail));
}

// Where a group stands.
struct Place {
  int64_t row, first, count;
};

void read_lanes(const View& v, const Place& place, Group& out) {
  with_dtype(v.dtype, [&](auto type) {
    read_lanes(v.row<const decltype(type)>(place.row) + place.first, place.count, out.at);
  });
}

// The k-th parameter along a span: filled in once where a row shares it.
class Parameter {
 public:
  Parameter(const BitParameters& p, int k, int64_t row, int64_t count)
      : data_(p.data + k * p.apart + row * p.row), own_(p.column != 0) {
    if (own_) return;
    const Floats value = broadcast(*data_);
    for (int64_t i = 0; i < std::min(count, kGroup); i += kLanes) store(group_.at + i, value);
  }
  void move_to(const Place& place) {
    if (own_) read_lanes(data_ + place.first, place.count, group_.at);
  }
  Floats operator[](int64_t i) const { return load(group_.at + i); }
  bool all_zero() const { return !own_ && *data_ == 0; }

 private:
  const float* data_;
  bool own_;
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

// max and min that hand NaN on.
Floats clamped(const Floats& x, float limit) { return 0.0f - max(-limit, 0.0f - max(-limit, x)); }

Floats magnitude(const Floats& x) { return floats_of(words_of(x) & 0x7FFFFFFFu); }

// e^-x for x >= 0, relative error 2^-22 down to e^-86, and no less.
Floats exp_minus(const Floats& x) {
  const Floats y = max(-86.0f, 0.0f - x);
  const auto n = each([](FloatPart v) { return Exponent(v); }, y * kLog2E);
  // y·log2(e) less n, with the digits of log2(e) that a float lacks.
  Floats f = fused(y, kLog2E, 0.0f - each([](Exponent e) { return e.value(); }, n));
  f = fused(y, 0x1.4ae0cp-26f, f);
  return each([](Exponent e, FloatPart v) { return e.scale(v); }, n, exp2_fraction(f));
}

// sigmoid(l) and 1 - sigmoid(l), both with small relative errors, and exp(-|l|).
struct Sigmoid {
  Floats set, clear, tail;
  explicit Sigmoid(const Floats& l) : tail(exp_minus(magnitude(l))) {
    const Floats large = 1.0f / (tail + 1.0f), small = tail * large;
    const Mask negative = less(l, 0.0f);
    set = select(negative, small, large);
    clear = select(negative, large, small);
  }
};

Floats sigmoid(const Floats& l) { return Sigmoid(l).set; }

// What a coding makes of x.
struct Filter {
  float centre, clip;
  explicit Filter(const BitCoding& c) : centre((c.low + c.high) / 2), clip(c.clip) {}
  Floats raw(const Floats& x, const Floats& slope) const { return (x - centre) * slope; }
  Floats operator()(const Floats& x, const Floats& slope) const { return clamped(raw(x, slope), clip); }
};

void read_residual(const View& v, const Place& place, Group& out) {
  if (v.data) return read_lanes(v, place, out);
  for (int64_t i = 0; i < place.count; i += kLanes) store(out.at + i, broadcast(0.0f));
}

}  // namespace

void bit_logits(const BitLogitsArguments& a) {
  const Filter filter(a.coding);
  for_spans(a.x.rows, a.x.columns, a.threads, [&](int64_t row, int64_t first, int64_t count) {
    Parameter slope(a.slope, 0, row, count);
    Group x, residual;
    for_groups(row, first, count, [&](const Place& place) {
      read_lanes(a.x, place, x);
      read_residual(a.residual, place, residual);
      slope.move_to(place);
      for (int64_t i = 0; i < place.count; i += kLanes) {
        const Floats l = load(residual.at + i) + filter(load(x.at + i), slope[i]);
        store(x.at + i, a.sigmoid ? sigmoid(l) : l);
      }
      write_group(a.out + row * a.x.columns + place.first, place.count, x.at);
    });
  });
}

void bit_step(const BitStepArguments& a) {
  const Filter filter(a.coding);
  const float low = a.coding.low, width = a.coding.high - a.coding.low;
  for_spans(a.x.rows, a.x.columns, a.threads, [&](int64_t row, int64_t first, int64_t count) {
    Parameter slope(a.parameters, 0, row, count), ratio(a.parameters, 1, row, count),
        spread(a.parameters, 2, row, count);
    const bool noisy = a.keys && !spread.all_zero();
    const Key key = noisy ? a.keys[row] : Key{};
    Group x, residual, noise, probs;
    for_groups(row, first, count, [&](const Place& place) {
      read_lanes(a.x, place, x);
      read_residual(a.residual, place, residual);
      slope.move_to(place);
      ratio.move_to(place);
      if (noisy) {
        spread.move_to(place);
        fill_normal(key, Domain::kElement, place.first, place.count, noise.at);
      }
      for (int64_t i = 0; i < place.count; i += kLanes) {
        const Floats here = load(x.at + i);
        const Floats p = sigmoid(load(residual.at + i) + filter(here, slope[i]));
        const Floats mean = fused(p, width, low);
        // Where σ stays, so does x, to the bit.
        Floats next = select(equal(ratio[i], 1.0f), here, fused(ratio[i], here - mean, mean));
        if (noisy) next = fused(spread[i], load(noise.at + i), next);
        store(probs.at + i, p);
        store(x.at + i, next);
      }
      const int64_t at = row * a.x.columns + place.first;
      write_group(a.probs + at, place.count, probs.at);
      write_group(a.next + at, place.count, x.at);
    });
  });
}

void bit_perturb(const BitPerturbArguments& a) {
  for_spans(a.x.rows, a.x.columns, a.threads, [&](int64_t row, int64_t first, int64_t count) {
    Parameter spread(a.spread, 0, row, count);
    const Key key = a.keys[row];
    Group x, noise;
    for_groups(row, first, count, [&](const Place& place) {
      read_lanes(a.x, place, x);
      spread.move_to(place);
      fill_normal(key, Domain::kElement, place.first, place.count, noise.at);
      for (int64_t i = 0; i < place.count; i += kLanes)
        store(x.at + i, fused(spread[i], load(noise.at + i), load(x.at + i)));
      write_group(a.out + row * a.x.columns + place.first, place.count, x.at);
    });
  });
}

namespace {

// One group of a loss: its logits' parts, read once for the value or the gradient.
struct LossGroup {
  const BitLossArguments& a;
  Filter filter;
  float low, inverse_width, weight;
  Parameter slope;
  Group x, residual, bits;

  LossGroup(const BitLossArguments& a, int64_t row, int64_t count)
      : a(a),
        filter(a.coding),
        low(a.coding.low),
        inverse_width(1 / (a.coding.high - a.coding.low)),
        weight((a.coding.high - a.coding.low) * (a.coding.high - a.coding.low)),
        slope(a.slope, 0, row, count) {}

  void read(const Place& place) {
    read_lanes(a.x, place, x);
    read_lanes(a.residual, place, residual);
    read_lanes(a.bits, place, bits);
    slope.move_to(place);
  }
  Floats raw(int64_t i) const { return filter.raw(load(x.at + i), slope[i]); }
  Floats logit(int64_t i) const { return load(residual.at + i) + clamped(raw(i), filter.clip); }
  Floats bit(int64_t i) const { return (load(bits.at + i) - low) * inverse_width; }
};

// p - b without cancellation at either end.
Floats error(const Sigmoid& s, const Floats& bit) { return fused(s.set, 1.0f - bit, 0.0f - s.clear * bit); }

}  // namespace

void bit_loss(const BitLossArguments& a) {
  const int64_t columns = a.x.columns, spans = bit_spans(columns);
  for_spans(a.x.rows, columns, a.threads, [&](int64_t row, int64_t first, int64_t count) {
    LossGroup group(a, row, count);
    double total = 0;
    for_groups(row, first, count, [&](const Place& place) {
      group.read(place);
      Group losses;
      for (int64_t i = 0; i < place.count; i += kLanes) {
        const Floats l = group.logit(i), b = group.bit(i);
        const Sigmoid s(l);
        const Floats d = error(s, b);
        store(losses.at + i, a.squared ? d * d * group.weight : max(0.0f, l) - b * l + log1p(s.tail));
      }
      // What lies past the end counts nothing.
      const int64_t whole = (place.count + kLanes - 1) / kLanes * kLanes;
      std::fill(losses.at + place.count, losses.at + whole, 0.0f);
      Floats sums = broadcast(0.0f);
      for (int64_t i = 0; i < whole; i += kLanes) sums = sums + load(losses.at + i);
      total += sum(sums);
    });
    a.sums[row * spans + first / kBitSpan] = total;
  });
}

void bit_loss_backward(const BitLossBackwardArguments& b) {
  const BitLossArguments& a = b.loss;
  for_spans(a.x.rows, a.x.columns, b.threads, [&](int64_t row, int64_t first, int64_t count) {
    LossGroup group(a, row, count);
    const float scale = b.grad[row] * (a.squared ? 2 * group.weight : 1);
    for_groups(row, first, count, [&](const Place& place) {
      group.read(place);
      Group residual_grad, x_grad;
      for (int64_t i = 0; i < place.count; i += kLanes) {
        const Sigmoid s(group.logit(i));
        Floats g = error(s, group.bit(i)) * scale;
        if (a.squared) g = g * (s.set * s.clear);
        store(residual_grad.at + i, g);
        const Mask clipped = less(broadcast(group.filter.clip), magnitude(group.raw(i)));
        store(x_grad.at + i, select(clipped, 0.0f, g * group.slope[i]));
      }
      const auto write = [&](const View& out, const Group& values) {
        with_dtype(out.dtype, [&](auto type) {
          write_group(out.row<decltype(type)>(row) + place.first, place.count, values.at);
        });
      };
      write(b.residual_grad, residual_grad);
      if (b.x_grad.data) write(b.x_grad, x_grad);
    });
  });
}

}  // namespace dlcore::DLCORE_ISA
