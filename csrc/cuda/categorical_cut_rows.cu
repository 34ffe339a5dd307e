// Where a truncated draw of whole rows ends: one kernel, a block a row, no sort.
//
// The last kept entry is the first, in order, at which the sum of weights (1 each to count, masses for top_p)
// exceeds a limit. A pass over the row sums up the weights of a range of the order in bins, and narrows the
// range to one bin; as soon as what is in the range fits into shared memory, the row is read no more. Masses
// are integers, so that no sum depends on its order.
#include <climits>

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

// An entry's place in the order: its logit's ordered bits, then its token. The larger the key, the earlier.
using Key = uint64_t;
using Weight = uint64_t;

__device__ Key key_of(uint32_t bits, int token) { return Key{bits} << 32 | ~static_cast<uint32_t>(token); }
__device__ uint32_t bits_of(Key key) { return static_cast<uint32_t>(key >> 32); }
__device__ int token_of(Key key) { return static_cast<int>(~static_cast<uint32_t>(key)); }
__device__ float logit_of(uint32_t bits) { return float_of(bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits); }
// Zeros of both signs are equals.
__device__ uint32_t bits_of_logit(float x) { return ordered(x + 0.0f); }

struct Count {
  static constexpr bool kWide = false;
  __device__ Weight operator()(float) const { return 1; }
};
struct Mass {
  static constexpr bool kWide = true;  // a sum may take more than 32 bits
  float top, slope;
  __device__ Weight operator()(float x) const {
    return static_cast<Weight>(exp2_fast((x - top) * slope) * kOne);
  }
};

// Entries from the first in order to the last: of logits with bits in between, or, where all are equals, of
// tokens.
struct Range {
  uint32_t first, last;
  bool equals = false;
  uint32_t bits = 0;

  // How far behind the first an entry lies; more than the length if it is not in the range.
  __device__ uint32_t behind(uint32_t of_logit, int token) const {
    if (!equals) return first - of_logit;
    return of_logit == bits ? static_cast<uint32_t>(token) - ~first : ~0u;
  }
  __device__ uint32_t behind(Key key) const { return behind(bits_of(key), token_of(key)); }
  __device__ uint32_t length() const { return first - last; }
  __device__ int shift() const {
    const int bits = 32 - __clz(static_cast<int>(length()));
    return bits > kDigitBits ? bits - kDigitBits : 0;
  }
  // The part that has a digit; equals are told apart by tokens below `tokens`.
  __device__ Range part(int digit, int tokens) const {
    const uint32_t from = first - (static_cast<uint32_t>(digit) << shift()), most = (1u << shift()) - 1;
    return Range{from, from - last > most ? from - most : last, equals, bits}.apart(tokens);
  }
  __device__ Range within(uint32_t least, uint32_t most, int tokens) const {
    if (equals) return *this;
    return Range{min(first, most), max(last, least)}.apart(tokens);
  }
  __device__ Range apart(int tokens) const {
    if (equals || first != last) return *this;
    return {~0u, ~static_cast<uint32_t>(tokens), true, first};
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
  int digit;             // where the limit is exceeded, -1 if nowhere
  Weight before, limit;  // the sum before it
  double top, sum;       // as the scan found them
  Key last;              // kept, as found so far; 0: all are
};

template <class T>
class Search {
 public:
  __device__ Search(Room& room, const CutArguments& a, int64_t r)
      : room_(room),
        softcap_(a.softmax.softcap),
        entries_(a.logits.row<const T>(r)),
        columns_(static_cast<int>(a.logits.columns)) {
    const RowSoftmax row(a.softmax, r);
    const auto place = [this](int64_t token) {
      return token >= 0 && token < columns_ ? static_cast<int>(token) : INT_MIN;
    };
    index_ = place(row.index);
    exclude_ = place(row.exclude);
    shift_ = row.shift;
    const auto top = static_cast<float>(room.top / row.inverse_temperature);
    mass_ = {top, row.inverse_temperature * kLog2E};
  }

  // Leaves the `most` first.
  __device__ void by_count(int64_t most) {
    Range range = all();
    if (most <= kThreads) range.last = max(range.last, floor_by_count(most));
    find(range, static_cast<Weight>(most - 1), Count{});
  }

