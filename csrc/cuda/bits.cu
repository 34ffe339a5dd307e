// The posterior, the step and the losses of bits, each in one read and one write.
#include "../common/bits_functions.h"
#include "bits.h"
#include "runs.h"

namespace dlcore::cuda {
namespace {

using Filter = BitFilter<true>;

// A parameter along a row: one for all of it, or one of each element.
class Same {
 public:
  Same() = default;
  __device__ Same(const BitParameters& p, int k, int64_t row) : value_(p.data[k * p.apart + row * p.row]) {}
  template <int WIDTH>
  __device__ void load(int64_t, int, float (&x)[kRun]) const {
#pragma unroll
    for (float& v : x) v = value_;
  }
  __device__ bool all_zero() const { return value_ == 0; }

 private:
  float value_;
};

class Each {
 public:
  Each() = default;
  __device__ Each(const BitParameters& p, int k, int64_t row) : data_(p.data + k * p.apart + row * p.row) {}
  template <int WIDTH>
  __device__ void load(int64_t column, int count, float (&x)[kRun]) const {
    load_floats<WIDTH>(data_ + column, count, x);
  }
  __device__ bool all_zero() const { return false; }

 private:
  const float* data_;
};

// All runs of a thread in a tile.
using Values = float[kRuns][kRun];
template <int WIDTH>
using Loaded = Run<WIDTH>[kRuns];

// Calls f(k, column, count) on this thread's runs.
template <class F>
__device__ void for_runs(const Place& place, F f) {
#pragma unroll
  for (int k = 0; k < kRuns; ++k) f(k, place.first + place.column(k), place.count(k));
}

// Calls f(k, i) on the elements of this thread's runs, whether they are there or not.
template <class F>
__device__ void for_elements(F f) {
#pragma unroll
  for (int k = 0; k < kRuns; ++k)
#pragma unroll
    for (int i = 0; i < kRun; ++i) f(k, i);
}

template <int WIDTH>
__device__ void load(const Row& row, const Place& place, Loaded<WIDTH>& to) {
  for_runs(place, [&](int k, int64_t column, int count) { row.load<WIDTH>(column, count, to[k]); });
}
template <int WIDTH, class Kind>
__device__ void load(const Kind& parameter, const Place& place, Values& to) {
  for_runs(place,
           [&](int k, int64_t column, int count) { parameter.template load<WIDTH>(column, count, to[k]); });
}
template <int WIDTH>
__device__ void widened(const Row& row, const Loaded<WIDTH>& loaded, Values& to) {
#pragma unroll
  for (int k = 0; k < kRuns; ++k) row.widened(loaded[k], to[k]);
}
template <int WIDTH>
__device__ void store(const Row& row, const Place& place, const Values& x) {
  for_runs(place, [&](int k, int64_t column, int count) { row.store<WIDTH>(column, count, x[k]); });
}
template <int WIDTH>
__device__ void store(float* row, const Place& place, const Values& x) {
  for_runs(place, [&](int k, int64_t column, int count) { store_run<WIDTH>(row + column, count, x[k]); });
}

// Normal numbers of this thread's elements, each block of the stream for two neighbours. A tile begins at a
// multiple of its power-of-two size, so its blocks share their high word.
__device__ void draw(Key key, const Place& place, Values& noise) {
  for_runs(place, [&](int k, int64_t, int) {
#pragma unroll
    for (int i = 0; i < kRun; i += 2) {
      const auto within = static_cast<unsigned>(place.column(k) + i) / 2;
      const NormalPair pair = normals(key, Domain::kElement, place.first / 2 | within);
      noise[k][i] = pair.even;
      noise[k][i + 1] = pair.odd;
    }
  });
}

// residual.data is null for none: its row then has none, either.
__device__ Row row_of(const View& v, int64_t row) { return v.data ? Row(v, row) : Row(); }

// Logits: residual + filter(x), and what x was.
template <int WIDTH, class Kind>
class Logits {
 public:
  __device__ Logits(const View& x, const View& residual, const BitParameters& slope, const Filter& filter)
      : x_(x), residual_(residual), slopes_(slope), filter_(filter) {}
  __device__ void enter(int64_t row) {
    x_row_ = Row(x_, row);
    residual_row_ = row_of(residual_, row);
    slope_ = Kind(slopes_, 0, row);
  }
  __device__ void load(const Place& place) {
    cuda::load<WIDTH>(x_row_, place, x_loaded_);
    if (residual_row_.data) cuda::load<WIDTH>(residual_row_, place, residual_loaded_);
    cuda::load<WIDTH>(slope_, place, slope);
  }
  __device__ void compute() {
    widened<WIDTH>(x_row_, x_loaded_, x);
    for_elements([&](int k, int i) { logit[k][i] = filter_(x[k][i], slope[k][i]); });
    if (!residual_row_.data) return;
    Values residual;
    widened<WIDTH>(residual_row_, residual_loaded_, residual);
    for_elements([&](int k, int i) { logit[k][i] += residual[k][i]; });
  }
  __device__ float raw(int k, int i) const { return filter_.raw(x[k][i], slope[k][i]); }

