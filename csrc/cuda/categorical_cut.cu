// Where a truncated draw ends: top_k, top_p and min_p as a threshold and how many of its equals stay, without
// a sort. The last kept entry is found digit by digit of the logits' ordered bits; a block counts a row's
// digits in shared memory, their masses as integers, so that sums do not depend on their order.
#include "../common/categorical_cut.h"
#include "categorical.h"
#include "launch.h"
#include "softmax.h"

namespace dlcore::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kRowThreads = 128;
// What a mass of 1, that of the largest entry, counts; sums of 2^23 of them fit.
constexpr double kOne = 0x1p40;

// Entries below this can't be among the row's `most` largest: of every thread's entries take the largest, of
// these the most-th, found bit by bit.
template <class T>
__device__ float floor_by_count(const HistogramArguments& a, const RowSoftmax& row, const T* p,
                                int64_t most) {
  if (most > kThreads) return kNone;
  float largest = kNone;
  for (int64_t c = threadIdx.x; c < a.logits.columns; c += kThreads)
    largest = fmaxf(largest, row.transform(widen(p[c]), a.first_token + c));
  const uint32_t key = ordered(largest);
  uint32_t found = 0;
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1)
    if (__syncthreads_count(key >= (found | bit)) >= most) found |= bit;
  return float_of(found & 0x80000000u ? found & 0x7FFFFFFFu : ~found);
}

template <class T>
__global__ void __launch_bounds__(kThreads) histogram_kernel(const __grid_constant__ HistogramArguments a) {
  __shared__ unsigned counts[kBins];
  __shared__ unsigned long long masses[kBins];
  const int shift = level_shift(a.level);
  const auto digit = static_cast<uint32_t>(most_digit(a.level));
  // The digits above this level, as a mask.
  const uint32_t above = a.level == 0 ? 0 : ~0u << level_shift(a.level - 1);
  for (int64_t r = blockIdx.x; r < a.logits.rows; r += gridDim.x) {
    const Selection selection = a.selections[r];
    const Summary& state = a.state[r];
    if (selection.everything || state.empty()) continue;
    for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) {
      counts[b] = 0;
      masses[b] = 0;
    }
    const RowSoftmax row(a.softmax, r);
    const T* p = a.logits.row<const T>(r);
    const auto top = static_cast<float>(state.top / row.inverse_temperature);
    float floor = kNone;
    if (a.level == 0 && selection.max_count < a.vocab)
      floor = floor_by_count(a, row, p, selection.max_count);
    else if (a.level == 0)
      floor = floor_by_mass(state, selection, a.vocab, row.inverse_temperature);
    __syncthreads();
    for (int64_t c = threadIdx.x; c < a.logits.columns; c += kThreads) {
      const float x = row.transform(widen(p[c]), a.first_token + c);
      const uint32_t key = ordered(x);
      if ((key & above) != selection.prefix || !(x >= floor) || !(x > kNone)) continue;
      const double mass = exp2_fast((x - top) * (row.inverse_temperature * kLog2E));
      atomicAdd(&counts[key >> shift & digit], 1u);
      atomicAdd(&masses[key >> shift & digit], static_cast<unsigned long long>(mass * kOne));
    }
    __syncthreads();
    Bin* bins = a.bins + r * kBins;
    for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) {
      const Bin before = a.first_token == 0 ? Bin{0, 0} : bins[b];
      bins[b] = {before.mass + static_cast<double>(masses[b]) / kOne, before.count + counts[b]};
    }
    __syncthreads();
  }
}

// A warp a row: every lane adds up a run of bins, the one in which the selection ends walks through it.
__global__ void __launch_bounds__(kRowThreads)
    narrow_kernel(const Bin* bins, const Summary* state, int64_t rows, int level, Selection* selections) {
  const int64_t digits = most_digit(level) + 1, run = digits / kWarp;
  for (int64_t r = global_warp(); r < rows; r += all_warps()) {
    Selection s = selections[r];
    if (s.everything || state[r].empty()) continue;
    const Bin* row = bins + r * kBins;
    const int64_t first = digits - 1 - lane_id() * run;
    Bin sum{0, 0};
    for (int64_t b = first; b > first - run; --b) {
      sum.mass += row[b].mass;
      sum.count += row[b].count;
    }
    for (int lane = 0; lane + 1 < kWarp; ++lane) {
      const double mass = __shfl_sync(kAllLanes, sum.mass, lane);
      const int64_t count = __shfl_sync(kAllLanes, sum.count, lane);
      if (lane >= lane_id()) continue;
      s.mass += mass;
      s.count += count;
    }
    const bool ends = s.count + sum.count >= s.max_count || s.mass + sum.mass > s.max_mass;
    const int at = __reduce_min_sync(kAllLanes, ends ? lane_id() : kWarp - 1);
    if (lane_id() != at) continue;
    narrow_row(row, first, level, s);
    selections[r] = s;
  }
}

