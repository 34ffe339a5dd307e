// Keyed noise on the CPU, in double; results are rounded once.
#pragma once

#include <cstdint>

#include "../common/philox.h"

namespace dlcore {

enum class Noise : int { kUniform = 0, kNormal = 1, kGumbel = 2 };

// out (keys, count); keys is (keys, 2).
template <class T>
void fill_noise(Noise noise, const int64_t* keys, int64_t key_count, int64_t count, T* out, int threads);

// out (count, 2) from keys (count or 1, 2) and data (count or 1).
void fold_in_all(const int64_t* keys, int64_t key_stride, const int64_t* data, int64_t data_stride,
                 int64_t count, int64_t* out);

}  // namespace dlcore