  Values x, slope, logit;

 private:
  const View &x_, &residual_;
  const BitParameters& slopes_;
  Filter filter_;
  Row x_row_, residual_row_;
  Kind slope_;
  Loaded<WIDTH> x_loaded_, residual_loaded_;
};

template <int WIDTH, class Kind>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    logits_kernel(const __grid_constant__ BitLogitsArguments a, const __grid_constant__ Tiling t) {
  Logits<WIDTH, Kind> of(a.x, a.residual, a.slope, Filter(a.coding));
  float* out = nullptr;
  const auto enter = [&](int64_t row) {
    of.enter(row);
    out = a.out + row * t.columns;
  };
  for_tiles(t, enter, [&](const Place& place) {
    if (!place.live) return;
    of.load(place);
    of.compute();
    if (a.sigmoid) for_elements([&](int k, int i) { of.logit[k][i] = sigmoid(of.logit[k][i]); });
    store<WIDTH>(out, place, of.logit);
  });
}

template <int WIDTH, class Kind, bool CHURNED>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    step_kernel(const __grid_constant__ BitStepArguments a, const __grid_constant__ Tiling t) {
  Logits<WIDTH, Kind> of(a.x, a.residual, a.parameters, Filter(a.coding));
  const float low = a.coding.low, width = a.coding.high - a.coding.low;
  Kind ratio, spread;
  Key key{};
  int64_t at = 0;
  const auto enter = [&](int64_t row) {
    of.enter(row);
    ratio = Kind(a.parameters, 1, row);
    if constexpr (CHURNED) spread = Kind(a.parameters, 2, row);
    if constexpr (CHURNED) key = a.keys[row];
    at = row * t.columns;
  };
  for_tiles(t, enter, [&](const Place& place) {
    if (!place.live) return;
    Values ratios, spreads, noise;
    of.load(place);
    load<WIDTH>(ratio, place, ratios);
    if constexpr (CHURNED) {
      load<WIDTH>(spread, place, spreads);
      if (!spread.all_zero()) draw(key, place, noise);
    }
    of.compute();
    Values moved;
    for_elements([&](int k, int i) {
      of.logit[k][i] = sigmoid(of.logit[k][i]);
      moved[k][i] = stepped(of.x[k][i], of.logit[k][i], ratios[k][i], low, width);
    });
    store<WIDTH>(a.probs + at, place, of.logit);
    if constexpr (CHURNED)
      if (!spread.all_zero())
        for_elements([&](int k, int i) { moved[k][i] = fused(spreads[k][i], noise[k][i], moved[k][i]); });
    store<WIDTH>(a.next + at, place, moved);
  });
}

template <int WIDTH, class Kind>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    perturb_kernel(const __grid_constant__ BitPerturbArguments a, const __grid_constant__ Tiling t) {
  Row row_x;
  Kind spread;
  Key key{};
  float* out = nullptr;
  const auto enter = [&](int64_t row) {
    row_x = Row(a.x, row);
    spread = Kind(a.spread, 0, row);
    key = a.keys[row];
    out = a.out + row * t.columns;
  };
  for_tiles(t, enter, [&](const Place& place) {
    if (!place.live) return;
    Loaded<WIDTH> loaded;
    Values x, spreads, noise;
    load<WIDTH>(row_x, place, loaded);
    load<WIDTH>(spread, place, spreads);
    draw(key, place, noise);
    widened<WIDTH>(row_x, loaded, x);
    for_elements([&](int k, int i) { x[k][i] = fused(spreads[k][i], noise[k][i], x[k][i]); });
    store<WIDTH>(out, place, x);
  });
}

// What a loss reads: logits and bits.
template <int WIDTH, class Kind>
class LossRow {
 public:
  __device__ explicit LossRow(const BitLossArguments& a)
      : logits(a.x, a.residual, a.slope, Filter(a.coding)),
        a_(a),
        inverse_width_(1 / (a.coding.high - a.coding.low)) {}
  __device__ void enter(int64_t row) {
    logits.enter(row);
    row_ = Row(a_.bits, row);
  }
  __device__ void read(const Place& place) {
    Loaded<WIDTH> loaded;
    logits.load(place);
    load<WIDTH>(row_, place, loaded);
    logits.compute();
    widened<WIDTH>(row_, loaded, bit);
    for_elements([&](int k, int i) { bit[k][i] = (bit[k][i] - a_.coding.low) * inverse_width_; });
  }

