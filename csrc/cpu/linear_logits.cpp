// Matrix products whose tiles meet the categorical kernels in the cache. Compiled once per ISA level.
//
// A strip of columns of b is packed, block of depth by block of depth, to where it stays in the first-level
// cache, and meets all rows of a there. What comes out depends on neither the threads nor the number of rows.
#include "linear_logits.h"

#include <algorithm>

#include "kernels.h"
#include "parallel.h"
#include "product.h"

namespace dlcore::DLCORE_ISA {
namespace {

constexpr int64_t kStrip = 4 * kLanes;
constexpr int64_t kDepth = 64;
// Fewer rows than this are not worth packing a strip for.
constexpr int64_t kFewRows = 32;

// `count` numbers, at most a strip, as floats; zeros up to a whole sixteen.
template <class T>
void widen_row(const T* p, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(p + i));
  if (i == count) return;
  T tail[kLanes] = {};
  std::memcpy(tail, p + i, static_cast<size_t>(count - i) * sizeof(T));
  store(out + i, load(tail));
}

// out[c][r] = in[r][c] for fewer than 16 rows or columns, zeros beyond.
template <class T>
void transpose_corner(const T* in, int64_t in_stride, int64_t rows, int64_t columns, float* out) {
  alignas(64) float square[kLanes * kLanes] = {};
  for (int64_t r = 0; r < rows; ++r) widen_row(in + r * in_stride, columns, square + r * kLanes);
  transpose(square, kLanes, out, kStrip);
}

// b's rows [k, k + depth) and columns [j, j + columns) as floats, row by row.
template <class T>
void pack(const MatmulArguments& m, int64_t k, int64_t depth, int64_t j, int64_t columns, float* out) {
  const T* b = reinterpret_cast<const T*>(m.b);
  if (!m.b_by_column) {
    for (int64_t i = 0; i < depth; ++i) widen_row(b + (k + i) * m.b_stride + j, columns, out + i * kStrip);
    return;
  }
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t i = 0; i < depth; i += kLanes) {
      const T* corner = b + (j + c) * m.b_stride + k + i;
      float* to = out + i * kStrip + c;
      if (depth - i >= kLanes && columns - c >= kLanes) {
        for (int64_t row = 0; row < kLanes; ++row)
          prefetch<kLanes>(corner + row * m.b_stride, kDepth * sizeof(T));
        transpose(corner, m.b_stride, to, kStrip);
      } else {
        transpose_corner(corner, m.b_stride, std::min<int64_t>(kLanes, columns - c),
                         std::min<int64_t>(kLanes, depth - i), to);
      }
    }
}

// One strip of columns from `column` on, for the rows [from, to).
template <class T>
void multiply_strip(const MatmulArguments& m, int64_t from, int64_t to, int64_t column) {
  const int64_t columns = std::min(kStrip, m.columns - column), rows = to - from;
  const int64_t sixteens = (columns + kLanes - 1) / kLanes;
  const bool whole = columns % kLanes == 0;
  Scratch& memory = scratch();
  memory.reset(kDepth * kStrip + (whole ? 0 : rows * kStrip));
  float* panel = memory.take(kDepth * kStrip);
  float* out = m.out + from * m.out_stride + column;
  float* c = whole ? out : memory.take(rows * kStrip);
  const int64_t c_stride = whole ? m.out_stride : kStrip;
  const auto copy = [&](const float* in, int64_t in_stride, float* to_, int64_t to_stride) {
    for (int64_t r = 0; r < rows; ++r) std::copy_n(in + r * in_stride, columns, to_ + r * to_stride);
  };
  bool add = m.add || m.bias;
  if (m.bias)
    for (int64_t r = 0; r < rows; ++r) std::copy_n(m.bias + column, columns, c + r * c_stride);
  else if (add && !whole)
    copy(out, m.out_stride, c, c_stride);
  else if (m.depth == 0 && !add)
    for (int64_t r = 0; r < rows; ++r) std::fill_n(c + r * c_stride, sixteens * kLanes, 0.0f);
  for (int64_t k = 0; k < m.depth; k += kDepth, add = true) {
    const int64_t depth = std::min(kDepth, m.depth - k);
    pack<T>(m, k, depth, column, columns, panel);
    Operands p{nullptr, m.a_stride, panel, kStrip, c, c_stride, depth, add};
    if (m.a_by_column) {
      p.a = m.a + k * m.a_stride + from;
      multiply<true>(p, rows, sixteens);
    } else {
      p.a = m.a + from * m.a_stride + k;
      multiply<false>(p, rows, sixteens);
    }
  }
  if (m.softcap > 0)
    for (int64_t r = 0; r < rows; ++r)
      for (float* p = c + r * c_stride; p < c + r * c_stride + sixteens * kLanes; p += kLanes)
        store(p, softcapped(load(p), m.softcap));
  if (!whole) copy(c, c_stride, out, m.out_stride);
}

}  // namespace

void matmul(const MatmulArguments& m) {
  const int64_t strips = (m.columns + kStrip - 1) / kStrip;
  // Where strips are too few for the threads, each is shared by several, which pack it anew.
  const int64_t wanted = strips >= 4 * m.threads ? 1 : 4 * m.threads / strips;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, m.rows / kFewRows));
  with_dtype(m.b_dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(strips * parts, m.threads, [&](int64_t i) {
      const int64_t part = i % parts;
      multiply_strip<T>(m, part * m.rows / parts, (part + 1) * m.rows / parts, i / parts * kStrip);
    });
  });
}

}  // namespace dlcore::DLCORE_ISA
