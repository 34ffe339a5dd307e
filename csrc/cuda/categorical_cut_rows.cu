// Where a truncated draw of whole rows ends: one kernel, a block a row, no sort.
//
// Entries are put in order by keys that differ: the logit's ordered bits, then the token. The last kept entry
// is the first at which the sum of weights (1 each to count, masses for top_p) exceeds a limit. A pass over
// the row sums the weights of a range of keys in bins, and narrows the range to one bin; as soon as what is
// in the range fits into shared memory, the row is read no more. Masses are integers, so that no sum depends
// on its order.
#include "../common/categorical_cut.h"
#include "categorical.h"
#include "launch.h"
#include "softmax.h"

namespace dlcore::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kResident = 2;  // blocks of a multiprocessor, at least
constexpr int kWarps = kThreads / kWarp;
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kOwnDigits = kDigits / kThreads;
constexpr int kHeld = 3072;  // entries in shared memory
constexpr int kFew = 128;    // entries that are compared each with each
// What a mass of 1, that of the largest entry, counts; sums of 2^23 of them fit.
constexpr float kOne = 0x1p40f;

using Key = uint64_t;
using Weight = uint64_t;

__device__ constexpr Key key_of(uint32_t bits, uint32_t token) { return Key{bits} << 32 | ~token; }
// Zeros of both signs are equals.
__device__ Key key_of(float x, int token) { return key_of(ordered(x + 0.0f), static_cast<uint32_t>(token)); }
__device__ uint32_t bits_of(Key key) { return static_cast<uint32_t>(key >> 32); }
__device__ float logit_of(uint32_t bits) {
  return float_of(bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits);
}

struct Count {
  __device__ Weight operator()(float) const { return 1; }
};
struct Mass {
  float top, slope;
  __device__ Weight operator()(float x) const {
    return static_cast<Weight>(exp2_fast((x - top) * slope) * kOne);
  }
};

// Keys from the first in order, the largest, to the last one.
struct Range {
  Key first, last;
  __device__ bool holds(Key key) const { return key <= first && key >= last; }
  __device__ int shift() const {
    const Key width = first - last;
    const int bits = width >> 32 ? 64 - __clz(static_cast<int>(width >> 32))
                                 : 32 - __clz(static_cast<int>(static_cast<uint32_t>(width)));
    return bits > kDigitBits ? bits - kDigitBits : 0;
  }
  __device__ Range part(int digit) const {
    const int by = shift();
    const Key from = first - (static_cast<Key>(digit) << by), most = (Key{1} << by) - 1;
    return {from, from - last > most ? from - most : last};
  }
};

struct Room {
  unsigned low[kDigits], high[kDigits];  // sums of weights
  Key held[kHeld];
  Key few[kFew];
  Weight few_weights[kFew];
  Weight sums[kWarps];
  uint32_t least[kWarps], most[kWarps];
  unsigned held_count, few_count;
  int digit;      // where the limit is exceeded, -1 if nowhere
  Weight before;  // the sum before it
  Key found;
};

template <class T>
class Search {
 public:
  __device__ Search(Room& room, const CutArguments& a, int64_t r)
      : room_(room),
        row_(a.softmax, r),
        entries_(a.logits.row<const T>(r)),
        columns_(static_cast<int>(a.logits.columns)) {
    const auto top = static_cast<float>(a.state[r].top / row_.inverse_temperature);
    mass_ = {top, row_.inverse_temperature * kLog2E};
    kept_ = {key_of(top, 0), key_of(ordered(kNone) + 1, ~0u)};
  }

  // Leaves the `most` first.
  __device__ void by_count(int64_t most) {
    Range range = kept_;
    if (most <= kThreads) range.last = max(range.last, key_of(floor_by_count(most), ~0u));
    find(range, static_cast<Weight>(most - 1), Count{});
  }

  // Of what is left leaves those before which the mass is at most a share of it.
  __device__ void by_mass(float share, const Summary& state) {
    Selection limit{INT64_MAX, share * state.sum};
    Range range = kept_;
    if (cut_)
      limit.max_mass = share * (static_cast<double>(mass()) / kOne);
    else
      range.last = max(range.last, key_of(ordered(floor_by_mass(state, limit, columns_,
                                                                row_.inverse_temperature)),
                                          ~0u));
    find(range, static_cast<Weight>(fmax(0.0, limit.max_mass * kOne)), mass_);
  }

  // Whether anything is left out, and the last that is not.
  __device__ bool cut() const { return cut_; }
  __device__ Key last() const { return kept_.last; }

