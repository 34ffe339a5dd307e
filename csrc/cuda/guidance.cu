// A draw from two blended streams in one read of both.
//
// First the groups of 256 tokens of each stream are summed up, by a warp four at a time, which gives its
// normaliser. The same sums bound what a group can score in the draw: a second kernel, a warp a part of a
// row, blends only groups that may win. A third merges the parts where a row has several.
#include "../common/guidance.h"
#include "guidance.h"
#include "launch.h"
#include "softmax.h"

namespace dlcore::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kResident =
    2;  // blocks a multiprocessor at least: left alone, the assembler aims for more, and spills
constexpr int kAbreastGroups = 4;
constexpr int kGroupLanes = kWarp / kAbreastGroups;
constexpr int kLaneEntries = static_cast<int>(kGroup) / kGroupLanes;
// So many chunks of the scan, and so many parts that draw, keep a large device busy.
constexpr int64_t kEnoughChunks = 8192, kEnoughParts = 4096;
constexpr int kMostSteps = 8;
// Groups of a part that a lane has in hand, at most, and its tokens of a group.
constexpr int kLaneGroups = 8, kLaneTokens = static_cast<int>(kGroup) / kWarp;
// Rounding of scores and bounds can't reach this, and this part of them.
constexpr float kSlack = 1e-3f, kSlackPart = 1e-5f;

// Of a group: its largest logit, and Σ exp((x - top) / temperature).
struct alignas(8) GroupSum {
  float top, sum;
};

struct Plan {
  int64_t groups, steps, chunks, size, parts;
  Plan(int64_t rows, int64_t columns) : groups(ceil_div(columns, kGroup)) {
    const int64_t most = std::max<int64_t>(rows, 1) * groups;
    steps = std::clamp<int64_t>(2 * most / (kAbreastGroups * kEnoughChunks), 1, kMostSteps);
    chunks = ceil_div(groups, kAbreastGroups * steps);
    size = std::clamp<int64_t>(ceil_div(most, kEnoughParts), kWarp, kLaneGroups * kWarp);
    parts = ceil_div(groups, size);
  }
};

// What the workspace holds.
struct Places {
  GroupSum* sums;  // (2, rows, groups)
  double* scores;  // (parts, rows), as the next
  int64_t* tokens;
  char* end;
  Places(const Plan& plan, int64_t rows, void* workspace) {
    sums = static_cast<GroupSum*>(workspace);
    scores = reinterpret_cast<double*>(sums + 2 * rows * plan.groups);
    tokens = reinterpret_cast<int64_t*>(scores + plan.parts * rows);
    end = reinterpret_cast<char*>(tokens + plan.parts * rows);
  }
};

__device__ GuidedRow row_of(const GuidedStepArguments& a, int64_t r) {
  return {&a.coefficients[r], a.cond.columns - (a.exclude >= 0)};
}

__device__ RowSoftmax softmax_of(const GuidedStepArguments& a, const GuidedRow& row, int64_t r) {
  RowSoftmax softmax({}, r);
  softmax.index = a.z[r];
  softmax.exclude = a.exclude;
  softmax.shift = row.shift;
  softmax.inverse_temperature = row.inverse_temperature;
  return softmax;
}

// Reads entries [at, at + 256) of a row: of this lane's runs of N, the k-th begins at (k·8 + its place)·N.
template <int N, class T>
__device__ void read_group(const T* p, int64_t at, int64_t columns, const RowSoftmax& softmax,
                           float (&x)[kLaneEntries]) {
  const int place = lane_id() % kGroupLanes * N;
  if (at + kGroup <= columns && !softmax.special(at, kGroup)) {
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
    x[i] = column < columns ? softmax.transform(widen(p[column]), column) : kNone;
  }
}

