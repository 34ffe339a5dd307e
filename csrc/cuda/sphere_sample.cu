// Draws of the von Mises-Fisher and the spherical Cauchy law: a team of threads a row, whose lanes try
// candidates for the cosine side by side.
//
// A point is W·μ + √(1 - W²)·v with v uniform across the mean direction μ, a projected normal vector; for the
// cosine W see csrc/common/sphere_draw.h.
#include "../common/sphere_draw.h"
#include "noisy_tile.h"
#include "sphere.h"

namespace dlcore::cuda {
namespace {

struct DrawRows {
  SphereSampleArguments a;
  bool mean_aligned, out_aligned;
  Teams teams;
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
  NoisyTile<T, 1, direction> tile(rows.teams, team, a.mean.columns, key, mean);
  float factor = 1, sums[3];  // |μ|², <g, μ>, |g|²
  for (bool again = false;; again = true) {
    sums[0] = sums[1] = sums[2] = 0;
    tile.each([&](const float* v, float g) {
      const float w = v[0] * factor;
      sums[0] = fmaf(w, w, sums[0]);
      sums[1] = fmaf(w, g, sums[1]);
      sums[2] = fmaf(g, g, sums[2]);
    });
    team.sum(sums);
    if (again) break;
    factor = sphere::Sized(sums[0], TeamRow<1>{team, mean, a.mean.columns, a.mean.dtype}, 0).factor;
    if (factor == 1) break;
  }
  const double mean_square = sums[0];
  double share = mean_square > 0 ? sums[1] / mean_square : 0, square = sums[2] - share * sums[1];
  // What is left across the mean: formed anew, and once more, where little of g is; of many numbers much is.
  for (int again = 0; again < 2 && tile.tiles() == 1 && square < 0.5 * sums[2]; ++again) {
    float left[2] = {};
    tile.each([&](const float* v, float& g) {
      const float w = v[0] * factor;
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
  const auto by_mean = static_cast<float>(along), by_normal = static_cast<float>(across);
  const Vector out[1] = {Vector(a.out, r, rows.out_aligned)};
  tile.store(out, [&](const float* v, float g, float* result) {
    result[0] = fmaf(v[0] * factor, by_mean, g * by_normal);
  });
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
    const Teams teams(a.mean.rows, a.mean.columns * static_cast<int64_t>(sizeof(T)), kKeptPackets<T>);
    const DrawRows rows{a, aligned(a.mean), aligned(a.out), teams};
    launch("sphere.sample", sample_kernel<T>, teams.blocks, teams.threads, stream, rows);
  });
}

}  // namespace dlcore::cuda