 private:
  // Calls f(logit, token) for every entry, from all threads.
  template <class F>
  __device__ void for_entries(F f) const {
    constexpr int N = 16 / sizeof(T);
    using Run = Packed<T, N>;
    const auto fetch = [&](int at) {
      Run run;
      if (at >= 0 && at + N <= columns_) {
        run.word = __ldcg(reinterpret_cast<const typename Run::Word*>(entries_ + at));
        return run;
      }
#pragma unroll
      for (int k = 0; k < N; ++k) run.elements[k] = at + k >= 0 && at + k < columns_ ? entries_[at + k] : T{};
      return run;
    };
    // Runs begin where an address is a multiple of their size.
    const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(entries_) / sizeof(T) % N);
    int at = static_cast<int>(threadIdx.x) * N - skew;
    Run next = fetch(at);
#pragma unroll 1
    for (; at < columns_; at += kThreads * N) {
      const Run run = next;
      next = fetch(at + kThreads * N);
      const bool special = row_.special(at, N), whole = at >= 0 && at + N <= columns_;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        float x = widen(run.elements[k]);
        if (special) x = row_.transform(x, at + k);
        if (!whole && (at + k < 0 || at + k >= columns_)) x = kNone;
        f(x, at + k);
      }
    }
  }

  // Entries below this can't be among the `most` first: of every thread's entries take the largest, of these
  // the most-th, found bit by bit.
  __device__ uint32_t floor_by_count(int64_t most) const {
    float largest = kNone;
    for_entries([&](float x, int) { largest = fmaxf(largest, x); });
    const uint32_t key = ordered(largest + 0.0f);
    uint32_t found = 0;
    for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1)
      if (__syncthreads_count(key >= (found | bit)) >= most) found |= bit;
    return found;
  }

  // The mass of what is left.
  __device__ Weight mass() {
    Weight sum = 0;
    if (holds_) {
      for (unsigned i = threadIdx.x; i < room_.held_count; i += kThreads)
        if (room_.held[i] >= kept_.last) sum += mass_(logit_of(bits_of(room_.held[i])));
    } else {
      for_entries([&](float x, int token) {
        if (kept_.holds(key_of(x, token))) sum += mass_(x);
      });
    }
    sum = sum_lanes(sum);
    __syncthreads();
    if (lane_id() == 0) room_.sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    sum = 0;
    for (const Weight part : room_.sums) sum += part;
    return sum;
  }

  // The last kept entry is the first at which the sum of weights exceeds the limit.
  template <class W>
  __device__ void find(Range range, Weight limit, W weigh) {
    Weight before = 0;
    for (bool first = true; !holds_; first = false) {
      const Range seen = read(range, weigh);
      const bool fits = room_.held_count <= kHeld;
      if (!narrow(range, before, limit)) return;
      if (fits) {
        holds_ = first;
        break;
      }
      range = {min(range.first, seen.first), max(range.last, seen.last)};
    }
    while (!gather(range, weigh)) {
      clear();
      for (unsigned i = threadIdx.x; i < room_.held_count; i += kThreads)
        if (range.holds(room_.held[i])) add(range, room_.held[i], weigh(logit_of(bits_of(room_.held[i]))));
      __syncthreads();
      if (!narrow(range, before, limit)) return;
    }
    settle(before, limit);
  }

  __device__ void clear() {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kThreads) room_.low[i] = room_.high[i] = 0;
    __syncthreads();
  }

  __device__ void add(const Range& range, Key key, Weight weight) {
    const auto digit = static_cast<unsigned>((range.first - key) >> range.shift());
    const auto low = static_cast<unsigned>(weight);
    const unsigned high = static_cast<unsigned>(weight >> 32) + (atomicAdd(&room_.low[digit], low) > ~low);
    if (high != 0) atomicAdd(&room_.high[digit], high);
  }

  // Sums up the range's weights, and holds its entries as long as there is room; the range that they span.
  template <class W>
  __device__ Range read(const Range& range, W weigh) {
    uint32_t least = ~0u, most = 0;
    if (threadIdx.x == 0) room_.held_count = 0;
    clear();
    for_entries([&](float x, int token) {
      const Key key = key_of(x, token);
      if (!range.holds(key)) return;
      least = min(least, bits_of(key));
      most = max(most, bits_of(key));
      add(range, key, weigh(x));
      if (*static_cast<volatile unsigned*>(&room_.held_count) > kHeld) return;
      const unsigned at = atomicAdd(&room_.held_count, 1u);
      if (at < kHeld) room_.held[at] = key;
    });
    least = fold_lanes(least, [](uint32_t a, uint32_t b) { return min(a, b); });
    most = fold_lanes(most, [](uint32_t a, uint32_t b) { return max(a, b); });
    if (lane_id() == 0) {
      room_.least[threadIdx.x / kWarp] = least;
      room_.most[threadIdx.x / kWarp] = most;
    }
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) {
      least = min(least, room_.least[warp]);
      most = max(most, room_.most[warp]);
    }
    return {key_of(most, 0u), key_of(least, static_cast<uint32_t>(columns_))};
  }

  // Narrows a range to the bin in which the sum exceeds the limit; false if it nowhere does.
  __device__ bool narrow(Range& range, Weight& before, Weight limit) {
    const int first = static_cast<int>(threadIdx.x) * kOwnDigits, warp = static_cast<int>(threadIdx.x) / kWarp;
    Weight own[kOwnDigits], sum = 0;
#pragma unroll
    for (int i = 0; i < kOwnDigits; ++i) {
      own[i] = static_cast<Weight>(room_.high[first + i]) << 32 | room_.low[first + i];
      sum += own[i];
    }
    Weight upto = sum;
#pragma unroll
    for (int by = 1; by < kWarp; by *= 2) {
      const Weight other = __shfl_sync(kAllLanes, upto, max(lane_id() - by, 0));
      if (lane_id() >= by) upto += other;
    }
    if (lane_id() == kWarp - 1) room_.sums[warp] = upto;
    if (threadIdx.x == 0) room_.digit = -1;
    __syncthreads();
    Weight at = before + upto - sum;
    for (int i = 0; i < warp; ++i) at += room_.sums[i];
    if (at <= limit && at + sum > limit) {
      int digit = 0;
#pragma unroll
      for (int i = 0; i + 1 < kOwnDigits; ++i)
        if (digit == i && at + own[i] <= limit) {
          at += own[i];
          ++digit;
        }
      room_.digit = first + digit;
      room_.before = at;
    }
    __syncthreads();
    const int digit = room_.digit;
    before = room_.before;
    if (digit >= 0) range = range.part(digit);
    return digit >= 0;
  }

  // Copies the held entries of a range to where they are compared; false if they are too many.
  template <class W>
  __device__ bool gather(const Range& range, W weigh) {
    __syncthreads();
    if (threadIdx.x == 0) room_.few_count = 0;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < room_.held_count; i += kThreads) {
      const Key key = room_.held[i];
      if (!range.holds(key)) continue;
      const unsigned at = atomicAdd(&room_.few_count, 1u);
      if (at >= kFew) continue;
      room_.few[at] = key;
      room_.few_weights[at] = weigh(logit_of(bits_of(key)));
    }
    __syncthreads();
    return room_.few_count <= kFew;
  }

  __device__ void settle(Weight before, Weight limit) {
    if (threadIdx.x == 0) room_.found = 0;
    __syncthreads();
    if (threadIdx.x < room_.few_count) {
      const Key key = room_.few[threadIdx.x];
      for (unsigned i = 0; i < room_.few_count; ++i)
        if (room_.few[i] > key) before += room_.few_weights[i];
      if (before <= limit && before + room_.few_weights[threadIdx.x] > limit) room_.found = key;
    }
    __syncthreads();
    if (room_.found == 0) return;
    kept_.last = room_.found;
    cut_ = true;
  }

  Room& room_;
  RowSoftmax row_;
  const T* entries_;
  int columns_;
  Mass mass_;
  Range kept_;
  bool cut_ = false;
  bool holds_ = false;  // whether all that may be kept is held
};

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    cut_rows_kernel(const __grid_constant__ CutArguments a) {
  __shared__ Room room;
  for (int64_t r = blockIdx.x; r < a.logits.rows; r += gridDim.x) {
    const Summary& state = a.state[r];
    Selection selection{1, kInfinity};
    selection.everything = true;
    int64_t end = INT64_MAX;
    if (!state.empty()) {
      Search<T> search(room, a, r);
      const int64_t most = a.top_k ? a.top_k[r] : INT64_MAX;
      if (most < 1) {
        selection.prefix = ordered(-kNone);
        selection.everything = false;
        end = 0;
      } else {
        if (most < a.logits.columns) search.by_count(most);
        if (a.top_p && a.top_p[r] < 1) search.by_mass(a.top_p[r], state);
      }
      if (search.cut()) {
        selection.prefix = bits_of(search.last());
        selection.everything = false;
        end = int64_t{~static_cast<uint32_t>(search.last())} + 1;
      }
    }
    __syncthreads();
    if (threadIdx.x != 0) continue;
    const Cut cut = finish_selection(state, a.min_p, a.softmax.temperature, &selection, r);
    a.cuts[r] = cut;
    a.ends[r] = cut.ties == 0 ? 0 : end;
  }
}

}  // namespace

void cut_rows(const CutArguments& a, cudaStream_t stream) {
  with_dtype(a.logits.dtype, [&](auto type) {
    launch("categorical.sample's cut", cut_rows_kernel<decltype(type)>, a.logits.rows, kThreads, stream, a);
  });
}

}  // namespace dlcore::cuda
