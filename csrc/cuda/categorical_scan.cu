// One read of the logits: statistics and an exact draw.
//
// A warp reads a chunk of a row, four groups of 256 tokens at a time, eight lanes a group, and leaves one
// Part of it; chunks know nothing of each other, so a row may have one or many. A second kernel, a warp a
// row, merges the parts, and reads the two groups that matter again: the largest entry's and the draw's.
#include "../common/noise.h"
#include "categorical.h"
#include "group_sums.h"
#include "launch.h"

namespace dlcore::cuda {
namespace {

constexpr int kThreads = 256, kRowThreads = 128;
// Blocks a multiprocessor at least: so many warps that some wait for memory while others compute.
template <class T, int N, bool CHANGED>
constexpr int kResident = CHANGED || (sizeof(T) < 4 && N > 1) ? 4
                          : sizeof(T) < 4                     ? 2
                                                              : 3;
constexpr int kRowsResident = 5;
// So many steps of four groups leave a group for each lane.
constexpr int kRound = kGroupLanes;
constexpr int kMostRounds = 4;
// So many chunks keep a large device busy, and so many keep all of it busy to the end.
constexpr int64_t kEnoughChunks = 4096, kManyChunks = 32768;
constexpr int kNoGroup = 0x7FFFFFFF;

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
    const int64_t all = ceil_div(columns, kAbreastGroups * kGroup);
    const int64_t few = std::min<int64_t>(rows * all / kEnoughChunks, kRound);
    const int64_t many = std::min<int64_t>(rows * all / kManyChunks, kMostRounds * kRound);
    const int64_t most = std::max<int64_t>({few, many, 1});
    steps = static_cast<int>(ceil_div(all, ceil_div(all, most)));
    chunks = ceil_div(all, steps);
  }
};

// What a lane knows of its groups, one after the other.
struct LaneSums {
  Sums sums;
  float second = kNone;  // the largest entry of other groups than the best
  int best = kNoGroup, winner = kNoGroup;
  float drawn_top = 0, drawn = 0;  // the winner's largest entry, and its score without it

  __device__ void add(const Sums& s, int group, float scale) {
    Sums less = s;
    if (s.top > sums.top) {
      less = sums;
      sums = s;
      second = less.top;
      best = group;
    } else {
      second = fmaxf(second, s.top);
    }
    less.lower(less.drop(sums.top, scale));
    sums.sum += less.sum;
    sums.weighted += less.weighted;
  }

  __device__ void draw(const Sums& s, int group, float inverse_temperature, float gumbel) {
    const float value = log_near(fmaxf(s.sum, 1.0f)) + gumbel;
    const float above = (s.top - drawn_top) * inverse_temperature + (value - drawn);
    if (winner != kNoGroup && !(above > 0)) return;
    drawn_top = s.top;
    drawn = value;
    winner = group;
  }
};

__device__ Part merge_lanes(LaneSums s, float scale, float inverse_temperature) {
  const Leader top = find_leader(s.sums.top, s.best);
  const float reference = top.value > kNone ? top.value : 0;
  const float score = (s.drawn_top - reference) * inverse_temperature + s.drawn;
  const Leader winner = find_leader(s.winner == kNoGroup ? kNone : score, s.winner);
  s.sums.lower(s.sums.drop(reference, scale));
  Part part{};
  part.top = top.value;
  part.best = top.at;
  part.second = largest_lanes(s.best == top.at ? s.second : s.sums.top);
  part.sum = sum_lanes(s.sums.sum);
  part.weighted = sum_lanes(s.sums.weighted);
  part.score = winner.value;
  part.winner = winner.at;
  return part;
}

