// Draws of the von Mises-Fisher and the spherical Cauchy law: a team of threads a row, whose lanes try
// candidates for the cosine side by side.
//
// A point is W·μ + √(1 - W²)·v with v uniform across the mean direction μ, a projected normal vector; for the
// cosine W see csrc/common/sphere_draw.h.
#include "../common/noise.h"
#include "../common/sphere_draw.h"
#include "sphere.h"
#include "team.h"

namespace dlcore::cuda {
namespace {

// Of each vector a thread keeps so many numbers.
constexpr int kKept = 16;

struct DrawRows {
  SphereSampleArguments a;
  bool mean_aligned, out_aligned;
  Teams teams;
};

// A tile of the mean w and of a normal vector g, zeros past the row's end.
template <class T>
struct Drawn {
  static constexpr int kEntries = kPacketBytes / sizeof(T), kPackets = kKept / kEntries;
  Packed<T, kEntries> w[kPackets];
  float g[kKept];

  // Byte of the row where packet p begins.
  __device__ static int64_t place(const Teams& teams, const Team& team, int i, int p) {
    return i * int64_t{teams.tile_bytes} + (p * team.size() + team.rank()) * kPacketBytes;
  }

  __device__ void make(const DrawRows& rows, const Vector& mean, Key key, const Team& team, int i) {
    const int64_t columns = rows.a.mean.columns, bytes = columns * static_cast<int64_t>(sizeof(T));
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int64_t at = place(rows.teams, team, i, p), first = at / static_cast<int64_t>(sizeof(T));
      w[p].word = load_packet(mean.data + at, left(bytes, at), mean.aligned, rows.a.mean.dtype);
#pragma unroll
      for (int e = 0; e < kEntries; e += 2) {
        const NormalPair pair = direction(key, (first + e) / 2);
        g[p * kEntries + e] = first + e < columns ? pair.even : 0;
        g[p * kEntries + e + 1] = first + e + 1 < columns ? pair.odd : 0;
      }
    }
  }

  // f(w, g) for each entry.
  template <class F>
  __device__ void each(F f) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) f(widen(w[i / kEntries].elements[i % kEntries]), g[i]);
  }

  __device__ void store(const DrawRows& rows, const Vector& out, const Team& team, int i, float factor,
                        float along, float across) const {
    const int64_t bytes = rows.a.mean.columns * static_cast<int64_t>(sizeof(T));
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      Packed<T, kEntries> x;
#pragma unroll
      for (int e = 0; e < kEntries; ++e)
        x.elements[e] =
            narrow_to<T>(fmaf(widen(w[p].elements[e]) * factor, along, g[p * kEntries + e] * across));
      const int64_t at = place(rows.teams, team, i, p);
      store_packet(out.data + at, x.word, left(bytes, at), out.aligned, rows.a.mean.dtype);
    }
  }

 private:
  __device__ static int left(int64_t bytes, int64_t at) {
    return bytes - at < kPacketBytes ? static_cast<int>(bytes - at < 0 ? 0 : bytes - at) : kPacketBytes;
  }
};

// The first candidate that is taken, the last one if none is.
__device__ sphere::Candidate draw_cosine(const sphere::CosineLaw& law, Key key, const Team& team) {
  for (int first = 0;; first += team.lanes()) {
    const sphere::Candidate mine = law.candidate(key, first + team.lane());
    const int taken =
        team.fold_lanes(mine.taken ? team.lane() : kWarp, [](int a, int b) { return a < b ? a : b; });
    if (taken == kWarp && first + team.lanes() < sphere::kCandidates) continue;
    const int lane = taken < kWarp ? taken : team.lanes() - 1;
    return {team.from_lane(mine.cosine, lane), team.from_lane(mine.sine, lane), true};
  }
}

template <class T>
__device__ void draw_row(const DrawRows& rows, Team& team, int64_t r) {
  const SphereSampleArguments& a = rows.a;
  const Key key = a.keys[r];
  const Vector mean[1] = {Vector(a.mean, r, rows.mean_aligned)};
  const int tiles = rows.teams.tiles;
  Drawn<T> drawn;
  float factor = 1, sums[3];  // |μ|², <g, μ>, |g|²
  for (bool again = false;; again = true) {
    sums[0] = sums[1] = sums[2] = 0;
    for (int i = 0; i < tiles; ++i) {
      if (!again || tiles > 1) drawn.make(rows, mean[0], key, team, i);
      drawn.each([&](float w, float g) {
        w *= factor;
        sums[0] = fmaf(w, w, sums[0]);
        sums[1] = fmaf(w, g, sums[1]);
        sums[2] = fmaf(g, g, sums[2]);
      });
    }
    team.sum(sums);
    if (again) break;
    factor = sphere::Sized(sums[0], TeamRow<1>{team, mean, a.mean.columns, a.mean.dtype}, 0).factor;
    if (factor == 1) break;
  }
  const double mean_square = sums[0];
  double share = mean_square > 0 ? sums[1] / mean_square : 0, square = sums[2] - share * sums[1];
  // What is left across the mean: formed anew, and once more, where little of g is; of many numbers much is.
  for (int again = 0; again < 2 && tiles == 1 && square < 0.5 * sums[2]; ++again) {
    float left[2] = {};
    drawn.each([&](float w, float& g) {
      w *= factor;
      g = fmaf(w, -static_cast<float>(share), g);
      left[0] = fmaf(w, g, left[0]);
      left[1] = fmaf(g, g, left[1]);
    });
    team.sum(left);
    sums[2] = left[1];
    share = mean_square > 0 ? left[0] / mean_square : 0;
    square = left[1] - share * left[0];
  }
  // A mean that is zero gives the uniform law.
  sphere::Candidate c;
  if (mean_square > 0) c = draw_cosine(sphere::CosineLaw(a.kappa[r], a.mean.columns, a.reject), key, team);
  const double across = c.sine / sqrt(square);
  const double along = (mean_square > 0 ? c.cosine / sqrt(mean_square) : 0) - across * share;
  const Vector out(a.out, r, rows.out_aligned);
  for (int i = tiles - 1; i >= 0; --i) {
    if (i != tiles - 1) drawn.make(rows, mean[0], key, team, i);
    drawn.store(rows, out, team, i, factor, static_cast<float>(along), static_cast<float>(across));
  }
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) sample_kernel(const __grid_constant__ DrawRows rows) {
  Team team(rows.teams.size);
  for (int64_t r = team.first_row(); r < rows.a.mean.rows; r += team.teams()) draw_row<T>(rows, team, r);
}

}  // namespace

void sphere_sample(const SphereSampleArguments& a, cudaStream_t stream) {
  with_dtype(a.mean.dtype, [&](auto type) {
    using T = decltype(type);
    const Teams teams(a.mean.rows, a.mean.columns * static_cast<int64_t>(sizeof(T)), Drawn<T>::kPackets);
    const DrawRows rows{a, aligned(a.mean), aligned(a.out), teams};
    launch("sphere.sample", sample_kernel<T>, teams.blocks, teams.threads, stream, rows);
  });
}

}  // namespace dlcore::cuda