  // Of what is left leaves those before which the mass is at most a share of it.
  __device__ void by_mass(float share, float inverse_temperature) {
    const double total = room_.last ? static_cast<double>(mass()) / kOne : room_.sum;
    Selection limit{INT64_MAX, share * total};
    Range range = all();
    Summary state;
    state.top = room_.top;
    state.sum = room_.sum;
    const float floor = floor_by_mass(state, limit, columns_, inverse_temperature);
    range.last = max(range.last, room_.last ? bits_of(room_.last) : bits_of_logit(floor));
    find(range, static_cast<Weight>(fmax(0.0, limit.max_mass * kOne)), mass_);
  }

 private:
  // What has a mass.
  __device__ Range all() const { return {bits_of_logit(mass_.top), ordered(kNone) + 1}; }

  // Whether one of `count` tokens from `token` on is not taken as it is.
  __device__ bool special(int token, int count) const {
    const auto inside = [=](int id) { return id >= token && id < token + count; };
    return softcap_ > 0 || inside(index_) || inside(exclude_);
  }

  __device__ float transform(float x, int token) const {
    if (softcap_ > 0) x = softcapped(x, softcap_);
    if (token == index_) x += shift_;
    return token == exclude_ ? kNone : x;
  }

  // Calls f(logits, first token) for runs of entries, from all threads: what must be transformed, or does not
  // fill a load, comes one by one.
  template <class F>
  __device__ void for_runs(F f) const {
    constexpr int N = 16 / sizeof(T);
    using Run = Packed<T, N>;
    using Word = typename Run::Word;
    const auto whole = [&](int at) { return at >= 0 && at + N <= columns_; };
    const auto load = [&](int at) {
      return whole(at) ? __ldcg(reinterpret_cast<const Word*>(entries_ + at)) : Word{};
    };
    // Loads begin where an address is a multiple of their size.
    const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(entries_) / sizeof(T) % N);
    int at = static_cast<int>(threadIdx.x) * N - skew;
    Word next = load(at);
#pragma unroll 1
    for (; at < columns_; at += kThreads * N) {
      Run run;
      run.word = next;
      next = load(at + kThreads * N);
      if (whole(at) && !special(at, N)) {
        float x[N];
#pragma unroll
        for (int k = 0; k < N; ++k) x[k] = widen(run.elements[k]);
        f(x, at);
        continue;
      }
#pragma unroll 1
      for (int token = max(at, 0); token < min(at + N, columns_); ++token) {
        const float x[1] = {transform(widen(entries_[token]), token)};
        f(x, token);
      }
    }
  }

