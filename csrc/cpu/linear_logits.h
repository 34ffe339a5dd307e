// Linear heads on the CPU: the matrix products between tiles of logits, hidden states, weights and tables.
#pragma once

#include <cstdint>

#include "../common/view.h"

namespace dlcore {

// out (rows, columns) = softcap([out +] a (rows, depth) · b (depth, columns) [+ bias]), in float32.
struct MatmulArguments {
  // a(i, k) lies at i·a_stride + k, or at k·a_stride + i if `a_by_column`.
  const float* a = nullptr;
  int64_t a_stride = 0;
  bool a_by_column = false;
  // b(k, j) lies at k·b_stride + j, or at j·b_stride + k if `b_by_column`.
  const char* b = nullptr;
  DType b_dtype = DType::kFloat32;
  int64_t b_stride = 0;
  bool b_by_column = false;
  const float* bias = nullptr;  // (columns), or null
  float* out = nullptr;
  int64_t out_stride = 0;
  float softcap = 0;  // 0: none
  int64_t rows = 0, columns = 0, depth = 0;
  bool add = false;
  int threads = 1;
};

}  // namespace dlcore
