// The V-long sums of the uniform-state NELBO, and its gradient. Compiled once per ISA level.
#include "uniform.h"

#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace dlcore::DLCORE_ISA {
namespace {

struct Sums {
  double logs = 0, ratios = 0;
};

// Σ log1p(y) and Σ y / (1 + y) over a group; four or eight factors share one logarithm and one division.
template <int together, class T>
void add_group(const T* x, const Probability& scaled, Sums& sums) {
  Floats logs = broadcast(0.0f), ratios = logs;
  for (int64_t i = 0; i < kGroup; i += together * kLanes) {
    Floats y[together];
    for (int k = 0; k < together; k += kAbreast) {
      const WideFloats abreast = scaled(load_wide(x + i + k * kLanes));
      for (int j = 0; j < kAbreast; ++j) y[k + j] = slice(abreast, j);
    }
    const auto four = [&](int k) {
      using P = Product<Floats>;
      return P(P(P(y[k]), P(y[k + 1])), P(P(y[k + 2]), P(y[k + 3])));
    };
    const Product<Floats> all = together == 8 ? Product<Floats>(four(0), four(together - 4)) : four(0);
    const Floats whole = all.excess + 1.0f, inverse = reciprocal(whole);
    // log1p: the rounding of 1 + excess is given back to first order.
    logs = logs + fused(all.excess - (whole - 1.0f), inverse, log(whole));
    ratios = fused(all.weighted, inverse, ratios);
  }
  sums.logs += sum(logs);
  sums.ratios += sum(ratios);
}

// The same where even the product of a few factors could overflow.
template <class T>
void add_group_apart(const T* x, const Probability& scaled, Sums& sums) {
  Floats logs = broadcast(0.0f), ratios = logs;
  for (int64_t i = 0; i < kGroup; i += kLanes) {
    const Floats y = scaled(load(x + i));
    logs = logs + log1p(y);
    ratios = ratios + y / (y + 1.0f);
  }
  sums.logs += sum(logs);
  sums.ratios += sum(ratios);
}

// n factors 1 + y with Σ y <= c stay below (1 + c/n)^n, which has to be a float.
template <class T>
auto group_adder(double c) {
  return c < 0x1p18 ? add_group<8, T> : c < 0x1p31 ? add_group<4, T> : add_group_apart<T>;
}

// Whether a group can be read as it stands.
bool plain(const RowSoftmax& row, int64_t count, int64_t token) {
  return count == kGroup && !row.special(token);
}

}  // namespace

void nelbo(const NelboArguments& a) {
  const int64_t rows = a.logits.rows;
  ScanArguments scan;
  scan.logits = a.logits;
  scan.softmax = a.softmax;
  scan.target = a.target;
  const auto add_row = [&](int64_t r) {
    const RowSoftmax row(a.softmax, r);
    const NelboRow state(a.alpha[r], -1, a.vocab);
    const Probability scaled(a.saved[r], state.c);
    Sums sums;
    with_dtype(a.logits.dtype, [&](auto type) {
      using T = decltype(type);
      const auto add = group_adder<T>(state.c);
      const T* data = a.logits.row<const T>(r);
      alignas(64) float x[kGroup];
      for (int64_t at = 0; at < a.logits.columns; at += kGroup) {
        const int64_t count = std::min(kGroup, a.logits.columns - at), token = a.first_token + at;
        prefetch<kGroup>(data + at, kAhead);
        if (plain(row, count, token)) {
          add(data + at, scaled, sums);
          continue;
        }
        read_transformed(data + at, count, token, row, x);
        group_adder<float>(state.c)(x, scaled, sums);
      }
    });
    a.saved[3 * rows + r] += sums.logs;
    a.saved[4 * rows + r] += sums.ratios;
  };
  if (!a.scan) return parallel_for(rows, a.threads, add_row);
  parallel_ranges(rows, a.threads, [&](int64_t begin, int64_t end) {
    scan_rows(scan, begin, end, [&](int64_t r, const Summary& s) {
      start_nelbo(s, r, rows, a.saved);
      add_row(r);
    });
  });
}

void nelbo_backward(const NelboBackwardArguments& a) {
  const int64_t rows = a.logits.rows;
  parallel_for(rows, a.threads, [&](int64_t r) {
    const RowSoftmax row(a.softmax, r);
    const NelboSlopes g(a.saved, rows, r, a.vocab, a.z[r] == a.x[r], a.alpha[r], a.dalpha[r], a.grad[r]);
    const Probability probability(a.saved[r]);
    with_dtype(a.logits.dtype, [&](auto type) {
      using T = decltype(type);
      const T* data = a.logits.row<const T>(r);
      alignas(64) float x[kGroup];
      for (int64_t at = 0; at < a.logits.columns; at += kGroup) {
        const int64_t count = std::min(kGroup, a.logits.columns - at), token = a.first_token + at;
        prefetch<kGroup>(data + at, kAhead);
        prefetch_lines<kGroup * sizeof(T), 1>(a.out.row<T>(r) + at, kAhead);
        const auto differentiate = [&](const float* from, float* to) {
          for (int64_t i = 0; i < kGroup; i += kAbreast * kLanes) {
            const WideFloats p = probability(load_wide(from + i));
            store(to + i, p * fused(reciprocal(fused(p, g.ratio, 1.0f)), g.slope, g.level));
          }
          const auto add = [&](int64_t id, double own) {
            if (id >= token && id < token + count) to[id - token] += static_cast<float>(own);
          };
          add(a.z[r], g.at_z);
          add(a.x[r], g.at_x);
        };
        if constexpr (std::is_same_v<T, float>)
          if (plain(row, count, token)) {
            differentiate(data + at, a.out.row<float>(r) + at);
            continue;
          }
        read_transformed(data + at, count, token, row, x);
        differentiate(x, x);
        write_group(a.out.row<T>(r) + at, count, x);
      }
    });
  });
}

}  // namespace dlcore::DLCORE_ISA