  // Entries below this can't be among the `most` first: of every thread's entries take the largest, of these
  // the most-th, found bit by bit.
  __device__ uint32_t floor_by_count(int64_t most) const {
    float largest = kNone;
    for_runs([&](const auto& x, int) {
#pragma unroll
      for (float v : x) largest = fmaxf(largest, v);
    });
    const uint32_t key = bits_of_logit(largest);
    uint32_t found = 0;
    for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1)
      if (__syncthreads_count(key >= (found | bit)) >= most) found |= bit;
    return found;
  }

  // The mass of what is left up to the last.
  __device__ Weight mass() {
    const Key last = room_.last;
    Weight sum = 0;
    if (holds_) {
      for (unsigned i = threadIdx.x; i < room_.held_count; i += kThreads)
        if (room_.held[i] >= last) sum += mass_(logit_of(bits_of(room_.held[i])));
    } else {
      for_runs([&](const auto& x, int token) {
#pragma unroll
        for (const float& v : x)
          if (key_of(bits_of_logit(v), token + static_cast<int>(&v - x)) >= last) sum += mass_(v);
      });
    }
    sum = sum_lanes(sum);
    __syncthreads();
    if (lane_id() == 0) room_.sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    sum = 0;
#pragma unroll 1
    for (const Weight part : room_.sums) sum += part;
    return sum;
  }

  // The last kept entry is the first at which the sum of weights exceeds the limit.
  template <class W>
  __device__ void find(Range range, Weight limit, W weigh) {
    if (threadIdx.x == 0) {
      room_.before = 0;
      room_.limit = limit;
    }
    range = range.apart(columns_);
    for (bool first = true; !holds_; first = false) {
      uint32_t least, most;
      read(range, weigh, least, most);
      const bool fits = room_.held_count <= kHeld;
      if (!narrow(range)) return;
      if (fits) {
        holds_ = first;
        break;
      }
      range = range.within(least, most, columns_);
    }
    while (!gather(range, weigh)) {
      clear();
      for (unsigned i = threadIdx.x; i < room_.held_count; i += kThreads) {
        const uint32_t behind = range.behind(room_.held[i]);
        if (behind <= range.length())
          add<W>(behind >> range.shift(), weigh(logit_of(bits_of(room_.held[i]))));
      }
      __syncthreads();
      if (!narrow(range)) return;
    }
    settle();
  }

  __device__ void clear() {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kThreads) room_.low[i] = room_.high[i] = 0;
    __syncthreads();
  }

  template <class W>
  __device__ void add(uint32_t digit, Weight weight) {
    const auto low = static_cast<unsigned>(weight);
    const unsigned before = atomicAdd(&room_.low[digit], low);
    if constexpr (W::kWide) carry(digit, weight, before);
  }
  __device__ void carry(uint32_t digit, Weight weight, unsigned before) {
    const unsigned high = static_cast<unsigned>(weight >> 32) + (before > ~static_cast<unsigned>(weight));
    if (high != 0) atomicAdd(&room_.high[digit], high);
  }

  // Sums up the range's weights, and holds its entries as long as there is room. The least and the largest
  // bits in it.
  template <class W>
  __device__ void read(const Range& range, W weigh, uint32_t& least, uint32_t& most) {
    const uint32_t length = range.length();
    const int shift = range.shift();
    least = ~0u;
    most = 0;
    if (threadIdx.x == 0) room_.held_count = 0;
    clear();
    for_runs([&](const auto& x, int token) {
      constexpr int N = sizeof x / sizeof(float), kAbreast = N < 2 ? N : 2;
      bool any = false;
#pragma unroll
      for (int at = 0; at < N; at += kAbreast) {
        uint32_t behind[kAbreast];
        bool some = false;
#pragma unroll
        for (int k = 0; k < kAbreast; ++k) {
          const uint32_t bits = bits_of_logit(x[at + k]);
          behind[k] = range.behind(bits, token + at + k);
          if (behind[k] > length) continue;
          some = true;
          least = min(least, bits);
          most = max(most, bits);
        }
        if (!some) continue;
        any = true;
        Weight weight[kAbreast];
        unsigned before[kAbreast];
#pragma unroll
        for (int k = 0; k < kAbreast; ++k) {
          weight[k] = weigh(x[at + k]);
          if (behind[k] <= length)
            before[k] = atomicAdd(&room_.low[behind[k] >> shift], static_cast<unsigned>(weight[k]));
        }
        if constexpr (W::kWide) {
#pragma unroll
          for (int k = 0; k < kAbreast; ++k)
            if (behind[k] <= length) carry(behind[k] >> shift, weight[k], before[k]);
        }
      }
      if (any && *static_cast<volatile unsigned*>(&room_.held_count) <= kHeld) hold(range, x, token);
    });
    least = fold_lanes(least, [](uint32_t a, uint32_t b) { return min(a, b); });
    most = fold_lanes(most, [](uint32_t a, uint32_t b) { return max(a, b); });
    if (lane_id() == 0) {
      room_.least[threadIdx.x / kWarp] = least;
      room_.most[threadIdx.x / kWarp] = most;
    }
    __syncthreads();
#pragma unroll 1
    for (int warp = 0; warp < kWarps; ++warp) {
      least = min(least, room_.least[warp]);
      most = max(most, room_.most[warp]);
    }
  }

  template <class X>
  __device__ void hold(const Range& range, const X& x, int token) {
#pragma unroll
    for (const float& v : x) {
      const Key key = key_of(bits_of_logit(v), token + static_cast<int>(&v - x));
      if (range.behind(key) > range.length()) continue;
      const unsigned at = atomicAdd(&room_.held_count, 1u);
      if (at < kHeld) room_.held[at] = key;
    }
  }

  __device__ Weight weight_of(int digit) const { return Weight{room_.high[digit]} << 32 | room_.low[digit]; }

  // Narrows a range to the bin in which the sum exceeds the limit; false if it nowhere does.
  __device__ bool narrow(Range& range) {
    const int first = static_cast<int>(threadIdx.x) * kOwnDigits,
              warp = static_cast<int>(threadIdx.x) / kWarp;
    Weight sum = 0;
    for (int i = 0; i < kOwnDigits; ++i) sum += weight_of(first + i);
    Weight upto = sum;
#pragma unroll 1
    for (int by = 1; by < kWarp; by *= 2) {
      const Weight other = __shfl_sync(kAllLanes, upto, max(lane_id() - by, 0));
      if (lane_id() >= by) upto += other;
    }
    if (lane_id() == kWarp - 1) room_.sums[warp] = upto;
    if (threadIdx.x == 0) room_.digit = -1;
    Weight at = room_.before + upto - sum;
    const Weight limit = room_.limit;
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < warp; ++i) at += room_.sums[i];
    if (at <= limit && at + sum > limit) {
      int digit = first;
      for (Weight own; at + (own = weight_of(digit)) <= limit; ++digit) at += own;
      room_.digit = digit;
      room_.before = at;
    }
    __syncthreads();
    const int digit = room_.digit;
    if (digit >= 0) range = range.part(digit, columns_);
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
      if (range.behind(key) > range.length()) continue;
      const unsigned at = atomicAdd(&room_.few_count, 1u);
      if (at >= kFew) continue;
      room_.few[at] = key;
      room_.few_weights[at] = weigh(logit_of(bits_of(key)));
    }
    __syncthreads();
    return room_.few_count <= kFew;
  }

  __device__ void settle() {
    if (threadIdx.x < room_.few_count) {
      const Key key = room_.few[threadIdx.x];
      Weight before = room_.before;
      for (unsigned i = 0; i < room_.few_count; ++i)
        if (room_.few[i] > key) before += room_.few_weights[i];
      if (before <= room_.limit && before + room_.few_weights[threadIdx.x] > room_.limit)
        room_.last = max(room_.last, key);
    }
    __syncthreads();
  }

  Room& room_;
  float softcap_, shift_;
  const T* entries_;
  int columns_, index_, exclude_;
  Mass mass_;
  bool holds_ = false;  // whether all that may be kept is held
};

