// Drifts over a vocabulary of unit vectors, and the largest logits of a row.
#include <cmath>

#include "gradients.h"
#include "halves.h"
#include "radial.h"
#include "weighing.h"

namespace dlcore::capi {
namespace {

constexpr double kMostKappa = 1e8;

// All that the drift and its gradient take.
struct Drift {
  Drift(const dlcore_logits* logits, const dlcore_matrix* points, const dlcore_matrix* vectors,
        const dlcore_doubles& concentration, int32_t threads)
      : softmax{pointed("logits", logits), nullptr, {}, {}, 0, nullptr, threads},
        rows(&softmax, false),
        table(table_of(vectors, rows.logits.vocab())),
        kappa(per_row("kappa", concentration, rows.rows(), 0, kMostKappa)) {
    const View v = view("x", points);
    if (v.rows != rows.rows() || v.columns != dim())
      refuse(DLCORE_INVALID_SHAPE, "x must be (", rows.rows(), ", ", dim(), "), got (", v.rows, ", ",
             v.columns, ")");
    if (dim() < 2) refuse(DLCORE_INVALID_SHAPE, "x->columns must be at least 2, got ", dim());
    x.resize(static_cast<size_t>(product("x", {v.rows, v.columns})));
    for (int64_t r = 0; r < v.rows; ++r)
      widen(v.dtype, v.data + r * v.lead_stride[0] * size_of(v.dtype), v.columns, x.data() + r * v.columns);
  }

  int64_t dim() const { return table.columns; }
  RadialWeight radial() const { return {kappa, rows.rows(), dim()}; }
  // Vectors like x, without gaps.
  View of(const float* vectors) const {
    return result(const_cast<float*>(vectors), DType::kFloat32, rows.rows(), dim());
  }
  // Products of vectors with tokens, (rows, tokens), and room for them.
  View times(const View& vectors, const View& tokens, float* out) const {
    rows.logits.multiply(vectors, Order::kAsIs, tokens, Order::kTransposed, out, false);
    return result(out, DType::kFloat32, rows.rows(), tokens.rows);
  }
  std::unique_ptr<float[]> tile() const {
    return room<float>(
        product("logits", {rows.rows(), std::min(rows.logits.tile_width(), rows.logits.vocab())}));
  }

  dlcore_categorical softmax;
  Rows rows;
  View table;
  PerRow<double> kappa;
  std::vector<float> x;  // (rows, dim) as floats
};

void velocity(const Drift& d, float* out, float* along, double* logsumexp) {
  const int64_t rows = d.rows.rows(), dim = d.dim();
  needed("velocity", out, rows);
  const RadialWeight radial = d.radial();
  Summaries state(static_cast<size_t>(rows));
  ScanArguments read;
  read.state = state.data();
  Weighing weighing(d.rows, dim, read, out);
  const auto room_for_cosines = d.tile();
  d.rows.logits.pieces(0, [&](int64_t first, const View& tile) {
    weighing.scan(first, tile);
    const View tokens = rows_of(d.table, first, tile.columns);
    const View weights = d.times(d.of(d.x.data()), tokens, room_for_cosines.get());
    SphereWeightsArguments a;
    a.logits = tile;
    a.reference = weighing.references();
    a.radial = radial.get();
    a.cosines = room_for_cosines.get();
    a.threads = d.rows.logits.threads(rows * tile.columns);
    kernels().sphere_weights(a);
    d.rows.logits.multiply(weights, Order::kAsIs, tokens, Order::kAsIs, out, true);
  });
  const auto lse = room<double>(rows);
  weighing.logsumexp(kNaN, lse.get());
  for (int64_t r = 0; r < rows; ++r) {
    const double factor = std::exp(weighing.references()[r] - lse[r]);
    const float* x = d.x.data() + r * dim;
    float* mean = out + r * dim;
    double radius = 0;
    for (int64_t i = 0; i < dim; ++i) radius += mean[i] * factor * x[i];
    for (int64_t i = 0; i < dim; ++i) mean[i] = static_cast<float>(mean[i] * factor - radius * x[i]);
    if (along) along[r] = static_cast<float>(radius);
    if (logsumexp) logsumexp[r] = lse[r];
  }
}

// What the forward pass left, and where gradients of x and the table go.
struct Given {
  const float *grad, *velocity, *along;
  const double* logsumexp;
  void *x_grad, *table_grad;
};

// With h = P_x grad: d/da_k = p_k (g_k <h, E_k> - <h, m>), d/dc_k = p_k g'_k <h, E_k>, and x and E_k follow
// from c_k = <x, E_k> and m = Σ p_k g_k E_k.
class VelocityBackward {
 public:
  VelocityBackward(const Drift& drift, const Given& given, DType x_dtype)
      : d_(drift),
        given_(given),
        x_dtype_(x_dtype),
        radial_(drift.radial()),
        weights_(drift.tile()),
        pulls_(drift.tile()),
        tangent_(room<float>(rows() * drift.dim())),
        x_grad_(room<float>(rows() * drift.dim())),
        level_(room<float>(rows())) {
    if (given.table_grad)
      rows_grad_ = room<float>(std::min(logits().tile_width(), logits().vocab()) * drift.dim());
    for (int64_t r = 0; r < rows(); ++r) start(r);
  }

