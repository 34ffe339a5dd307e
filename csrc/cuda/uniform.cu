// The V-long sums of the uniform-state NELBO, and its gradient. A warp works on a span of a row.
#include "../common/noise.h"
#include "launch.h"
#include "softmax.h"
#include "uniform.h"

namespace dlcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kResident =
    2;  // blocks a multiprocessor at least: left alone, the assembler aims for more, and spills
constexpr int64_t kSpan = 2048;

int64_t blocks(int64_t rows, int64_t spans) { return ceil_div(rows * spans, kThreads / kWarp); }

// log1p(x) for x >= 0: the rounding of 1 + x is given back to first order.
__device__ float log1p_near(float x) {
  const float w = x + 1.0f;
  return log_near(w) + (x - (w - 1.0f)) / w;
}

struct Sums {
  float logs = 0, ratios = 0;

  // Factors that share one logarithm and one division.
  template <int TOGETHER>
  __device__ void add_together(const float* y) {
    Product<float> all(y[0]);
#pragma unroll
    for (int k = 1; k < TOGETHER; ++k) all = Product<float>(all, Product<float>(y[k]));
    logs += log1p_near(all.excess);
    ratios += all.weighted / (all.excess + 1.0f);
  }
};

constexpr int kEntries = 8;

// n factors 1 + y with Σ y <= c stay below (1 + c/n)^n, which has to be a float.
__device__ void add_entries(const float (&y)[kEntries], double c, Sums& sums) {
  if (c < 0x1p18) return sums.add_together<kEntries>(y);
  if (c < 0x1p31) {
    sums.add_together<kEntries / 2>(y);
    return sums.add_together<kEntries / 2>(y + kEntries / 2);
  }
#pragma unroll
  for (int k = 0; k < kEntries; ++k) sums.add_together<1>(y + k);
}

struct Part {
  double logs, ratios;
};

__global__ void start_kernel(const Summary* state, int64_t rows, double* saved) {
  for (int64_t r = global_thread(); r < rows; r += all_threads()) {
    dlcore::start_nelbo(state[r], r, rows, saved);
    saved[3 * rows + r] = saved[4 * rows + r] = 0;
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    nelbo_kernel(const __grid_constant__ NelboArguments a, Part* parts, int64_t spans) {
  for (int64_t i = global_warp(); i < a.logits.rows * spans; i += all_warps()) {
    const int64_t r = i / spans, first = i % spans * kSpan;
    const int64_t end = first + kSpan < a.logits.columns ? first + kSpan : a.logits.columns;
    const RowSoftmax row(a.softmax, r);
    const double c = NelboRow(a.alpha[r], -1, a.vocab).c;
    const Probability scaled(a.saved[r], c);
    const T* p = a.logits.row<const T>(r);
    Sums sums;
    for (int64_t at = first; at < end; at += kWarp * kEntries) {
      float y[kEntries];
#pragma unroll
      for (int k = 0; k < kEntries; k += N) {
        const int64_t column = at + (k / N * kWarp + lane_id()) * N;
        load_run<N>(p, column, end, kNone, y + k);
        add_at<N>(y + k, a.first_token + column, row.index, row.shift);
#pragma unroll
        for (int j = 0; j < N; ++j) y[k + j] = scaled(y[k + j]);
      }
      add_entries(y, c, sums);
    }
    const Part part{sum_lanes(static_cast<double>(sums.logs)), sum_lanes(static_cast<double>(sums.ratios))};
    if (lane_id() == 0) parts[i] = part;
  }
}

__global__ void reduce_kernel(const Part* parts, int64_t rows, int64_t spans, double* saved) {
  for (int64_t r = global_thread(); r < rows; r += all_threads())
    for (int64_t c = 0; c < spans; ++c) {
      saved[3 * rows + r] += parts[r * spans + c].logs;
      saved[4 * rows + r] += parts[r * spans + c].ratios;
    }
}

__global__ void finish_kernel(const double* saved, int64_t rows, int64_t vocab, const int64_t* z,
                              const int64_t* x, PerRow<double> alpha, PerRow<double> dalpha, float* loss) {
  for (int64_t r = global_thread(); r < rows; r += all_threads())
    loss[r] = finish_nelbo_row(saved, rows, r, vocab, z[r] == x[r], alpha[r], dalpha[r]);
}

template <class T, class U, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    backward_kernel(const __grid_constant__ NelboBackwardArguments a, int64_t spans) {
  const int64_t rows = a.logits.rows;
  for (int64_t i = global_warp(); i < rows * spans; i += all_warps()) {
    const int64_t r = i / spans, first = i % spans * kSpan, z = a.z[r], x = a.x[r];
    const RowSoftmax row(a.softmax, r);
    const NelboSlopes g(a.saved, rows, r, a.vocab, z == x, a.alpha[r], a.dalpha[r], a.grad[r]);
    const Probability probability(a.saved[r]);
    const auto at_z = static_cast<float>(g.at_z), at_x = static_cast<float>(g.at_x);
    const auto differentiate = [&](float (&run)[N], int64_t column) {
      const int64_t token = a.first_token + column;
      add_at<N>(run, token, row.index, row.shift);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float p = probability(run[k]);
        run[k] = p * (g.slope / fmaf(p, g.ratio, 1.0f) + g.level);
      }
      add_at<N>(run, token, z, at_z);
      add_at<N>(run, token, x, at_x);
    };
    map_span<N, kSpan>(a.logits.row<const T>(r), a.out.row<U>(r), first, a.logits.columns, differentiate);
  }
}

}  // namespace

void start_nelbo(const Summary* state, int64_t rows, double* saved, cudaStream_t stream) {
  launch("uniform.nelbo", start_kernel, ceil_div(rows, kThreads), kThreads, stream, state, rows, saved);
}

int64_t nelbo_bytes(int64_t rows, int64_t columns) {
  return rows * ceil_div(columns, kSpan) * static_cast<int64_t>(sizeof(Part));
}

void nelbo(const NelboArguments& a, void* workspace, cudaStream_t stream) {
  const int64_t rows = a.logits.rows, spans = ceil_div(a.logits.columns, kSpan);
  auto* parts = static_cast<Part*>(workspace);
  with_gradient(a.logits, a.logits, [&](auto in, auto, auto abreast) {
    launch("uniform.nelbo", nelbo_kernel<decltype(in), decltype(abreast)::value>, blocks(rows, spans),
           kThreads, stream, a, parts, spans);
  });
  launch("uniform.nelbo's parts", reduce_kernel, ceil_div(rows, kThreads), kThreads, stream, parts, rows,
         spans, a.saved);
}

void finish_nelbo(const double* saved, int64_t rows, int64_t vocab, const int64_t* z, const int64_t* x,
                  PerRow<double> alpha, PerRow<double> dalpha, float* loss, cudaStream_t stream) {
  launch("uniform.nelbo", finish_kernel, ceil_div(rows, kThreads), kThreads, stream, saved, rows, vocab, z, x,
         alpha, dalpha, loss);
}

void nelbo_backward(const NelboBackwardArguments& a, cudaStream_t stream) {
  const int64_t spans = ceil_div(a.logits.columns, kSpan);
  with_gradient(a.logits, a.out, [&](auto in, auto out, auto abreast) {
    launch("uniform.nelbo_backward", backward_kernel<decltype(in), decltype(out), decltype(abreast)::value>,
           blocks(a.logits.rows, spans), kThreads, stream, a, spans);
  });
}

}  // namespace dlcore::cuda
