// One read of the logits: statistics and an exact draw.
//
// A warp reads a chunk of a row, four groups of 256 tokens at a time, eight lanes a group, and leaves one
// Part of it; chunks know nothing of each other, so a row may have one or many. A second kernel, a warp a
// row, merges the parts, and reads the two groups that matter again: the largest entry's and the draw's.
#include "../common/noise.h"
#include "categorical.h"
#include "launch.h"
#include "softmax.h"

namespace dlcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kResident =
    2;  // blocks a multiprocessor at least: left alone, the assembler aims for more, and spills
constexpr int kAbreastGroups = 4;
constexpr int kGroupLanes = kWarp / kAbreastGroups;
constexpr int kLaneEntries = static_cast<int>(kGroup) / kGroupLanes;
// A chunk has so many times four groups at most, so that each lane keeps one.
constexpr int kMostSteps = kGroupLanes;
// So many chunks keep a large device busy; fewer rows get smaller chunks.
constexpr int64_t kEnoughChunks = 4096;

// What a chunk tells. Logits are unscaled; sums are relative to the largest, of 2^d and 2^d·d.
struct alignas(16) Part {
  float top, second;  // the largest logit, and the largest of other groups
  float sum, weighted;
  float score;       // the draw's, relative to the largest logit
  int best, winner;  // groups of the row
  int unused;
};

struct Plan {
  int steps;
  int64_t chunks;  // of a row
  Plan(int64_t rows, int64_t columns) {
    const int64_t groups = ceil_div(columns, kGroup), all = rows * groups / (kAbreastGroups * kEnoughChunks);
    steps = static_cast<int>(std::clamp<int64_t>(all, 1, kMostSteps));
    chunks = ceil_div(groups, kAbreastGroups * steps);
  }
};

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

