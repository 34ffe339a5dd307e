// Passes over logits whose log-sum-exp is known, and the KL divergence's. A warp works on a span of a row.
#include "categorical.h"
#include "launch.h"
#include "softmax.h"

namespace dlcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kResident =
    2;  // blocks a multiprocessor at least: left alone, the assembler aims for more, and spills
constexpr int64_t kSpan = 2048;

int64_t blocks(int64_t rows, int64_t spans) { return ceil_div(rows * spans, kThreads / kWarp); }

// The gradient of a row's logits, run by run.
class LogProbsGradient {
 public:
  __device__ LogProbsGradient(const LogProbsBackwardArguments& a, int64_t r)
      : row_(a.softmax, r), target_(a.target[r]), probability_(a.numbers[2 * a.logits.rows + r]) {
    if (target_ < 0) return;
    const int64_t rows = a.logits.rows;
    at_target_ = static_cast<float>(a.grad[r]);
    at_index_ = a.softmax.index ? static_cast<float>(a.grad[rows + r]) : 0;
    spread_ = static_cast<float>(a.grad[2 * rows + r]) - at_target_ - at_index_;
  }

  template <int N>
  __device__ void operator()(float (&x)[N], int64_t token) const {
    float slope[N];  // of the softcap: 1 - tanh^2
#pragma unroll
    for (int k = 0; k < N; ++k) {
      slope[k] = 1;
      if (row_.softcap > 0) {
        x[k] = softcapped(x[k], row_.softcap);
        const float tanh = x[k] / row_.softcap;
        slope[k] = 1.0f - tanh * tanh;
      }
    }
    add_at<N>(x, token, row_.index, row_.shift);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = target_ < 0 ? 0 : probability_(x[k]) * spread_;
    add_at<N>(x, token, target_, at_target_);
    add_at<N>(x, token, row_.index, at_index_);
    const int excluded = place_of<N>(row_.exclude, token);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = k == excluded ? 0 : x[k] * slope[k];
  }

 private:
  RowSoftmax row_;
  int64_t target_;
  Probability probability_;
  float at_target_ = 0, at_index_ = 0, spread_ = 0;
};

template <class T, class U, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    log_probs_backward_kernel(const __grid_constant__ LogProbsBackwardArguments a, int64_t spans) {
  for (int64_t i = global_warp(); i < a.logits.rows * spans; i += all_warps()) {
    const int64_t r = i / spans, first = i % spans * kSpan;
    const LogProbsGradient gradient(a, r);
    map_span<N, kSpan>(a.logits.row<const T>(r), a.out.row<U>(r), first, a.logits.columns,
                       [&](float (&x)[N], int64_t column) { gradient(x, a.first_token + column); });
  }
}

// A lane's running sums; the references are the warp's.
struct KLSums {
  static constexpr int kEntries = 8;
  float p_top = kNone, q_top = kNone, p_sum = 0, q_sum = 0, gap = 0;  // gap in log2
  bool invalid = false;

  __device__ void add(const float (&p)[kEntries], const float (&q)[kEntries], float scale) {
    float p_most = p_top, q_most = q_top;
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      invalid |= !(p[k] < -kNone) || !(q[k] < -kNone);
      p_most = fmaxf(p_most, p[k]);
      q_most = fmaxf(q_most, q[k]);
    }
    refer(largest_lanes(p_most), largest_lanes(q_most), scale);
    const float p_reference = p_top > kNone ? p_top : 0, q_reference = q_top > kNone ? q_top : 0;
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      const float dp = (p[k] - p_reference) * scale, dq = (q[k] - q_reference) * scale;
      q_sum += exp2_fast(dq);
      // 0 · (-inf - log q) is 0: what p excludes costs nothing.
      if (p[k] == kNone) continue;
      const float e = exp2_fast(fmaxf(dp, -125.0f));
      p_sum += e;
      gap += e * (dp - dq);
    }
  }

  __device__ KLSummary summary(float scale) const {
    KLSummary s;
    s.invalid = __any_sync(kAllLanes, invalid);
    s.p_top = p_top * (scale * kLn2);
    s.q_top = q_top * (scale * kLn2);
    s.p_sum = sum_lanes(static_cast<double>(p_sum));
    s.q_sum = sum_lanes(static_cast<double>(q_sum));
    s.gap = sum_lanes(static_cast<double>(gap)) * kLn2;
    return s;
  }

 private:
  __device__ void refer(float p, float q, float scale) {
    const float p_drop = p_top > kNone ? (p_top - p) * scale : 0,
                q_drop = q_top > kNone ? (q_top - q) * scale : 0;
    gap = exp2_fast(fmaxf(p_drop, -125.0f)) * (gap + p_sum * (p_drop - q_drop));
    p_sum *= exp2_fast(p_drop);
    q_sum *= exp2_fast(q_drop);
    p_top = p;
    q_top = q;
  }
};