// In each of the group's lanes.
__device__ GroupSum sum_group(const float (&x)[kLaneEntries], float scale) {
  GroupSum s{kNone, 0};
#pragma unroll
  for (float v : x) s.top = fmaxf(s.top, v);
  s.top = largest_lanes<kGroupLanes>(s.top);
  const float reference = s.top > kNone ? s.top : 0;
#pragma unroll
  for (float v : x) s.sum += exp2_fast((v - reference) * scale);
  s.sum = sum_lanes<kGroupLanes>(s.sum);
  return s;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    scan_kernel(const __grid_constant__ GuidedStepArguments a, const __grid_constant__ View logits,
                GroupSum* sums, int64_t groups, int64_t steps, int64_t chunks) {
  for (int64_t i = global_warp(); i < logits.rows * chunks; i += all_warps()) {
    const int64_t r = i / chunks;
    const GuidedRow row = row_of(a, r);
    if (row.keeps) continue;
    const RowSoftmax softmax = softmax_of(a, row, r);
    const T* p = logits.row<const T>(r);
    int64_t group = i % chunks * kAbreastGroups * steps + lane_id() / kGroupLanes;
    for (int64_t step = 0; step < steps; ++step, group += kAbreastGroups) {
      float x[kLaneEntries];
      read_group<N>(p, group * kGroup, logits.columns, softmax, x);
      const GroupSum s = sum_group(x, row.inverse_temperature * kLog2E);
      if (lane_id() % kGroupLanes == 0 && group < groups) sums[r * groups + group] = s;
    }
  }
}

// Over the noise: the logarithms of the mass of a group's largest entry, and of all.
struct GroupMasses {
  float largest, total;
};

// A stream of a row, in every lane.
template <class T>
class Stream {
 public:
  __device__ Stream(const View& logits, const GroupSum* sums, int64_t groups, const GuidedRow& row, int64_t r)
      : data_(logits.row<const T>(r)),
        sums_(sums + r * groups),
        inverse_temperature_(row.inverse_temperature) {
    for (int64_t g = lane_id(); g < groups; g += kWarp) top_ = fmaxf(top_, sums_[g].top);
    top_ = largest_lanes(top_);
    double total = 0;
    for (int64_t g = lane_id(); g < groups; g += kWarp) total += below_top(sums_[g].top) * sums_[g].sum;
    total = sum_lanes(total);
    // NaN, where an entry is NaN or +inf.
    broken = !(top_ > kNone) || total != total;
    odds_ = row.odds(total);
  }

  bool broken;

  // Over the noise, or over the largest one where there is none: the logarithm of an entry's mass.
  __device__ float log_mass(bool noisy, float x) const {
    return noisy ? log_near(fmaf(below_top(x), odds_, 1.0f))
                 : fmaxf((x - top_) * inverse_temperature_, kNever);
  }

  __device__ GroupMasses masses(int64_t group) const {
    const GroupSum s = sums_[group];
    const float largest = below_top(s.top);
    // The first as an entry's is reckoned, to the bit.
    return {log_near(fmaf(largest, odds_, 1.0f)),
            log_near(fmaf(largest * odds_, s.sum, static_cast<float>(kGroup)))};
  }

  // A lane's entries from token `first` on, -inf past the end.
  __device__ void read(int64_t first, int64_t columns, float (&x)[kLaneTokens]) const {
    const T* p = data_ + first;
#pragma unroll
    for (int k = 0; k < kLaneTokens; ++k) x[k] = first + k * kWarp < columns ? widen(p[k * kWarp]) : kNone;
  }

 private:
  __device__ float below_top(float x) const {
    return exp2_fast(fmaxf((x - top_) * (inverse_temperature_ * kLog2E), -126.0f));
  }

  const T* data_;
  const GroupSum* sums_;
  float inverse_temperature_, top_ = kNone, odds_;
};

template <class C, class U>
class Draw {
 public:
  __device__ Draw(const GuidedStepArguments& a, const GroupSum* sums, int64_t groups, const GuidedRow& row,
                  int64_t r)
      : row_(row),
        softmax_(softmax_of(a, row, r)),
        cond_(a.cond, sums, groups, row, r),
        uncond_(a.uncond, sums + a.cond.rows * groups, groups, row, r),
        columns_(a.cond.columns),
        key_(a.keys[r]) {}

  __device__ bool broken() const { return cond_.broken || uncond_.broken; }

  // Looks at a part's groups, [first, end), the likeliest first, as long as one may still win.
  __device__ void search(int64_t first, int64_t end) {
    float bound[kLaneGroups], noise[kLaneGroups];
#pragma unroll
    for (int k = 0; k < kLaneGroups; ++k) {
      const int64_t group = first + k * kWarp + lane_id();
      bound[k] = kNone;
      if (group >= end) continue;
      noise[k] = gumbel(key_, Domain::kGroup, group);
      bound[k] = bound_of(group, noise[k]);
    }
    for (;;) {
      float most = kNone, drawn = 0;
      int at = 0;
#pragma unroll
      for (int k = 0; k < kLaneGroups; ++k) {
        if (!(bound[k] > most)) continue;
        most = bound[k];
        drawn = noise[k];
        at = k * kWarp + lane_id();
      }
      const Leader leader = find_leader(most, at);
      if (!(leader.value > kNone) || leader.value < score) return;
      consider(first + leader.at, __shfl_sync(kAllLanes, drawn, leader.at % kWarp));
#pragma unroll
      for (int k = 0; k < kLaneGroups; ++k)
        if (leader.at == k * kWarp + lane_id()) bound[k] = kNone;
    }
  }

  // The token that the winning group draws, -1 if none can be drawn.
  __device__ int64_t token() const {
    if (winner_ < 0) return -1;
    float guided[kLaneTokens];
    blend(winner_, guided);
    float best = kNone;
    int at = 0x7FFFFFFF;
#pragma unroll
    for (int k = 0; k < kLaneTokens; ++k) {
      const int entry = k * kWarp + lane_id();
      const float s = guided[k] + gumbel(key_, Domain::kToken, winner_ * kGroup + entry);
      at = s > best ? entry : at;
      best = fmaxf(best, s);
    }
    return winner_ * kGroup + find_leader(best, at).at;
  }

  double score = -kInfinity;

 private:
  // At least the score of a group; without noise there is no such bound.
  __device__ float bound_of(int64_t group, float noise) const {
    if (!row_.noisy()) return -kNone;
    const GroupMasses c = cond_.masses(group), u = uncond_.masses(group);
    float bound = row_.bound(row_.nearer_is_cond() ? c.largest : u.largest, c.total, u.total);
    if (group == softmax_.index / kGroup) bound += fmaxf(row_.bonus, 0);
    return fmaf(bound, 1.0f + kSlackPart, noise + kSlack);
  }

  // The guided logarithms of a group, -inf past the end.
  __device__ void blend(int64_t group, float (&guided)[kLaneTokens]) const {
    const int64_t first = group * kGroup + lane_id();
    float c[kLaneTokens], u[kLaneTokens];
    cond_.read(first, columns_, c);
    uncond_.read(first, columns_, u);
#pragma unroll
    for (int k = 0; k < kLaneTokens; ++k) {
      const int64_t token = first + k * kWarp;
      const float log_c = cond_.log_mass(row_.noisy(), softmax_.transform(c[k], token));
      const float log_u = uncond_.log_mass(row_.noisy(), softmax_.transform(u[k], token));
      guided[k] = row_.blend(log_c, log_u) + (token == softmax_.index ? row_.bonus : 0);
      if (token >= columns_ || token == softmax_.exclude) guided[k] = kNone;
    }
  }

  __device__ void consider(int64_t group, float noise) {
    float guided[kLaneTokens], top = kNone, sum = 0;
    blend(group, guided);
#pragma unroll
    for (float v : guided) top = fmaxf(top, v);
    top = largest_lanes(top);
    if (!(top > kNone)) return;
#pragma unroll
    for (float v : guided) sum += exp2_fast((v - top) * kLog2E);
    const double found = static_cast<double>(top) + log_near(sum_lanes(sum)) + noise;
    if (found < score || (found == score && group > winner_)) return;
    score = found;
    winner_ = group;
  }

  GuidedRow row_;
  RowSoftmax softmax_;
  Stream<C> cond_;
  Stream<U> uncond_;
  int64_t columns_, winner_ = -1;
  Key key_;
};

// scores, tokens (parts, rows); all parts of a row that is not drawn say the same.
template <class C, class U>
__global__ void __launch_bounds__(kThreads, kResident)
    draw_kernel(const __grid_constant__ GuidedStepArguments a, const GroupSum* sums, int64_t groups,
                int64_t size, int64_t parts, double* scores, int64_t* tokens) {
  const int64_t rows = a.cond.rows;
  for (int64_t i = global_warp(); i < rows * parts; i += all_warps()) {
    const int64_t r = i / parts, part = i % parts;
    const GuidedRow row = row_of(a, r);
    double score = 0;
    int64_t token = a.z[r];
    if (!row.keeps) {
      Draw<C, U> draw(a, sums, groups, row, r);
      const int64_t first = part * size;
      if (!draw.broken()) draw.search(first, first + size < groups ? first + size : groups);
      token = draw.token();
      score = draw.score;
    }
    if (lane_id() != 0) continue;
    tokens[part * rows + r] = token;
    if (scores) scores[part * rows + r] = score;
  }
}

__global__ void merge_kernel(const double* scores, const int64_t* drawn, int64_t rows, int64_t parts,
                             int64_t* tokens) {
  for (int64_t r = global_thread(); r < rows; r += all_threads()) {
    int64_t best = r;
    for (int64_t at = r + rows; at < rows * parts; at += rows)
      if (scores[at] > scores[best]) best = at;
    tokens[r] = drawn[best];
  }
}

void launch_scan(const GuidedStepArguments& a, const View& logits, GroupSum* sums, const Plan& plan,
                 cudaStream_t stream) {
  with_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kMost = 16 / sizeof(T);
    const auto run = [&](auto kernel) {
      launch("guidance.cfg_uniform_step's scan", kernel, ceil_div(logits.rows * plan.chunks, kWarps),
             kThreads, stream, a, logits, sums, plan.groups, plan.steps, plan.chunks);
    };
    const int abreast = abreast_of(logits);
    if (abreast == kMost) return run(scan_kernel<T, kMost>);
    if (abreast >= kMost / 2) return run(scan_kernel<T, kMost / 2>);
    run(scan_kernel<T, 1>);
  });
}

}  // namespace

