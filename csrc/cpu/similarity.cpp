// Cosines between fresh and cached rows, in one read of both. Compiled once per ISA level.
#include "similarity.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "parallel.h"
#include "vectors.h"

namespace dlcore::DLCORE_ISA {
namespace {

// Columns that are summed in float before their sum is added up in double.
constexpr int64_t kSpan = 1024;

struct Products {
  double dot = 0, fresh = 0, cached = 0;

  // Whether no square can have left float's range, nor so many have become 0 that it shows.
  bool in_range() const {
    const auto safe = [](double x) { return x > 1e-20 && x < 1e30; };
    return safe(fresh) && safe(cached);
  }

  // Between zero and zero nothing has changed.
  float cosine() const {
    if (fresh == 0 && cached == 0) return 1;
    if (fresh == 0 || cached == 0) return static_cast<float>(0 * (fresh + cached));
    const double x = dot / (std::sqrt(fresh) * std::sqrt(cached));
    return static_cast<float>(x > 1 ? 1 : x < -1 ? -1 : x);
  }
};

template <class T>
void add(const T* a, const T* b, int64_t columns, Products& p) {
  Floats dot = broadcast(0.0f), fresh = dot, cached = dot;
  each_sixteen<T>(columns, [&](int64_t, auto sixteen, auto) {
    const Floats x = sixteen(a), y = sixteen(b);
    dot = fused(x, y, dot);
    fresh = fused(x, x, fresh);
    cached = fused(y, y, cached);
  });
  p.dot += sum(dot);
  p.fresh += sum(fresh);
  p.cached += sum(cached);
}

// The same in double, where squares of all floats are.
template <class T>
void add_wide(const T* a, const T* b, int64_t columns, Products& p) {
  each_sixteen<T>(columns, [&](int64_t, auto sixteen, auto) {
    float x[kLanes], y[kLanes];
    store(x, sixteen(a));
    store(y, sixteen(b));
    for (int i = 0; i < kLanes; ++i) {
      p.dot += static_cast<double>(x[i]) * y[i];
      p.fresh += static_cast<double>(x[i]) * x[i];
      p.cached += static_cast<double>(y[i]) * y[i];
    }
  });
}

template <class T>
float cosine_at(const CosineArguments& a, int64_t batch, int64_t row, int64_t position) {
  int64_t held_by = batch;
  if (a.pages.table) {
    held_by = a.pages.table[batch * a.pages.pages + position / a.pages.page_size];
    position %= a.pages.page_size;
  }
  const auto summed = [&](auto add_span) {
    Products p;
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* x = a.fresh.at<const T>(batch, row, h);
      const T* y = a.cached.at<const T>(held_by, position, h);
      for (int64_t at = 0; at < a.columns; at += kSpan)
        add_span(x + at, y + at, std::min(kSpan, a.columns - at), p);
    }
    return p;
  };
  const Products p = summed(add<T>);
  return p.in_range() ? p.cosine() : summed(add_wide<T>).cosine();
}

}  // namespace

void row_cosine(const CosineArguments& given) {
  CosineArguments a = given;
  if (a.fresh.head_stride == a.columns && a.cached.head_stride == a.columns) {
    a.columns *= a.heads;
    a.heads = 1;
  }
  parallel_for(a.batch * a.rows, a.threads, [&](int64_t r) {
    const int64_t batch = r / a.rows, row = r % a.rows, position = a.positions ? a.positions[r] : row;
    if (position < 0 || position >= a.cached_rows) {
      a.out[r] = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    with_dtype(a.fresh.dtype,
               [&](auto type) { a.out[r] = cosine_at<decltype(type)>(a, batch, row, position); });
  });
}

}  // namespace dlcore::DLCORE_ISA