// Reads entries [at, at + 256) of a row: of this lane's runs of N, the k-th begins at (k·8 + its place)·N.
template <int N, bool CUT, class T>
__device__ void read_group(const T* p, int64_t at, int64_t columns, int64_t first, const RowSoftmax& row,
                           const RowCut& cut, float (&x)[kLaneEntries]) {
  const int place = lane_id() % kGroupLanes * N;
  if (!CUT && at + kGroup <= columns && !row.special(first + at, kGroup)) {
#pragma unroll
    for (int i = 0; i < kLaneEntries; i += N) {
      const auto run = Packed<T, N>::load(p + at + i * kGroupLanes + place);
#pragma unroll
      for (int k = 0; k < N; ++k) x[i + k] = widen(run.elements[k]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneEntries; ++i) {
    const int64_t column = at + i / N * N * kGroupLanes + place + i % N;
    x[i] = column < columns ? row.transform(widen(p[column]), first + column) : kNone;
    if (CUT) x[i] = cut(x[i], first + column);
  }
}

// Of a group, in all of its lanes.
struct GroupSums {
  float top = kNone, sum = 0, weighted = 0;
};

__device__ GroupSums sum_group(const float (&x)[kLaneEntries], float scale) {
  GroupSums s;
#pragma unroll
  for (float v : x) s.top = fmaxf(s.top, v);
  s.top = largest_lanes<kGroupLanes>(s.top);
  const float reference = s.top > kNone ? s.top : 0;
#pragma unroll
  for (float v : x) {
    const float d = (v - reference) * scale, e = exp2_fast(d);
    s.sum += e;
    s.weighted = fmaf(e, fmaxf(d, -126.0f), s.weighted);
  }
  s.sum = sum_lanes<kGroupLanes>(s.sum);
  s.weighted = sum_lanes<kGroupLanes>(s.weighted);
  return s;
}

// A part from one group in each lane, the `place`-th of the chunk that begins at group `first`.
__device__ Part merge_groups(const GroupSums& s, int place, const RowSoftmax& row, const Keys& keys,
                             int64_t r, int64_t first, int64_t first_noise) {
  const Leader top = find_leader(s.top, place);
  const float reference = top.value > kNone ? top.value : 0, above = s.top - reference;
  const float drop = fmaxf(above * (row.inverse_temperature * kLog2E), -126.0f);
  const float factor = s.top > kNone ? exp2_fast(drop) : 0;
  Part part{};
  part.top = top.value;
  part.best = static_cast<int>(first) + top.at;
  part.second = largest_lanes(place == top.at ? kNone : s.top);
  part.sum = sum_lanes(s.sum == s.sum ? factor * s.sum : s.sum);
  part.weighted = sum_lanes(factor * (s.weighted + drop * s.sum));
  if (!keys) return part;
  float score = kNone;
  if (s.sum > 0)
    score = above * row.inverse_temperature + log_near(fmaxf(s.sum, 1.0f)) +
            gumbel(keys[r], Domain::kGroup, first_noise + first + place);
  const Leader winner = find_leader(score, place);
  part.score = winner.value;
  part.winner = static_cast<int>(first) + winner.at;
  return part;
}

template <class T, int N, bool CUT>
__global__ void __launch_bounds__(kThreads, kResident)
    scan_kernel(const __grid_constant__ ScanArguments a, const int64_t* ends, Part* parts, int steps,
                int64_t chunks) {
  const int lane = lane_id(), place = lane % kGroupLanes, octet = lane / kGroupLanes;
  for (int64_t i = global_warp(); i < a.logits.rows * chunks; i += all_warps()) {
    const int64_t r = i / chunks, first = i % chunks * kAbreastGroups * steps;
    if (unread(a, r)) continue;
    const RowSoftmax row(a.softmax, r);
    const RowCut cut(CUT ? a.cuts : nullptr, ends, r);
    const T* p = a.logits.row<const T>(r);
    GroupSums kept;
    for (int step = 0; step < steps; ++step) {
      float x[kLaneEntries];
      const int64_t group = first + kAbreastGroups * step + octet;
      read_group<N, CUT>(p, group * kGroup, a.logits.columns, a.first_token, row, cut, x);
      const GroupSums s = sum_group(x, row.inverse_temperature * kLog2E);
      if (place == step) kept = s;
    }
    const Part part =
        merge_groups(kept, kAbreastGroups * place + octet, row, a.keys, r, first, a.first_token / kGroup);
    if (lane == 0) parts[i] = part;
  }
}

// The row's largest logit: its group, and the largest logit of other groups.
struct Top {
  Leader leader;
  float second;
};

__device__ Top find_top(const Part* parts, int64_t chunks) {
  float top = kNone, second = kNone;
  int best = 0x7FFFFFFF;
  for (int64_t c = lane_id(); c < chunks; c += kWarp) {
    const Part& part = parts[c];
    const bool leads = part.top > top;
    second = leads ? fmaxf(top, part.second) : fmaxf(second, part.top);
    best = leads ? part.best : best;
    top = leads ? part.top : top;
  }
  const Leader leader = find_leader(top, best);
  return {leader, largest_lanes(best == leader.at ? second : fmaxf(second, top))};
}

struct Sums {
  double sum, weighted, score;
  int winner;
};

__device__ Sums add_parts(const Part* parts, int64_t chunks, float top, const RowSoftmax& row) {
  Sums s{0, 0, -kInfinity, -1};
  for (int64_t c = lane_id(); c < chunks; c += kWarp) {
    const Part& part = parts[c];
    const bool some = part.top > kNone;
    const double drop = some ? (static_cast<double>(part.top) - top) * row.inverse_temperature : 0;
    const double factor = some ? exp(drop) : 0, sum = part.sum;
    s.sum += sum == sum ? factor * sum : sum;
    s.weighted += factor * (part.weighted * kLn2 + drop * sum);
    const double score = some ? drop + part.score : -kInfinity;
    if (!(score > s.score)) continue;
    s.score = score;
    s.winner = part.winner;
  }
  s.sum = sum_lanes(s.sum);
  s.weighted = sum_lanes(s.weighted);
  const double best = fold_lanes(s.score, [](double a, double b) { return a > b ? a : b; });
  s.winner = __reduce_min_sync(kAllLanes, s.score == best ? s.winner : 0x7FFFFFFF);
  s.score = best;
  return s;
}

// Entries of a group for a whole warp: pair k of this lane begins at entry 64·k + 2·lane.
constexpr int kPairs = static_cast<int>(kGroup) / (2 * kWarp);

template <class T>
class Group {
 public:
  __device__ Group(const ScanArguments& a, const RowSoftmax& row, const RowCut& cut, int64_t r, int64_t group)
      : first_(group * kGroup) {
    const T* p = a.logits.row<const T>(r);
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) {
      const int64_t column = first_ + entry(i);
      const int64_t token = a.first_token + column;
      x_[i] = column < a.logits.columns ? cut(row.transform(widen(p[column]), token), token) : kNone;
    }
  }

  // The largest, and the largest other.
  __device__ Leader leader(float& second) const {
    const Leader found = leader(x_);
    float other = kNone;
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i)
      if (entry(i) != found.at) other = fmaxf(other, x_[i]);
    second = largest_lanes(other);
    return found;
  }

  // The draw: a Gumbel number for each token.
  __device__ Leader draw(Key key, int64_t first_token, float inverse_temperature) const {
    const float top = leader(x_).value;
    float scores[2 * kPairs];
#pragma unroll
    for (int i = 0; i < 2 * kPairs; i += 2) {
      const int64_t token = first_token + first_ + entry(i);
      const Block b = block(key, Domain::kToken, token / 2);
      uint64_t own = bits(b, 0), next = bits(b, 1);
      if (token % 2) {  // the second of a pair, and the first of the one after
        own = next;
        next = bits(block(key, Domain::kToken, token / 2 + 1), 0);
      }
      scores[i] = fmaf(x_[i] - top, inverse_temperature, gumbel(own));
      scores[i + 1] = fmaf(x_[i + 1] - top, inverse_temperature, gumbel(next));
    }
    const int at = leader(scores).at;
    float value = kNone;
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i)
      if (entry(i) == at) value = x_[i];
    return {largest_lanes(value), at};
  }

 private:
  __device__ static int entry(int i) { return i / 2 * 2 * kWarp + 2 * lane_id() + i % 2; }

  __device__ static Leader leader(const float (&x)[2 * kPairs]) {
    float best = kNone;
    int at = 0x7FFFFFFF;
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) {
      at = x[i] > best ? entry(i) : at;
      best = fmaxf(best, x[i]);
    }
    return find_leader(best, at);
  }

  int64_t first_;
  float x_[2 * kPairs];
};

