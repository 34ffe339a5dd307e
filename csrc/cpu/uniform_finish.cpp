// The NELBO's few numbers per row, in double.
#include <cmath>

#include "uniform.h"

namespace dlcore {

// With ℓ = log1p(c p), S = Σ ℓ, Λ = log1p(c), n = V / (1 - α):
// z = x: w·{(V·ℓ_z - S - (V-1)·Λ) / (1+c) - n·(1 / (1+c) - e^-ℓ_z)}
// z ≠ x: w·{(1+c)·Λ + c·(ℓ_z - ℓ_x) + V·ℓ_z - S - n·(1 - e^-ℓ_z)}
void finish_nelbo(const double* saved, int64_t rows, int64_t vocab, const int64_t* z, const int64_t* x,
                  PerRow<double> alpha, PerRow<double> dalpha, float* loss) {
  const auto v = static_cast<double>(vocab);
  for (int64_t r = 0; r < rows; ++r) {
    const NelboRow row(alpha[r], dalpha[r], vocab);
    const double c = row.c, n = v / (1 - row.alpha), lambda = std::log1p(c), s = saved[3 * rows + r];
    const double at_z = std::log1p(c * std::exp(saved[rows + r])),
                 at_x = std::log1p(c * std::exp(saved[2 * rows + r]));
    const double same = (v * at_z - s - (v - 1) * lambda) / (1 + c) - n * (1 / (1 + c) - std::exp(-at_z));
    const double other = (1 + c) * lambda + c * (at_z - at_x) + v * at_z - s + n * std::expm1(-at_z);
    loss[r] = static_cast<float>(row.w * (z[r] == x[r] ? same : other));
  }
}

}  // namespace dlcore