  Logits<WIDTH, Kind> logits;
  Values bit;

 private:
  const BitLossArguments& a_;
  float inverse_width_;
  Row row_;
};

template <int WIDTH, class Kind>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    loss_kernel(const __grid_constant__ BitLossArguments a, float* means, const __grid_constant__ Tiling t) {
  __shared__ double shared[kTileThreads / kWarp];
  LossRow<WIDTH, Kind> of(a);
  const double scale = a.squared ? weight(a.coding) : 1;
  const auto enter = [&](int64_t row) { of.enter(row); };
  for_tiles(t, enter, [&](const Place& place) {
    float sum = 0;
    if (place.live) {
      of.read(place);
      for_runs(place, [&](int k, int64_t, int count) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const float logit = of.logits.logit[k][i], bit = of.bit[k][i];
          const float loss = a.squared ? squared_error(logit, bit) : cross_entropy(logit, bit);
          if (i < count) sum += loss;
        }
      });
    }
    const double total = scale * sum_row(sum, t.lanes, shared);
    if (!place.live || static_cast<int>(threadIdx.x) % t.lanes != 0) return;
    if (t.spans == 1)
      means[place.row] = static_cast<float>(total / static_cast<double>(t.columns));
    else
      a.sums[place.row * t.spans + place.span] = total;
  });
}

// The means of rows that have several sums, or none.
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    means_kernel(const double* sums, float* means, const __grid_constant__ Tiling t) {
  __shared__ double shared[kTileThreads / kWarp];
  for (int64_t row = blockIdx.x; row < t.rows; row += gridDim.x) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < t.spans; i += kTileThreads) sum += sums[row * t.spans + i];
    const double total = sum_row(sum, kTileThreads, shared);
    if (threadIdx.x == 0) means[row] = static_cast<float>(total / static_cast<double>(t.columns));
  }
}

template <int WIDTH, class Kind>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    loss_backward_kernel(const __grid_constant__ BitLossBackwardArguments b,
                         const __grid_constant__ Tiling t) {
  const BitLossArguments& a = b.loss;
  LossRow<WIDTH, Kind> of(a);
  Row residual_grad, x_grad;
  float scale = 0;
  const auto enter = [&](int64_t row) {
    of.enter(row);
    residual_grad = Row(b.residual_grad, row);
    x_grad = row_of(b.x_grad, row);
    scale = b.grad[row] * (a.squared ? 2 * weight(a.coding) : 1);
  };
  for_tiles(t, enter, [&](const Place& place) {
    if (!place.live) return;
    of.read(place);
    Values grad;
    for_elements([&](int k, int i) {
      grad[k][i] = logit_gradient(of.logits.logit[k][i], of.bit[k][i], scale, a.squared);
    });
    store<WIDTH>(residual_grad, place, grad);
    if (!x_grad.data) return;
    for_elements([&](int k, int i) {
      grad[k][i] = through_filter(grad[k][i], of.logits.raw(k, i), of.logits.slope[k][i], a.coding.clip);
    });
    store<WIDTH>(x_grad, place, grad);
  });
}