__global__ void start_kernel(const Summary* state, int64_t rows, PerRow<int64_t> top_k, PerRow<float> top_p,
                             const Selection* within, Selection* selections) {
  for (int64_t r = global_thread(); r < rows; r += all_threads())
    selections[r] = start_selection(state[r], top_k, top_p, within ? within + r : nullptr, r);
}

__global__ void finish_kernel(const Summary* state, int64_t rows, PerRow<float> min_p,
                              PerRow<float> temperature, const Selection* selections, Cut* cuts) {
  for (int64_t r = global_thread(); r < rows; r += all_threads())
    cuts[r] = finish_selection(state[r], min_p, temperature, selections ? selections + r : nullptr, r);
}

// A warp a row: the token after the last equal of the threshold that stays, equals counted in order.
template <class T>
__global__ void __launch_bounds__(kRowThreads) ends_kernel(const __grid_constant__ EndsArguments a) {
  for (int64_t r = global_warp(); r < a.logits.rows; r += all_warps()) {
    const RowSoftmax row(a.softmax, r);
    const T* p = a.logits.row<const T>(r);
    Cut cut = a.cuts[r];
    int64_t end = a.first_token == 0 ? 0 : a.ends[r];
    if (cut.ties == INT64_MAX) end = INT64_MAX;
    for (int64_t c = lane_id(); cut.ties > 0 && end < INT64_MAX; c += kWarp) {
      const bool inside = c < a.logits.columns;
      if (!__any_sync(kAllLanes, inside)) break;
      const int64_t token = a.first_token + c;
      const unsigned equals =
          __ballot_sync(kAllLanes, inside && row.transform(widen(p[inside ? c : 0]), token) == cut.threshold);
      for (unsigned left = equals; left != 0 && cut.ties > 0; left &= left - 1, --cut.ties)
        end = token - lane_id() + __ffs(static_cast<int>(left));
    }
    if (lane_id() != 0) continue;
    a.ends[r] = end;
    a.cuts[r] = cut;
  }
}

}  // namespace

void start_selections(const Summary* state, int64_t rows, PerRow<int64_t> top_k, PerRow<float> top_p,
                      const Selection* within, Selection* selections, cudaStream_t stream) {
  launch("categorical.sample's selection", start_kernel, ceil_div(rows, kRowThreads), kRowThreads, stream,
         state, rows, top_k, top_p, within, selections);
}

void histogram(const HistogramArguments& a, cudaStream_t stream) {
  with_dtype(a.logits.dtype, [&](auto type) {
    launch("categorical.sample's histogram", histogram_kernel<decltype(type)>, a.logits.rows, kThreads,
           stream, a);
  });
}

void narrow(const Bin* bins, const Summary* state, int64_t rows, int level, Selection* selections,
            cudaStream_t stream) {
  launch("categorical.sample's selection", narrow_kernel, ceil_div(rows, kRowThreads / kWarp), kRowThreads,
         stream, bins, state, rows, level, selections);
}

void finish_selections(const Summary* state, int64_t rows, PerRow<float> min_p, PerRow<float> temperature,
                       const Selection* selections, Cut* cuts, cudaStream_t stream) {
  launch("categorical.sample's selection", finish_kernel, ceil_div(rows, kRowThreads), kRowThreads, stream,
         state, rows, min_p, temperature, selections, cuts);
}

void find_ends(const EndsArguments& a, cudaStream_t stream) {
  with_dtype(a.logits.dtype, [&](auto type) {
    launch("categorical.sample's cut", ends_kernel<decltype(type)>,
           ceil_div(a.logits.rows, kRowThreads / kWarp), kRowThreads, stream, a);
  });
}

}  // namespace dlcore::cuda
