// The series is the one that dlcore/reference/sphere_velocity.py derives, from a small linear system at each
// κ.
#include "radial.h"

#include <cmath>

namespace dlcore::capi {
namespace {

constexpr double kPi = 3.14159265358979323846;
// What a float sum of Chebyshev terms does not see.
constexpr double kNegligible = 1e-9;

struct Series {
  double m, rest;  // 1 - m
  std::vector<double> coefficients;
};

// Enough terms for nine digits at every κ.
size_t degree_of(int64_t dim) {
  const int64_t by_size = dim < 12 ? 32 : dim < 64 ? 24 : 12;
  return static_cast<size_t>(std::max(by_size, std::min<int64_t>(96, 240 / dim)));
}

// Rows of unknowns' factors, and the right side last.
using System = std::vector<std::vector<double>>;

// Gauss's elimination with row pivots; the solution.
std::vector<double> solve(System s) {
  const size_t n = s.size();
  for (size_t k = 0; k < n; ++k) {
    const auto pivot =
        std::max_element(s.begin() + static_cast<std::ptrdiff_t>(k), s.end(),
                         [k](const auto& a, const auto& b) { return std::abs(a[k]) < std::abs(b[k]); });
    std::swap(s[k], *pivot);
    for (size_t i = k + 1; i < n; ++i) {
      const double factor = s[i][k] / s[k][k];
      for (size_t j = k; j <= n; ++j) s[i][j] -= factor * s[k][j];
    }
  }
  std::vector<double> x(n);
  for (size_t k = n; k-- > 0;) {
    double rest = s[k][n];
    for (size_t j = k + 1; j < n; ++j) rest -= s[k][j] * x[j];
    x[k] = rest / s[k][k];
  }
  return x;
}

// Collocation of (1-z²)(1-mz)((1-mz)ρ' - mρ) + q(2m - (1+m²)z)ρ = q(A(1-mz) + m - z), q = dim - 1, over
// Chebyshev's polynomials; A is the last unknown.
Series solve_series(double kappa, int64_t dim) {
  const double q = static_cast<double>(dim - 1), root = std::hypot(q, 2 * kappa);
  const double m = 2 * kappa / (q + root), rest = q * (1 + q / (root + 2 * kappa)) / (q + root);
  const size_t degree = degree_of(dim);
  System system;
  for (size_t i = 0; i < degree + 2; ++i) {
    const double angle = static_cast<double>(i) * (kPi / static_cast<double>(degree + 1));
    const double z = std::cos(angle), sine = std::sin(angle), half = std::sin(angle / 2);
    const double w = rest + m * 2 * half * half;  // 1 - mz
    const double level = q * (2 * m - (1 + m * m) * z) - m * sine * sine * w;
    std::vector<double> row;
    for (size_t k = 0; k <= degree; ++k) {
      const auto n = static_cast<double>(k);
      // (1 - z²) T_n' = n sin(angle) sin(n angle).
      row.push_back(w * w * n * sine * std::sin(n * angle) + level * std::cos(n * angle));
    }
    row.push_back(-q * w);
    double largest = 0;
    for (const double x : row) largest = std::max(largest, std::abs(x));
    row.push_back(q * (m - z));
    for (double& x : row) x /= largest;
    system.push_back(std::move(row));
  }
  std::vector<double> solution = solve(std::move(system));
  solution.pop_back();
  return {m, rest, std::move(solution)};
}

// Chebyshev coefficients of the derivative: T_k' = 2k Σ T_j, j < k of the other parity; half of T_0.
std::vector<double> derivative(const std::vector<double>& of, size_t terms) {
  std::vector<double> slopes(terms);
  for (size_t j = 0; j < terms; ++j)
    for (size_t k = j + 1; k < terms; k += 2)
      slopes[j] += (j == 0 ? 1.0 : 2.0) * static_cast<double>(k) * of[k];
  return slopes;
}

}  // namespace

RadialWeight::RadialWeight(PerRow<double> kappa, int64_t rows, int64_t dim) {
  if (!kappa) return;
  std::vector<Series> all;
  for (int64_t r = 0; r < values(kappa, rows); ++r) all.push_back(solve_series(kappa[r], dim));
  size_t terms = 1;
  for (const Series& s : all)
    for (size_t n = terms; n < s.coefficients.size(); ++n)
      if (std::abs(s.coefficients[n]) > kNegligible) terms = n + 1;
  for (const Series& s : all) {
    for (const double x : {s.m, s.rest, s.rest * (1 + s.m) / static_cast<double>(dim - 1)})
      rows_.push_back(static_cast<float>(x));
    for (size_t n = 0; n < terms; ++n) rows_.push_back(static_cast<float>(s.coefficients[n]));
    for (const double x : derivative(s.coefficients, terms)) rows_.push_back(static_cast<float>(x));
  }
  terms_ = static_cast<int64_t>(terms);
  stride_ = kappa.stride == 0 ? 0 : 3 + 2 * terms_;
}

}  // namespace dlcore::capi
