// The numbers of bits' levels, which only the C library asks for, in arrays of their very size.
#include <cmath>
#include <cstdio>
#include <memory>

#include "../../csrc/cuda/bits.h"

using namespace dlcore;

namespace {

bool near(double found, double wanted) { return std::abs(found - wanted) <= 1e-6 * std::abs(wanted); }

template <class T>
std::unique_ptr<T[]> room(int64_t size) {
  return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(size)]);
}

bool right(int64_t rows) {
  const auto levels = room<double>(rows);
  const auto grads = room<float>(rows), out = room<float>(3 * rows);
  for (int64_t r = 0; r < rows; ++r)
    levels[r] = 0.5 + static_cast<double>(r), grads[r] = static_cast<float>(r);
  const PerRow<double> sigma{levels.get(), 1};
  bool good = true;

  cuda::bit_numbers(BitStepNumbers{sigma, sigma, sigma, {}, 2}, rows, out.get(), nullptr);
  for (int64_t r = 0; r < rows; ++r) {
    const double s = levels[r];
    good = good && near(out[r], 2 / (s * s)) && out[rows + r] == 1 &&
           near(out[2 * rows + r], 1.003 * s * std::sqrt(s * (2 + s)));
  }
  const auto one = room<float>(rows);
  cuda::bit_numbers(BitSlopes{sigma, 1}, rows, one.get(), nullptr);
  for (int64_t r = 0; r < rows; ++r) good = good && near(one[r], 1 / (levels[r] * levels[r]));
  cuda::bit_numbers(BitSpreads{sigma}, rows, one.get(), nullptr);
  for (int64_t r = 0; r < rows; ++r) good = good && near(one[r], levels[r]);
  cuda::bit_numbers(BitMeanGrads{grads.get(), 4}, rows, one.get(), nullptr);
  for (int64_t r = 0; r < rows; ++r) good = good && one[r] == grads[r] / 4;
  return good;
}

}  // namespace

int main() {
  for (const int64_t rows : {1, 127, 128, 129, 300})
    if (!right(rows)) return std::printf("wrong at %d rows\n", static_cast<int>(rows)), 1;
}
