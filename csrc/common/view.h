// What a kernel is told about tensors: pointers, sizes and strides, in elements.
#pragma once

#include <cstdint>

#include "philox.h"

namespace dlcore {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int kMaxDims = 8;

// A (..., columns) tensor whose last dimension is contiguous; its leading ones may have any strides.
struct View {
  char* data = nullptr;
  DType dtype = DType::kFloat32;
  int lead_dims = 0;
  int64_t lead_size[kMaxDims] = {};
  int64_t lead_stride[kMaxDims] = {};
  int64_t rows = 0;
  int64_t columns = 0;

  template <class T>
  DLCORE_HD T* row(int64_t r) const {
    int64_t at = 0;
    for (int d = lead_dims - 1; d > 0; --d) {
      at += r % lead_size[d] * lead_stride[d];
      r /= lead_size[d];
    }
    at += r * lead_stride[0];
    return reinterpret_cast<T*>(data) + at;
  }
};

// One value per row, or one for all (stride 0), or none (null).
template <class T>
struct PerRow {
  const T* data = nullptr;
  int64_t stride = 0;

  DLCORE_HD explicit operator bool() const { return data != nullptr; }
  DLCORE_HD const T& operator[](int64_t r) const { return data[r * stride]; }
};

// A shared key is folded with the row, per-row keys are taken as they are.
struct Keys {
  const int64_t* data = nullptr;
  bool per_row = false;

  DLCORE_HD explicit operator bool() const { return data != nullptr; }
  DLCORE_HD Key operator[](int64_t r) const {
    if (per_row) return {data[2 * r], data[2 * r + 1]};
    return fold_in({data[0], data[1]}, r);
  }
};

}  // namespace dlcore