// Calls f(width, kind) with the widths of loads that these views and parameters along rows allow, as types.
template <class F, class... V>
void with_layout(const BitParameters& p, F f, const V&... views) {
  int width = narrowest(kRun, views...);
  if (p.column == 0) return with_width(width, [&](auto constant) { f(constant, Same{}); });
  // Its rows lie `row` apart, its sets of rows `apart`.
  const uintptr_t bytes = reinterpret_cast<uintptr_t>(p.data) | static_cast<uintptr_t>((p.apart | p.row) * 4);
  if (bytes % 16 != 0) width = std::min(width, bytes % 8 == 0 ? 2 : 1);
  with_width(width, [&](auto constant) { f(constant, Each{}); });
}

}  // namespace

void bit_logits(const BitLogitsArguments& a, cudaStream_t stream) {
  const Tiling t(a.x.rows, a.x.columns);
  const auto run = [&](auto width, auto kind) {
    launch("bits.posterior", logits_kernel<width, decltype(kind)>, t.tiles, kTileThreads, stream, a, t);
  };
  with_layout(a.slope, run, a.x, a.residual, floats(a.out, t.rows, t.columns));
}

void bit_step(const BitStepArguments& a, cudaStream_t stream) {
  const Tiling t(a.x.rows, a.x.columns);
  const auto run = [&](auto width, auto kind) {
    const auto kernel =
        a.keys ? step_kernel<width, decltype(kind), true> : step_kernel<width, decltype(kind), false>;
    launch("bits.step", kernel, t.tiles, kTileThreads, stream, a, t);
  };
  with_layout(a.parameters, run, a.x, a.residual, floats(a.next, t.rows, t.columns),
              floats(a.probs, t.rows, t.columns));
}

void bit_perturb(const BitPerturbArguments& a, cudaStream_t stream) {
  const Tiling t(a.x.rows, a.x.columns);
  const auto run = [&](auto width, auto kind) {
    launch("bits.perturb", perturb_kernel<width, decltype(kind)>, t.tiles, kTileThreads, stream, a, t);
  };
  with_layout(a.spread, run, a.x, floats(a.out, t.rows, t.columns));
}

int64_t bit_loss_sums(int64_t rows, int64_t columns) {
  const int64_t spans = Tiling(rows, columns).spans;
  return spans == 1 ? 0 : spans;
}

void bit_loss(const BitLossArguments& a, float* means, cudaStream_t stream) {
  const Tiling t(a.x.rows, a.x.columns);
  const auto run = [&](auto width, auto kind) {
    launch("bits.loss", loss_kernel<width, decltype(kind)>, t.tiles, kTileThreads, stream, a, means, t);
  };
  with_layout(a.slope, run, a.residual, a.x, a.bits);
  if (t.spans != 1) launch("bits.loss's means", means_kernel, t.rows, kTileThreads, stream, a.sums, means, t);
}

void bit_loss_backward(const BitLossBackwardArguments& b, cudaStream_t stream) {
  const BitLossArguments& a = b.loss;
  const Tiling t(a.x.rows, a.x.columns);
  const auto run = [&](auto width, auto kind) {
    launch("bits.loss_backward", loss_backward_kernel<width, decltype(kind)>, t.tiles, kTileThreads, stream,
           b, t);
  };
  with_layout(a.slope, run, a.residual, a.x, a.bits, b.residual_grad, b.x_grad);
}

}  // namespace dlcore::cuda
