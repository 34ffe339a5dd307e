// Keyed noise on the CPU, in double; results are rounded once.
#pragma once

#include <cstdint>

#include "../common/noise_wide.h"

namespace dlcore {

// Uniform or Gumbel noise, out (keys, count); keys is (keys, 2).
template <class T>
void fill_noise(Noise noise, const int64_t* keys, int64_t key_count, int64_t count, T* out, int threads);

// Standard normal numbers, out (key_count, count) of double if `wide`, else float.
struct NormalArguments {
  const int64_t* keys = nullptr;
  int64_t key_count = 0, count = 0;
  bool wide = false;
  void* out = nullptr;
  int threads = 1;
};

// out (count, 2) from keys (count or 1, 2) and data (count or 1).
void fold_in_all(const int64_t* keys, int64_t key_stride, const int64_t* data, int64_t data_stride,
                 int64_t count, int64_t* out);

}  // namespace dlcore
