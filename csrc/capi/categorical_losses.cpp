// Log-probabilities and divergences of softmax, and their gradients.
#include "categorical.h"
#include "gradients.h"

namespace dlcore::capi {
namespace {

void check_target(const Rows& a, const int64_t* target) {
  needed("target", target, a.rows());
  token_ids("target", target, a.rows(), a.logits.vocab(), std::numeric_limits<int64_t>::min());
}

void log_probs(const Rows& a, const int64_t* target, double* numbers) {
  const int64_t rows = a.rows();
  check_target(a, target);
  needed("numbers", numbers, rows);
  Summaries state(static_cast<size_t>(rows));
  ScanArguments read;
  read.target = {target, 1};
  read.state = state.data();
  a.scan(read);
  finish_log_probs(state.data(), read.target, static_cast<bool>(a.softmax.index), rows, numbers);
}

void log_probs_backward(const Rows& a, const int64_t* target, const double* grad, const double* numbers,
                        const dlcore_logits_grad* logits_grad) {
  LogProbsBackwardArguments b;
  if (a.softmax.temperature) refuse(DLCORE_INVALID_VALUE, "temperature must be none");
  check_target(a, target);
  needed("grad", grad, a.rows());
  needed("numbers", numbers, a.rows());
  Gradient gradient("logits_grad", a.logits, logits_grad);
  b.softmax = a.softmax;
  b.target = {target, 1};
  b.grad = grad;
  b.numbers = numbers;
  a.logits.tiles(0, [&](int64_t first, const View& tile) {
    b.logits = tile;
    b.first_token = first;
    b.out = gradient.tile(first, tile.columns);
    b.threads = a.logits.threads(a.rows() * tile.columns);
    kernels().log_probs_backward(b);
    gradient.add(first, b.out);
  });
  gradient.finish();
}

// Two heads side by side.
struct Pair {
  Pair(const dlcore_logits* left, const dlcore_logits* right, int32_t threads)
      : p("p", pointed("p", left), threads), q("q", pointed("q", right), threads) {
    if (q.rows() != p.rows() || q.vocab() != p.vocab())
      refuse(DLCORE_INVALID_SHAPE, "q must have the rows and the vocabulary of p, ", p.rows(), " and ",
             p.vocab(), ", got ", q.rows(), " and ", q.vocab());
    if (q.dtype() != p.dtype())
      refuse(DLCORE_INVALID_DTYPE, "q.values.dtype must be that of p, ", static_cast<int>(p.dtype()),
             ", got ", static_cast<int>(q.dtype()));
  }

  Logits p, q;
};

void kl(const Pair& pair, const dlcore_floats& temperature, double* numbers) {
  const int64_t rows = pair.p.rows();
  std::vector<KLSummary> state(static_cast<size_t>(rows));
  KLArguments a;
  a.temperature = temperature_of(temperature, rows, false);
  a.state = state.data();
  needed("numbers", numbers, rows);
  Logits::pairs(pair.p, pair.q, [&](int64_t, const View& p, const View& q) {
    a.p = p;
    a.q = q;
    a.threads = pair.p.threads(rows * p.columns);
    kernels().kl(a);
  });
  finish_kl(state.data(), rows, numbers);
}

void kl_backward(const Pair& pair, const dlcore_floats& temperature, const double* grad,
                 const double* numbers, const dlcore_logits_grad* p_grad, const dlcore_logits_grad* q_grad) {
  const int64_t rows = pair.p.rows();
  KLBackwardArguments a;
  a.temperature = temperature_of(temperature, rows, false);
  needed("grad", grad, rows);
  needed("numbers", numbers, rows);
  a.grad = grad;
  a.numbers = numbers;
  Gradient p_gradient("p_grad", pair.p, p_grad), q_gradient("q_grad", pair.q, q_grad);
  Logits::pairs(pair.p, pair.q, [&](int64_t first, const View& p, const View& q) {
    a.p = p;
    a.q = q;
    a.p_out = p_gradient.tile(first, p.columns);
    a.q_out = q_gradient.tile(first, q.columns);
    a.threads = pair.p.threads(rows * p.columns);
    kernels().kl_backward(a);
    p_gradient.add(first, a.p_out);
    q_gradient.add(first, a.q_out);
  });
  p_gradient.finish();
  q_gradient.finish();
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore::capi;

dlcore_status dlcore_categorical_log_probs(const dlcore_categorical* softmax, const int64_t* target,
                                           double* numbers) {
  return guarded(__func__, [&] { log_probs(Rows(softmax, false), target, numbers); });
}

dlcore_status dlcore_categorical_log_probs_backward(const dlcore_categorical* softmax, const int64_t* target,
                                                    const double* grad, const double* numbers,
                                                    const dlcore_logits_grad* logits_grad) {
  return guarded(__func__,
                 [&] { log_probs_backward(Rows(softmax, false), target, grad, numbers, logits_grad); });
}

dlcore_status dlcore_categorical_kl(const dlcore_logits* p, const dlcore_logits* q, dlcore_floats temperature,
                                    double* numbers, int32_t threads) {
  return guarded(__func__, [&] { kl(Pair(p, q, threads), temperature, numbers); });
}

dlcore_status dlcore_categorical_kl_backward(const dlcore_logits* p, const dlcore_logits* q,
                                             dlcore_floats temperature, const double* grad,
                                             const double* numbers, const dlcore_logits_grad* p_grad,
                                             const dlcore_logits_grad* q_grad, int32_t threads) {
  return guarded(__func__,
                 [&] { kl_backward(Pair(p, q, threads), temperature, grad, numbers, p_grad, q_grad); });
}