template <class T, int N, bool CHANGED>
__global__ void __launch_bounds__(kThreads, kResident<T, N, CHANGED>)
    scan_kernel(const __grid_constant__ ScanArguments a, const int64_t* ends, Part* parts, int steps,
                int64_t chunks) {
  // A thread's own: registers are for what is read.
  __shared__ LaneSums all_sums[kThreads];
  __shared__ Key keys[kThreads];
  LaneSums& sums = all_sums[threadIdx.x];
  Key& key = keys[threadIdx.x];
  const int lane = lane_id(), place = lane % kGroupLanes, octet = lane / kGroupLanes;
  const int groups = static_cast<int>((a.logits.columns + kGroup - 1) / kGroup);
  for (int64_t i = global_warp(); i < a.logits.rows * chunks; i += all_warps()) {
    const int64_t r = i / chunks;
    if (unread(a, r)) continue;
    const RowSoftmax row(a.softmax, r);
    const float inverse = row.inverse_temperature, scale = inverse * kLog2E;
    const Entries<T, CHANGED> entries(a, row, ends, r);
    const GroupReader<T, N, CHANGED> reader(entries, scale);
    sums = LaneSums();
    if (a.keys) key = a.keys[r];
    const int first = static_cast<int>(i - r * chunks) * steps * kAbreastGroups;
    const int most = first + steps * kAbreastGroups, end = most < groups ? most : groups;
    for (int begin = first; begin < end; begin += kRound * kAbreastGroups) {
      Sums own;
#pragma unroll 1
      for (int step = 0; step < kRound && begin + step * kAbreastGroups < end; ++step) {
        const int group = begin + step * kAbreastGroups + octet;
        const Sums s = reader.sum(group);
        if (place == step) own = s;
      }
      const int group = begin + place * kAbreastGroups + octet;
      sums.add(own, group, scale);
      if (!a.keys || !(own.sum > 0)) continue;
      const float noise = gumbel(key, Domain::kGroup, a.first_token / kGroup + group);
      sums.draw(own, group, inverse, noise);
    }
    const Part part = merge_lanes(sums, scale, inverse);
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
  int best = kNoGroup;
#pragma unroll 1
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

// Of a row, relative to its largest logit.
struct RowSums {
  double sum = 0, weighted = 0;
};

__device__ RowSums add_parts(const Part* parts, int64_t chunks, float top, float inverse_temperature) {
  RowSums s;
#pragma unroll 1
  for (int64_t c = lane_id(); c < chunks; c += kWarp) {
    const Part& part = parts[c];
    const double drop = part.top > kNone ? (static_cast<double>(part.top) - top) * inverse_temperature : 0;
    const double factor = exp2_fast(static_cast<float>(drop) * kLog2E), sum = part.sum;
    s.sum += factor * sum;
    s.weighted += factor * (part.weighted * kLn2 + drop * sum);
  }
  return {sum_lanes(s.sum), sum_lanes(s.weighted)};
}

// The draw's group, and its score relative to the row's largest logit.
struct Winner {
  double score;
  int group;
};

__device__ Winner find_winner(const Part* parts, int64_t chunks, float top, float inverse_temperature) {
  Winner found{-kInfinity, kNoGroup};
#pragma unroll 1
  for (int64_t c = lane_id(); c < chunks; c += kWarp) {
    const Part& part = parts[c];
    if (!(part.top > kNone)) continue;
    const double score = (static_cast<double>(part.top) - top) * inverse_temperature + part.score;
    if (score > found.score) found = {score, part.winner};
  }
  const double best = fold_lanes(found.score, [](double a, double b) { return a > b ? a : b; });
  return {best, __reduce_min_sync(kAllLanes, found.score == best ? found.group : kNoGroup)};
}

// A group, read by a whole warp: pair k of a lane begins at entry 64·k + 2·lane.
template <class T, bool CHANGED>
class Group {
 public:
  __device__ Group(const Entries<T, CHANGED>& entries, int group)
      : entries_(entries), first_(group << kGroupBits) {
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) x_[i] = entries(first_ + place(i));
  }

  // The largest, and the largest other.
  __device__ Leader leader(float& second) const {
    float best = kNone, other = kNone;
    int at = kNoGroup;
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) {
      other = fmaxf(other, fminf(x_[i], best));
      at = x_[i] > best ? place(i) : at;
      best = fmaxf(best, x_[i]);
    }
    const Leader found = find_leader(best, at);
    second = largest_lanes(at == found.at ? other : best);
    return found;
  }

  // The draw: a Gumbel number for each token.
  __device__ Leader draw(Key key, float inverse_temperature) const {
    float second, best = kNone, value = kNone;
    const float top = leader(second).value;
    int at = kNoGroup;
#pragma unroll 1
    for (int i = 0; i < 2 * kPairs; i += 2) {
      const int64_t token = entries_.first_token + first_ + place(i);
      const Block b = block(key, Domain::kToken, token / 2);
      uint64_t own = bits(b, 0), next = bits(b, 1);
      if (token % 2) {  // the second of a pair, and the first of the one after
        own = next;
        next = bits(block(key, Domain::kToken, token / 2 + 1), 0);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float x = entries_(first_ + place(i) + k);
        const float score = fmaf(x - top, inverse_temperature, gumbel(k == 0 ? own : next));
        if (!(score > best)) continue;
        best = score;
        at = place(i) + k;
        value = x;
      }
    }
    const Leader drawn = find_leader(best, at);
    return {largest_lanes(at == drawn.at ? value : kNone), drawn.at};
  }

 private:
  static constexpr int kPairs = static_cast<int>(kGroup) / (2 * kWarp);

  __device__ static int place(int i) { return i / 2 * 2 * kWarp + 2 * lane_id() + i % 2; }

  const Entries<T, CHANGED>& entries_;
  int first_;
  float x_[2 * kPairs];
};