  // Of the tile of logits at a token, into `out`.
  void operator()(int64_t first, const View& tile, const View& out) {
    const View tokens = rows_of(d_.table, first, tile.columns), tangent = d_.of(tangent_.get());
    const View weights = d_.times(d_.of(d_.x.data()), tokens, weights_.get());
    const View pulls = d_.times(tangent, tokens, pulls_.get());
    SphereVelocityBackwardArguments a;
    a.logits = tile;
    a.logsumexp = given_.logsumexp;
    a.mean = level_.get();
    a.radial = radial_.get();
    a.cosines = weights_.get();
    a.pulls = pulls_.get();
    a.out = out;
    a.threads = logits().threads(rows() * tile.columns);
    kernels().sphere_velocity_backward(a);
    if (given_.x_grad) logits().multiply(pulls, Order::kAsIs, tokens, Order::kAsIs, x_grad_.get(), true);
    if (!given_.table_grad) return;
    logits().multiply(weights, Order::kTransposed, tangent, Order::kAsIs, rows_grad_.get(), false);
    logits().multiply(pulls, Order::kTransposed, d_.of(d_.x.data()), Order::kAsIs, rows_grad_.get(), true);
    const DType dtype = d_.table.dtype;
    narrow(dtype, rows_grad_.get(), tokens.rows * d_.dim(),
           static_cast<char*>(given_.table_grad) + first * d_.dim() * size_of(dtype));
  }

  void finish() const {
    if (given_.x_grad) narrow(x_dtype_, x_grad_.get(), rows() * d_.dim(), static_cast<char*>(given_.x_grad));
  }

 private:
  const Logits& logits() const { return d_.rows.logits; }
  int64_t rows() const { return d_.rows.rows(); }

  void start(int64_t r) {
    const int64_t dim = d_.dim(), at = r * dim;
    const float *x = d_.x.data() + at, *grad = given_.grad + at, along = given_.along[r];
    float pulled = 0, level = 0;
    for (int64_t i = 0; i < dim; ++i) pulled += grad[i] * x[i];
    for (int64_t i = 0; i < dim; ++i) {
      const float mean = given_.velocity[at + i] + along * x[i], tangent = grad[i] - pulled * x[i];
      tangent_[at + i] = tangent;
      level += tangent * mean;
      x_grad_[at + i] = -(pulled * mean + along * grad[i]);
    }
    level_[r] = level;
  }

  const Drift& d_;
  Given given_;
  DType x_dtype_;
  RadialWeight radial_;
  std::unique_ptr<float[]> weights_, pulls_, tangent_, x_grad_, level_, rows_grad_;
};

void velocity_backward(const Drift& d, DType x_dtype, const Given& given,
                       const dlcore_logits_grad* logits_grad) {
  needed("grad", given.grad, d.rows.rows());
  needed("velocity", given.velocity, d.rows.rows());
  needed("along", given.along, d.rows.rows());
  needed("logsumexp", given.logsumexp, d.rows.rows());
  Gradient gradient("logits_grad", d.rows.logits, logits_grad);
  VelocityBackward backward(d, given, x_dtype);
  d.rows.logits.pieces(0, [&](int64_t first, const View& tile) {
    const View out = gradient.tile(first, tile.columns);
    backward(first, tile, out);
    gradient.add(first, out);
  });
  gradient.finish();
  backward.finish();
}

void largest(const Logits& logits, int64_t count, int64_t* ids) {
  if (count < 1 || count > logits.vocab())
    refuse(DLCORE_INVALID_VALUE, "count must lie in [1, ", logits.vocab(), "], got ", count);
  needed("ids", ids, logits.rows());
  const auto values = room<float>(product("ids", {logits.rows(), count}));
  LargestArguments a;
  a.count = count;
  a.values = values.get();
  a.ids = ids;
  logits.tiles(0, [&](int64_t first, const View& tile) {
    a.logits = tile;
    a.first_token = first;
    a.threads = logits.threads(logits.rows() * tile.columns);
    kernels().largest(a);
  });
  for (int64_t r = 0; r < logits.rows(); ++r)
    if (!std::isfinite(values[r * count])) std::fill_n(ids + r * count, count, -1);
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore::capi;

dlcore_status dlcore_sphere_velocity(const dlcore_logits* logits, const dlcore_matrix* x,
                                     const dlcore_matrix* table, dlcore_doubles kappa, float* velocity,
                                     float* along, double* logsumexp, int32_t threads) {
  return guarded(__func__, [&] {
    dlcore::capi::velocity(Drift(logits, x, table, kappa, threads), velocity, along, logsumexp);
  });
}

dlcore_status dlcore_sphere_velocity_backward(const dlcore_logits* logits, const dlcore_matrix* x,
                                              const dlcore_matrix* table, dlcore_doubles kappa,
                                              const float* grad, const float* velocity, const float* along,
                                              const double* logsumexp, const dlcore_logits_grad* logits_grad,
                                              void* x_grad, void* table_grad, int32_t threads) {
  return guarded(__func__, [&] {
    const Drift drift(logits, x, table, kappa, threads);
    velocity_backward(drift, static_cast<dlcore::DType>(x->dtype),
                      {grad, velocity, along, logsumexp, x_grad, table_grad}, logits_grad);
  });
}

dlcore_status dlcore_sphere_largest(const dlcore_logits* logits, int64_t count, int64_t* ids,
                                    int32_t threads) {
  return guarded(__func__,
                 [&] { largest(Logits("logits", pointed("logits", logits), threads), count, ids); });
}
