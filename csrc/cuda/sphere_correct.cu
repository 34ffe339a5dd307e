// The Langevin corrector: noise, drift and projection, a team of threads a row.
#include "../common/sphere_correct.h"
#include "../common/sphere_rows.h"
#include "noisy_tile.h"
#include "sphere.h"

namespace dlcore::cuda {
namespace {

static_assert(kMostCorrected == kMostKept);

struct CorrectRows {
  SphereCorrectBackwardArguments a;
  bool aligned[6];  // x, score, grad, then the results
  Teams teams;
};

// Where a row moves before it has length 1 again, and what makes it so.
struct Moved {
  float by_x, by_score, by_noise, factor = 1, scale = 0;

  __device__ float point(const float* v, float noise) const {
    return fmaf(v[0], by_x, fmaf(v[1], by_score, noise * by_noise));
  }
  __device__ float unit(const float* v, float noise) const { return point(v, noise) * factor * scale; }

  template <class T>
  __device__ Moved(T& tile, Team& team, const sphere::Correction& c, float product)
      : by_x(static_cast<float>(c.decay - c.spread * product)),
        by_score(static_cast<float>(c.by_score)),
        by_noise(static_cast<float>(c.spread)) {
    float sums[1] = {}, largest = 0;
    tile.each([&](const float* v, float noise) {
      const float y = point(v, noise);
      sums[0] = fmaf(y, y, sums[0]);
      largest = fmaxf(largest, fabsf(y));
    });
    team.sum(sums);
    double square = sums[0];
    if (!sphere::holds(square)) {
      factor = sphere::power_below_inverse(team.fold(largest, [](float a, float b) { return fmaxf(a, b); }));
      square = 0;
      tile.each([&](const float* v, float noise) {
        const double y = static_cast<double>(point(v, noise)) * factor;
        square += y * y;
      });
      square = team.fold(square, [](double a, double b) { return a + b; });
    }
    scale = static_cast<float>(sphere::over(1, sqrt(square)));
  }
};

template <class T>
__device__ float noise_along(T& tile, Team& team) {
  float sums[1] = {};
  tile.each([&](const float* v, float noise) { sums[0] = fmaf(v[0], noise, sums[0]); });
  team.sum(sums);
  return sums[0];
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) correct_kernel(const __grid_constant__ CorrectRows rows) {
  const SphereCorrectArguments& a = rows.a.forward;
  Team team(rows.teams.size);
  for (int64_t r = team.first_row(); r < a.x.rows; r += team.teams()) {
    const Vector vector[2] = {Vector(a.x, r, rows.aligned[0]), Vector(a.score, r, rows.aligned[1])};
    NoisyTile<T, 2, element_normals> tile(rows.teams, team, a.x.columns, a.keys[r], vector);
    const sphere::Correction c(static_cast<double>(a.x.columns - 1), a.step_size[r]);
    const Moved moved(tile, team, c, noise_along(tile, team));
    const Vector out[1] = {Vector(a.out, r, rows.aligned[3])};
    tile.store(out, [&](const float* v, float noise, float* result) { result[0] = moved.unit(v, noise); });
  }
}

// Left to itself the compiler takes 128 registers, and memory for the rest.
template <class T>
__global__ void __maxnreg__(168) correct_backward_kernel(const __grid_constant__ CorrectRows rows) {
  const SphereCorrectArguments& a = rows.a.forward;
  Team team(rows.teams.size);
  for (int64_t r = team.first_row(); r < a.x.rows; r += team.teams()) {
    const Vector vector[3] = {Vector(a.x, r, rows.aligned[0]), Vector(a.score, r, rows.aligned[1]),
                              Vector(rows.a.grad, r, rows.aligned[2])};
    NoisyTile<T, 3, element_normals, true> tile(rows.teams, team, a.x.columns, a.keys[r], vector);
    const auto q = static_cast<double>(a.x.columns - 1);
    const sphere::Correction c(q, a.step_size[r]);
    const float product = noise_along(tile, team);
    const Moved moved(tile, team, c, product);
    float radial[1] = {};
    tile.each([&](const float* v, float noise) { radial[0] = fmaf(moved.unit(v, noise), v[2], radial[0]); });
    team.sum(radial);
    // The gradient of the moved point, and its products with x, the score and the noise.
    const auto pulled = [&](const float* v, float noise) {
      return fmaf(moved.unit(v, noise), -radial[0], v[2]) * moved.scale * moved.factor;
    };
    float sums[3] = {};
    tile.each([&](const float* v, float noise) {
      const float g = pulled(v, noise);
      sums[0] = fmaf(v[0], g, sums[0]);
      sums[1] = fmaf(v[1], g, sums[1]);
      sums[2] = fmaf(noise, g, sums[2]);
    });
    team.sum(sums);
    const Vector out[2] = {Vector(rows.a.x_grad, r, rows.aligned[4]),
                           Vector(rows.a.score_grad, r, rows.aligned[5])};
    const auto by_along = static_cast<float>(-c.spread * sums[0]);
    tile.store(out, [&](const float* v, float noise, float* results) {
      const float g = pulled(v, noise);
      results[0] = fmaf(g, moved.by_x, noise * by_along);
      results[1] = g * moved.by_score;
    });
    if (team.rank() != 0) continue;
    // The spread's slope is infinite where the step is 0.
    const double slope = c.spread == 0 ? static_cast<double>(-kNone) : c.decay * c.decay / (c.spread * q);
    const double across = sums[2] - static_cast<double>(product) * sums[0];
    rows.a.step_grad[r] = q * (c.decay * (sums[1] / q - sums[0]) + slope * across);
  }
}

template <class T>
CorrectRows shared_out(const SphereCorrectBackwardArguments& a) {
  const View& x = a.forward.x;
  return {a,
          {aligned(x), aligned(a.forward.score), aligned(a.grad), aligned(a.forward.out), aligned(a.x_grad),
           aligned(a.score_grad)},
          Teams(x.rows, x.columns * static_cast<int64_t>(sizeof(T)), kKeptPackets<T>)};
}

}  // namespace

void sphere_correct(const SphereCorrectArguments& a, cudaStream_t stream) {
  with_dtype(a.x.dtype, [&](auto type) {
    using T = decltype(type);
    const CorrectRows rows = shared_out<T>({a, {}, {}, {}, nullptr});
    launch("sphere.correct", correct_kernel<T>, rows.teams.blocks, rows.teams.threads, stream, rows);
  });
}

void sphere_correct_backward(const SphereCorrectBackwardArguments& a, cudaStream_t stream) {
  with_dtype(a.forward.x.dtype, [&](auto type) {
    using T = decltype(type);
    const CorrectRows rows = shared_out<T>(a);
    launch("sphere.correct's gradient", correct_backward_kernel<T>, rows.teams.blocks, rows.teams.threads,
           stream, rows);
  });
}

}  // namespace dlcore::cuda