template <class T>
__device__ double logit(const ScanArguments& a, const RowSoftmax& row, int64_t r, int64_t token) {
  const int64_t column = token - a.first_token;
  if (column < 0 || column >= a.logits.columns) return kNaN;
  return static_cast<double>(row.transform(widen(a.logits.row<const T>(r)[column]), token)) *
         row.inverse_temperature;
}

template <class T>
__device__ Summary summarize(const ScanArguments& a, const int64_t* ends, const Part* parts, int64_t chunks,
                             int64_t r) {
  const RowSoftmax row(a.softmax, r);
  const RowCut cut(a.cuts, ends, r);
  const double inverse = row.inverse_temperature;
  const Top top = find_top(parts, chunks);
  const Sums sums = add_parts(parts, chunks, top.leader.value > kNone ? top.leader.value : 0, row);
  Summary s;
  s.invalid = !(sums.sum < kInfinity) || top.leader.value == -kNone;
  if (s.invalid) return s;
  s.index_logit = logit<T>(a, row, r, row.index);
  if (a.target) s.target_logit = logit<T>(a, row, r, a.target[r]);
  if (!(top.leader.value > kNone)) return s;
  s.top = top.leader.value * inverse;
  s.sum = fmax(1.0, sums.sum);
  s.weighted = fmin(0.0, sums.weighted);
  float second;
  const Leader best = Group<T>(a, row, cut, r, top.leader.at).leader(second);
  s.argmax = a.first_token + top.leader.at * kGroup + best.at;
  s.second = fmaxf(second, top.second) * inverse;
  if (!a.keys) return s;
  // At temperature 0 without noise, so that the largest of all tiles wins.
  s.score = s.token_logit = s.top;
  s.token = s.argmax;
  if (row.greedy) return s;
  s.score += sums.score;
  const Leader drawn =
      Group<T>(a, row, cut, r, sums.winner).draw(a.keys[r], a.first_token, row.inverse_temperature);
  s.token = a.first_token + sums.winner * kGroup + drawn.at;
  s.token_logit = drawn.value * inverse;
  return s;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    reduce_kernel(const __grid_constant__ ScanArguments a, const int64_t* ends, const Part* parts,
                  int64_t chunks) {
  for (int64_t r = global_warp(); r < a.logits.rows; r += all_warps()) {
    Summary s;
    if (!unread(a, r)) s = summarize<T>(a, ends, parts + r * chunks, chunks, r);
    if (lane_id() != 0) continue;
    a.state[r] = a.start ? s : merge(a.state[r], s);
  }
}

template <class T, int N, bool CUT = false>
void launch_scan(const ScanArguments& a, const int64_t* ends, Part* parts, const Plan& plan,
                 cudaStream_t stream) {
  const int64_t warps = a.logits.rows * plan.chunks;
  launch("categorical.scan", scan_kernel<T, N, CUT>, ceil_div(warps, kThreads / kWarp), kThreads, stream, a,
         ends, parts, plan.steps, plan.chunks);
}

template <class T>
void launch_both(const ScanArguments& a, const int64_t* ends, Part* parts, const Plan& plan,
                 cudaStream_t stream) {
  constexpr int kMost = 16 / sizeof(T);
  const int abreast = most_abreast(a.logits, sizeof(T));
  if (a.cuts)
    launch_scan<T, 1, true>(a, ends, parts, plan, stream);
  else if (abreast == kMost)
    launch_scan<T, kMost>(a, ends, parts, plan, stream);
  else if (abreast >= kMost / 2)
    launch_scan<T, kMost / 2>(a, ends, parts, plan, stream);
  else
    launch_scan<T, 1>(a, ends, parts, plan, stream);
  launch("categorical.scan's parts", reduce_kernel<T>, ceil_div(a.logits.rows, kThreads / kWarp), kThreads,
         stream, a, ends, parts, plan.chunks);
}

}  // namespace

int64_t scan_bytes(int64_t rows, int64_t columns) {
  return rows * Plan(rows, columns).chunks * static_cast<int64_t>(sizeof(Part));
}

void scan(const ScanArguments& a, const int64_t* ends, void* workspace, cudaStream_t stream) {
  const Plan plan(a.logits.rows, a.logits.columns);
  with_dtype(a.logits.dtype, [&](auto type) {
    launch_both<decltype(type)>(a, ends, static_cast<Part*>(workspace), plan, stream);
  });
}

}  // namespace dlcore::cuda