// All up to the last key are kept, or, if it is 0, all.
__device__ void finish(const CutArguments& a, int64_t r, const Room& room, Key last) {
  Summary state;
  state.top = room.top;
  Selection selection{1, kInfinity};
  selection.everything = last == 0;
  selection.prefix = bits_of(last);
  const Cut cut = finish_selection(state, a.min_p, a.softmax.temperature, &selection, r);
  a.cuts[r] = cut;
  a.ends[r] = cut.ties == 0 ? 0 : last == 0 ? INT64_MAX : token_of(last) + int64_t{1};
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    cut_rows_kernel(const __grid_constant__ CutArguments a) {
  __shared__ Room room;
  for (int64_t r = blockIdx.x; r < a.logits.rows; r += gridDim.x) {
    if (threadIdx.x == 0) {
      room.last = 0;
      room.top = a.state[r].top;
      room.sum = a.state[r].sum;
    }
    __syncthreads();
    const int64_t most = a.top_k ? a.top_k[r] : INT64_MAX;
    if (!a.state[r].empty() && most > 0) {
      Search<T> search(room, a, r);
      if (most < a.logits.columns) search.by_count(most);
      if (a.top_p && a.top_p[r] < 1) search.by_mass(a.top_p[r], RowSoftmax(a.softmax, r).inverse_temperature);
    }
    __syncthreads();
    if (threadIdx.x == 0) finish(a, r, room, most < 1 ? key_of(ordered(-kNone), -1) : room.last);
  }
}

}  // namespace

void cut_rows(const CutArguments& a, cudaStream_t stream) {
  with_dtype(a.logits.dtype, [&](auto type) {
    launch("categorical.sample's cut", cut_rows_kernel<decltype(type)>, a.logits.rows, kThreads, stream, a);
  });
}

}  // namespace dlcore::cuda
