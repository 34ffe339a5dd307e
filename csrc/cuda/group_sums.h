// Sums over groups of a row's entries: a warp reads four at once, with an octet of its lanes each.
#pragma once

#include "softmax.h"

namespace dlcore::cuda {

constexpr int kAbreastGroups = 4;
constexpr int kGroupLanes = kWarp / kAbreastGroups;
constexpr int kLaneEntries = static_cast<int>(kGroup) / kGroupLanes;
constexpr int kGroupBits = 8;
static_assert(kGroup == 1 << kGroupBits);

// What a truncated draw keeps of a row: all above a threshold, and its equals before `end`.
struct RowCut {
  float threshold = kNone;
  int64_t end = 0;
  __device__ RowCut(const Cut* cuts, const int64_t* ends, int64_t r) {
    if (!cuts) return;
    threshold = cuts[r].threshold;
    end = ends[r];
  }
  __device__ float operator()(float x, int64_t token) const {
    return x < threshold || (x == threshold && token >= end) ? kNone : x;
  }
};

// A row's entries as the softmax takes them, before the temperature. CHANGED: all are other than they are
// stored; else only those at `index` and `exclude`, which are columns, or -1.
template <class T, bool CHANGED>
struct Entries {
  const T* p;
  int columns, index, exclude;
  float shift, softcap;
  int64_t first_token;
  RowCut cut;

  __device__ Entries(const ScanArguments& a, const RowSoftmax& row, const int64_t* ends, int64_t r)
      : p(a.logits.row<const T>(r)),
        columns(static_cast<int>(a.logits.columns)),
        shift(row.shift),
        softcap(row.softcap),
        first_token(a.first_token),
        cut(CHANGED ? a.cuts : nullptr, ends, r) {
    index = shift == 0 ? -1 : column_of(row.index);
    exclude = column_of(row.exclude);
  }
  __device__ int column_of(int64_t token) const {
    const bool inside = token >= first_token && token - first_token < columns;
    return inside ? static_cast<int>(token - first_token) : -1;
  }
  // As truncation finds it.
  __device__ float whole(int column) const {
    float x = widen(p[column]);
    if (CHANGED && softcap > 0) x = softcapped(x, softcap);
    if (column == index) x += shift;
    return column == exclude ? kNone : x;
  }
  __device__ float operator()(int column) const {
    if (column >= columns) return kNone;
    return CHANGED ? cut(whole(column), first_token + column) : whole(column);
  }
};

// The largest of some entries, and Σ 2^d and Σ 2^d·d, where d is an entry's distance to it.
struct Sums {
  float top = kNone, sum = 0, weighted = 0;

  // How far below a new reference they lie, as a power of 2; nothing lies as far as need be.
  __device__ float drop(float reference, float scale) const {
    return fmaxf((top - reference) * scale, kLeastPower);
  }
  // Relative to another reference, of this drop.
  __device__ void lower(float drop) {
    const float factor = exp2_fast(drop);
    weighted = factor * fmaf(drop, sum, weighted);
    sum *= factor;
  }
};

// Of a group a lane has runs of N entries, of which the k-th begins at (k·8 + its place)·N.
template <class T, int N, bool CHANGED>
class GroupReader {
 public:
  __device__ GroupReader(const Entries<T, CHANGED>& entries, float scale)
      : entries_(entries), scale_(scale) {}

  // A group's, in all of its lanes.
  __device__ Sums sum(int group) const {
    Sums s;
    bool done = plain(group);
    if (done) done = sum_plain(group, s);
    if (!done) s = sum_any(group);
    const float top = largest_lanes<kGroupLanes>(s.top);
    s.lower(s.drop(top > kNone ? top : 0, scale_));
    return {top, sum_lanes<kGroupLanes>(s.sum), sum_lanes<kGroupLanes>(s.weighted)};
  }

 private:
  static constexpr int kIn = kInWord<T>, kWords = kLaneEntries / kIn, kRun = N > kIn ? N : kIn;

  __device__ static constexpr int offset(int i) { return i / N * N * kGroupLanes + i % N; }
  // The lane's first entry of a group.
  __device__ static int first(int group) { return (group << kGroupBits) + lane_id() % kGroupLanes * N; }
  // Whether a group is whole, and its entries are taken as they are stored.
  __device__ bool plain(int group) const {
    return !CHANGED && group != entries_.index >> kGroupBits && group != entries_.exclude >> kGroupBits &&
           group < entries_.columns >> kGroupBits;
  }

  __device__ void read(int group, uint32_t (&words)[kWords]) const {
    const T* p = entries_.p + first(group);
#pragma unroll
    for (int i = 0; i < kLaneEntries; i += kRun) {
      if constexpr (N >= kIn)
        load_words<kRun / kIn>(p + offset(i), words + i / kIn);
      else
        words[i / kIn] = word_of(p[offset(i)], 0) | word_of(p[offset(i + 1)], 1);
    }
  }

  // Of entries as they are stored; false if it can't: with -inf among others, NaN, or very far from 0.
  __device__ bool sum_plain(int group, Sums& s) const {
    uint32_t words[kWords];
    read(group, words);
    uint32_t most = words[0];
#pragma unroll
    for (int i = 1; i < kWords; ++i) most = larger<T>(most, words[i]);
#pragma unroll
    for (int k = 0; k < kIn; ++k) s.top = fmaxf(s.top, element<T>(most, k));
    const float top = s.top > kNone ? s.top : 0, reference = top * scale_;
#pragma unroll
    for (int i = 0; i < kLaneEntries; ++i) {
      const float d = fmaf(element<T>(words[i / kIn], i % kIn), scale_, -reference), e = exp2_fast(d);
      s.sum += e;
      s.weighted = fmaf(e, d, s.weighted);
    }
    if (s.sum == 0) s.weighted = 0;
    // The reference's rounding is in all of them.
    s.lower(-fmaf(top, scale_, -reference));
    return s.weighted == s.weighted && fabsf(reference) < 0x1p20f;
  }

  // Of any entries, a few at a time.
  __device__ Sums sum_any(int group) const {
    constexpr int kFew = 8;
    Sums s;
#pragma unroll 1
    for (int i = 0; i < kLaneEntries; i += kFew) {
      float x[kFew], top = s.top;
#pragma unroll
      for (int k = 0; k < kFew; ++k) {
        x[k] = entries_(first(group) + offset(i + k));
        top = fmaxf(top, x[k]);
      }
      const float reference = top > kNone ? top : 0;
      s.lower(s.drop(reference, scale_));
      s.top = top;
#pragma unroll
      for (float v : x) {
        const float d = (v - reference) * scale_, e = exp2_fast(d);
        s.sum += e;
        s.weighted = fmaf(e, fmaxf(d, kLeastPower), s.weighted);
      }
    }
    return s;
  }

  const Entries<T, CHANGED>& entries_;
  float scale_;
};

}  // namespace dlcore::cuda
