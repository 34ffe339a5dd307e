// Rows of several heads, and pages of a cache, as the kernels take them.
#pragma once

#include "capi.h"

namespace dlcore::capi {

struct Shape {
  int64_t batch, rows, heads, columns;
};

inline DType dtype_of(int32_t dtype) {
  if (dtype < DLCORE_FLOAT32 || dtype > DLCORE_FLOAT16)
    refuse(DLCORE_INVALID_DTYPE, "dtype must be DLCORE_FLOAT32, DLCORE_BFLOAT16 or DLCORE_FLOAT16, got ",
           dtype);
  return static_cast<DType>(dtype);
}

// Checked; strides that are all 0 mean no gaps.
inline Heads heads(const char* name, const dlcore_heads& h, DType dtype, const Shape& s) {
  const int64_t size = product(name, {s.batch, s.rows, s.heads, s.columns});
  if (!h.data && size > 0) refuse(DLCORE_NULL_POINTER, name, ".data must not be NULL");
  Heads r{static_cast<char*>(const_cast<void*>(h.data)), dtype, h.batch_stride, h.row_stride, h.head_stride};
  if (h.batch_stride == 0 && h.row_stride == 0 && h.head_stride == 0) {
    r.head_stride = s.columns;
    r.row_stride = s.heads * s.columns;
    r.batch_stride = s.rows * r.row_stride;
  }
  const auto check = [&](const char* member, int64_t stride, int64_t count) {
    if (size > 0 && count > 1 && stride < s.columns)
      refuse(DLCORE_INVALID_SHAPE, name, member, " must be at least ", s.columns, ", got ", stride);
  };
  check(".batch_stride", r.batch_stride, s.batch);
  check(".row_stride", r.row_stride, s.rows);
  check(".head_stride", r.head_stride, s.heads);
  return r;
}

inline Heads contiguous(void* data, DType dtype, const Shape& s) {
  return {static_cast<char*>(data), dtype, s.rows * s.heads * s.columns, s.heads * s.columns, s.columns};
}

// Page ids (batch, pages), if there are any, each one of num_pages.
inline void check_pages(const int32_t* table, int64_t batch, int64_t pages, int64_t page_size,
                        int64_t num_pages) {
  if (!table) return;
  at_least("pages", pages, 0);
  at_least("page_size", page_size, 1);
  at_least("num_pages", num_pages, 0);
  product("pages", {pages, page_size});
  for (int64_t i = 0; i < product("page_table", {batch, pages}); ++i)
    if (table[i] < 0 || table[i] >= num_pages)
      refuse(DLCORE_INVALID_VALUE, "page_table must lie in [0, ", num_pages, "), got ", table[i]);
}

}  // namespace dlcore::capi