template <class T, bool CHANGED>
__device__ double logit(const Entries<T, CHANGED>& entries, int64_t token, float inverse_temperature) {
  const int column = entries.column_of(token);
  return column < 0 ? kNaN : static_cast<double>(entries.whole(column)) * inverse_temperature;
}

template <class T, bool CHANGED>
__device__ Summary summarize(const ScanArguments& a, const int64_t* ends, const Part* parts, int64_t chunks,
                             int64_t r) {
  const RowSoftmax row(a.softmax, r);
  const Entries<T, CHANGED> entries(a, row, ends, r);
  const float inverse = row.inverse_temperature;
  const Top top = find_top(parts, chunks);
  const bool some = top.leader.value > kNone;
  Winner winner{0, top.leader.at};
  if (a.keys && !row.greedy) winner = find_winner(parts, chunks, top.leader.value, inverse);
  // Of a row with NaN there may be no winner.
  Leader best{}, drawn{};
  float second = kNone;
  if (some && winner.group != kNoGroup) {
    // Both are read before either is looked at.
    const Group<T, CHANGED> leading(entries, top.leader.at), drawn_from(entries, winner.group);
    drawn = best = leading.leader(second);
    if (a.keys && !row.greedy) drawn = drawn_from.draw(a.keys[r], inverse);
  }
  const RowSums sums = add_parts(parts, chunks, some ? top.leader.value : 0, inverse);
  Summary s;
  s.invalid = !(sums.sum < kInfinity) || top.leader.value == -kNone;
  if (s.invalid) return s;
  s.index_logit = logit(entries, row.index, inverse);
  if (a.target) s.target_logit = logit(entries, a.target[r], inverse);
  if (!some) return s;
  s.top = static_cast<double>(top.leader.value) * inverse;
  s.second = static_cast<double>(fmaxf(second, top.second)) * inverse;
  s.sum = fmax(1.0, sums.sum);
  s.weighted = fmin(0.0, sums.weighted);
  s.argmax = a.first_token + top.leader.at * kGroup + best.at;
  if (!a.keys) return s;
  // At temperature 0 without noise, so that the largest of all tiles wins.
  s.score = s.top + winner.score;
  s.token = a.first_token + winner.group * kGroup + drawn.at;
  s.token_logit = static_cast<double>(drawn.value) * inverse;
  return s;
}

template <class T, bool CHANGED>
__global__ void __launch_bounds__(kRowThreads, kRowsResident)
    reduce_kernel(const __grid_constant__ ScanArguments a, const int64_t* ends, const Part* parts,
                  int64_t chunks) {
  for (int64_t r = global_warp(); r < a.logits.rows; r += all_warps()) {
    Summary s;
    if (!unread(a, r)) s = summarize<T, CHANGED>(a, ends, parts + r * chunks, chunks, r);
    if (lane_id() != 0) continue;
    a.state[r] = a.start ? s : merge(a.state[r], s);
  }
}

template <class T, int N, bool CHANGED>
void launch_both(const ScanArguments& a, const int64_t* ends, Part* parts, const Plan& plan,
                 cudaStream_t stream) {
  const int64_t rows = a.logits.rows, warps = rows * plan.chunks;
  launch("categorical.scan", scan_kernel<T, N, CHANGED>, ceil_div(warps, kThreads / kWarp), kThreads, stream,
         a, ends, parts, plan.steps, plan.chunks);
  launch("categorical.scan's parts", reduce_kernel<T, CHANGED>, ceil_div(rows, kRowThreads / kWarp),
         kRowThreads, stream, a, ends, parts, plan.chunks);
}

template <class T>
void scan_rows(const ScanArguments& a, const int64_t* ends, Part* parts, const Plan& plan,
               cudaStream_t stream) {
  constexpr int kMost = 16 / sizeof(T);
  const int abreast = most_abreast(a.logits, sizeof(T));
  if (a.cuts || a.softmax.softcap > 0) return launch_both<T, 1, true>(a, ends, parts, plan, stream);
  if (abreast == kMost) return launch_both<T, kMost, false>(a, ends, parts, plan, stream);
  if (abreast >= kMost / 2) return launch_both<T, kMost / 2, false>(a, ends, parts, plan, stream);
  launch_both<T, 1, false>(a, ends, parts, plan, stream);
}

}  // namespace

int64_t scan_bytes(int64_t rows, int64_t columns) {
  return rows * Plan(rows, columns).chunks * static_cast<int64_t>(sizeof(Part));
}

void scan(const ScanArguments& a, const int64_t* ends, void* workspace, cudaStream_t stream) {
  const Plan plan(a.logits.rows, a.logits.columns);
  with_dtype(a.logits.dtype, [&](auto type) {
    scan_rows<decltype(type)>(a, ends, static_cast<Part*>(workspace), plan, stream);
  });
}

}  // namespace dlcore::cuda