__device__ float inverse(const PerRow<float>& temperature, int64_t r) {
  return temperature ? 1.0f / temperature[r] : 1.0f;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    kl_kernel(const __grid_constant__ KLArguments a, KLSummary* parts, int64_t spans) {
  constexpr int kEntries = KLSums::kEntries;
  for (int64_t i = global_warp(); i < a.p.rows * spans; i += all_warps()) {
    const int64_t r = i / spans, first = i % spans * kSpan;
    const int64_t end = first + kSpan < a.p.columns ? first + kSpan : a.p.columns;
    const T* p_row = a.p.row<const T>(r);
    const T* q_row = a.q.row<const T>(r);
    const float scale = inverse(a.temperature, r) * kLog2E;
    KLSums sums;
    for (int64_t at = first; at < end; at += kWarp * kEntries) {
      float p[kEntries], q[kEntries];
#pragma unroll
      for (int k = 0; k < kEntries; k += N) {
        const int64_t column = at + (k / N * kWarp + lane_id()) * N;
        load_run<N>(p_row, column, end, kNone, p + k);
        load_run<N>(q_row, column, end, kNone, q + k);
      }
      sums.add(p, q, scale);
    }
    const KLSummary s = sums.summary(scale);
    if (lane_id() == 0) parts[i] = s;
  }
}

__global__ void kl_reduce_kernel(const KLSummary* parts, int64_t rows, int64_t spans, bool start,
                                 KLSummary* state) {
  for (int64_t r = global_thread(); r < rows; r += all_threads()) {
    KLSummary s = start ? KLSummary{} : state[r];
    for (int64_t c = 0; c < spans; ++c) s = merge(s, parts[r * spans + c]);
    state[r] = s;
  }
}

// x·scale - logsumexp, by a reference close to x and the rest.
struct LogProbability {
  float reference, rest, scale;
  __device__ LogProbability(double logsumexp, float scale)
      : reference(static_cast<float>(logsumexp / scale)),
        rest(static_cast<float>(static_cast<double>(reference) * scale - logsumexp)),
        scale(scale) {}
  __device__ float operator()(float x) const { return fmaf(x - reference, scale, rest); }
};

template <class T, class U, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    kl_backward_kernel(const __grid_constant__ KLBackwardArguments a, int64_t spans) {
  const int64_t rows = a.p.rows;
  for (int64_t i = global_warp(); i < rows * spans; i += all_warps()) {
    const int64_t r = i / spans, first = i % spans * kSpan;
    const int64_t end = first + kSpan < a.p.columns ? first + kSpan : a.p.columns;
    const float scale = inverse(a.temperature, r), divergence = static_cast<float>(a.numbers[r]);
    const auto weight = static_cast<float>(a.grad[r] * scale);
    const LogProbability log_p_of(a.numbers[rows + r], scale), log_q_of(a.numbers[2 * rows + r], scale);
    for (int64_t at = first + lane_id() * N; at < end; at += kWarp * N) {
      float p[N], q[N];
      load_run<N>(a.p.row<const T>(r), at, end, 0, p);
      load_run<N>(a.q.row<const T>(r), at, end, 0, q);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float log_p = log_p_of(p[k]), log_q = log_q_of(q[k]);
        const float at_p = exp2_fast(log_p * kLog2E), at_q = exp2_fast(log_q * kLog2E);
        p[k] = p[k] == kNone ? 0 : at_p * (log_p - log_q - divergence) * weight;
        q[k] = (at_q - at_p) * weight;
      }
      store_run<N>(a.p_out.row<U>(r), at, end, p);
      store_run<N>(a.q_out.row<U>(r), at, end, q);
    }
  }
}

}  // namespace

void log_probs_backward(const LogProbsBackwardArguments& a, cudaStream_t stream) {
  const int64_t spans = ceil_div(a.logits.columns, kSpan);
  with_gradient(a.logits, a.out, [&](auto in, auto out, auto abreast) {
    launch("categorical.log_probs_backward",
           log_probs_backward_kernel<decltype(in), decltype(out), decltype(abreast)::value>,
           blocks(a.logits.rows, spans), kThreads, stream, a, spans);
  });
}

int64_t kl_bytes(int64_t rows, int64_t columns) {
  return rows * ceil_div(columns, kSpan) * static_cast<int64_t>(sizeof(KLSummary));
}

void kl(const KLArguments& a, bool start, void* workspace, cudaStream_t stream) {
  if (a.p.dtype != a.q.dtype) throw Error("dlcore: categorical.kl: p and q must have one dtype");
  const int64_t spans = ceil_div(a.p.columns, kSpan);
  auto* parts = static_cast<KLSummary*>(workspace);
  with_gradient(a.p, a.q, [&](auto p, auto, auto abreast) {
    launch("categorical.kl", kl_kernel<decltype(p), decltype(abreast)::value>, blocks(a.p.rows, spans),
           kThreads, stream, a, parts, spans);
  });
  launch("categorical.kl's parts", kl_reduce_kernel, ceil_div(a.p.rows, kThreads), kThreads, stream, parts,
         a.p.rows, spans, start, a.state);
}

void kl_backward(const KLBackwardArguments& a, cudaStream_t stream) {
  if (a.p.dtype != a.q.dtype || a.p_out.dtype != a.q_out.dtype)
    throw Error("dlcore: categorical.kl_backward: p and q must have one dtype, and so must their gradients");
  const int64_t spans = ceil_div(a.p.columns, kSpan);
  const auto run = [&](auto in, auto out, auto abreast) {
    launch("categorical.kl_backward",
           kl_backward_kernel<decltype(in), decltype(out), decltype(abreast)::value>, blocks(a.p.rows, spans),
           kThreads, stream, a, spans);
  };
  with_gradient(a.p, a.p_out, run, a.q, a.q_out);
}

}  // namespace dlcore::cuda
