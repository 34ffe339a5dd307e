// A small matrix product on operands that stay in the cache, and what feeds it. Every sum is taken in order,
// with fused operations where the level has them: the same bits on all of these.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "rows.h"

namespace dlcore::DLCORE_ISA {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Registers that a product may fill with sums, in sixteens.
constexpr int kSums = kParts == 1 ? 16 : kParts == 2 ? 6 : 2;
constexpr int kWidest = kParts == 1 ? 4 : 1;

// c + sum, or c·factor + sum.
inline Floats added(const float* c, const float* factor, const Floats& sum) {
  return factor ? fused(load(c), load(factor), sum) : load(c) + sum;
}

// What a product does beside its sums, at least once for every sixteen columns of a row of A: nothing.
struct Nothing {
  void operator()(int64_t, int64_t) const {}
};

// c[j][0..16W) = c·factor + Σ_k A(j, k)·b[k][0..16W) for j < N, where A(j, k) is a[j·lda + k], or a[k·lda +
// j] `by_column`. Without `add` c is set to the sum. Row j of the panel is row `first` + j of the product.
template <int W, int N, bool by_column, class Beside>
inline void multiply_panel(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                           int64_t depth, bool add, const float* factor, int64_t first,
                           const Beside& beside) {
  FloatPart sum[N][W * kParts] = {};
  // One pointer for four rows of A: with one for each there would not be registers enough.
  constexpr int kQuad = by_column ? N : 4;
  const float* quad[(N + kQuad - 1) / kQuad];
  for (int i = 0; i * kQuad < N; ++i) quad[i] = a + i * kQuad * (by_column ? 1 : lda);
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k) {
    FloatPart x[W * kParts];
    for (int p = 0; p < W * kParts; ++p) std::memcpy(&x[p], b + k * ldb + p * kPartLanes, sizeof x[p]);
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      const FloatPart s = spread(quad[j / kQuad][j % kQuad * (by_column ? 1 : lda)]);
#pragma GCC unroll 4
      for (int p = 0; p < W * kParts; ++p) sum[j][p] = fused(x[p], s, sum[j][p]);
    }
    for (const float*& p : quad) p += by_column ? lda : 1;
    if constexpr (!by_column) {
      if (k % kLanes < N) beside(first + k % kLanes, k / kLanes * kLanes);
    } else if (const int64_t column = round_up(first, kLanes); column < first + N) {
      beside(k, column);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < N; ++j)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      float* to = c + j * ldc + w * kLanes;
      Floats all;
      for (int p = 0; p < kParts; ++p) all.part[p] = sum[j][w * kParts + p];
      store(to, add ? added(to, factor ? factor + w * kLanes : nullptr, all) : all);
    }
}

// A product's operands; all rows of b and c are whole sixteens.
struct Operands {
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int64_t depth;
  bool add = false;
  const float* factor = nullptr;
};

template <int W, int N, bool by_column, class Beside>
inline void multiply_rows(const Operands& p, int64_t from, int64_t rows, int64_t lane, const Beside& beside) {
  for (; from + N <= rows; from += N)
    multiply_panel<W, N, by_column>(p.a + from * (by_column ? 1 : p.lda), p.lda, p.b + lane, p.ldb,
                                    p.c + from * p.ldc + lane, p.ldc, p.depth, p.add,
                                    p.factor ? p.factor + lane : nullptr, from, beside);
  if constexpr (N > 1)
    if (from < rows) multiply_rows<W, N / 2, by_column>(p, from, rows, lane, beside);
}

template <int W, bool by_column, class Beside>
inline void multiply_lanes(const Operands& p, int64_t rows, int64_t sixteens, int64_t lane,
                           const Beside& beside) {
  for (; sixteens >= W; sixteens -= W, lane += W * kLanes)
    multiply_rows<W, kSums / W, by_column>(p, 0, rows, lane, beside);
  if constexpr (W > 1)
    if (sixteens > 0) multiply_lanes<W / 2, by_column>(p, rows, sixteens, lane, beside);
}

// `rows` rows of c, `sixteens` times sixteen lanes wide.
template <bool by_column, class Beside>
inline void multiply(const Operands& p, int64_t rows, int64_t sixteens, const Beside& beside) {
  multiply_lanes<kWidest, by_column>(p, rows, sixteens, 0, beside);
}
template <bool by_column>
inline void multiply(const Operands& p, int64_t rows, int64_t sixteens) {
  multiply<by_column>(p, rows, sixteens, Nothing());
}

// Swaps the off-diagonal blocks, `size` wide, of a square of registers.
template <int size>
inline void swap_blocks(FloatPart (&row)[kPartLanes]) {
  IntPart upper, lower;
  for (int i = 0; i < kPartLanes; ++i) {
    upper[i] = i & size ? kPartLanes + i - size : i;
    lower[i] = i & size ? kPartLanes + i : i + size;
  }
  for (int i = 0; i < kPartLanes; ++i) {
    if (i & size) continue;
    const FloatPart x = row[i], y = row[i + size];
    row[i] = __builtin_shuffle(x, y, upper);
    row[i + size] = __builtin_shuffle(x, y, lower);
  }
}

// out[c][r] = in[r][c] for 16 rows and 16 columns.
template <class T>
inline void transpose(const T* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < kLanes; r += kPartLanes) {
    FloatPart row[kParts][kPartLanes];
    for (int i = 0; i < kPartLanes; ++i) {
      const Floats x = load(in + (r + i) * in_stride);
      for (int c = 0; c < kParts; ++c) row[c][i] = x.part[c];
    }
    for (int c = 0; c < kParts; ++c) {
      if constexpr (kPartLanes > 8) swap_blocks<8>(row[c]);
      if constexpr (kPartLanes > 4) swap_blocks<4>(row[c]);
      swap_blocks<2>(row[c]);
      swap_blocks<1>(row[c]);
      for (int i = 0; i < kPartLanes; ++i)
        std::memcpy(out + (c * kPartLanes + i) * out_stride + r, &row[c][i], sizeof row[c][i]);
    }
  }
}

// A thread's memory, kept from call to call.
class Scratch {
 public:
  // `count` floats from a cache line on, until the next `reset`.
  float* take(int64_t count) {
    float* p = data_.get() + used_;
    used_ += round_up(count, 16);
    return p;
  }
  void reset(int64_t floats) {
    used_ = 0;
    if (floats + 16 <= size_) return;
    size_ = floats + 16;
    data_.reset(static_cast<float*>(
        ::operator new(static_cast<size_t>(size_) * sizeof(float), std::align_val_t{kCacheLine})));
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{kCacheLine}); }
  };
  std::unique_ptr<float[], Free> data_;
  int64_t size_ = 0, used_ = 0;
};

inline Scratch& scratch() {
  thread_local Scratch kept;
  return kept;
}

}  // namespace dlcore::DLCORE_ISA