int64_t guided_step_bytes(int64_t rows, int64_t columns) {
  return Places({rows, columns}, rows, nullptr).end - static_cast<char*>(nullptr);
}

void guided_step(const GuidedStepArguments& a, void* workspace, cudaStream_t stream) {
  const int64_t rows = a.cond.rows;
  const Plan plan(rows, a.cond.columns);
  const Places places(plan, rows, workspace);
  launch_scan(a, a.cond, places.sums, plan, stream);
  launch_scan(a, a.uncond, places.sums + rows * plan.groups, plan, stream);
  double* scores = plan.parts > 1 ? places.scores : nullptr;
  int64_t* drawn = plan.parts > 1 ? places.tokens : a.tokens;
  with_dtype(a.cond.dtype, [&](auto c) {
    with_dtype(a.uncond.dtype, [&](auto u) {
      launch("guidance.cfg_uniform_step", draw_kernel<decltype(c), decltype(u)>,
             ceil_div(rows * plan.parts, kWarps), kThreads, stream, a, places.sums, plan.groups, plan.size,
             plan.parts, scores, drawn);
    });
  });
  if (plan.parts > 1)
    launch("guidance.cfg_uniform_step's parts", merge_kernel, ceil_div(rows, kThreads), kThreads, stream,
           scores, drawn, rows, plan.parts, a.tokens);
}

}  // namespace dlcore::cuda
