// Soft embeddings: the softmax's mean of a table's rows, with or without a draw, and its gradient.
#include <cmath>

#include "gradients.h"
#include "halves.h"
#include "weighing.h"

namespace dlcore::capi {
namespace {

// The means of a table's rows; logsumexp may not be wanted.
void weigh(const Rows& a, const View& table, const ScanArguments& scan, float* mean, double* logsumexp) {
  Weighing weighing(a, table.columns, scan, mean);
  a.logits.pieces(a.softcap, [&](int64_t first, const View& tile) {
    weighing.scan(first, tile);
    const View tokens = rows_of(table, first, tile.columns);
    a.logits.multiply(weighing.probabilities(first, tile), Order::kAsIs, tokens, Order::kAsIs, mean, true);
  });
  weighing.finish(logsumexp);
}

// With p the softmax and g the gradient of the mean: d/da_k = p_k (g · table_k - g · mean) / temperature.
class ExpectationBackward {
 public:
  ExpectationBackward(const Rows& rows, const View& table, const float* grad, const float* mean,
                      const double* logsumexp, void* table_grad)
      : rows_(rows),
        table_(table),
        grad_(result(const_cast<float*>(grad), DType::kFloat32, rows.rows(), table.columns)),
        logsumexp_(logsumexp),
        table_grad_(static_cast<char*>(table_grad)),
        level_(static_cast<size_t>(rows.rows())) {
    const int64_t width = std::min(rows.logits.tile_width(), rows.logits.vocab());
    p_ = room<float>(product("logits", {rows.rows(), width}));
    pull_ = room<float>(rows.rows() * width);
    if (table_grad) rows_grad_ = room<float>(product("table", {width, table.columns}));
    for (int64_t i = 0; i < rows.rows() * table.columns; ++i)
      level_[static_cast<size_t>(i / table.columns)] += grad[i] * mean[i];
  }

  // Of the tile of logits at a token, into `out`.
  void operator()(int64_t first, const View& tile, const View& out) {
    const Logits& logits = rows_.logits;
    const View p = probabilities(first, tile), tokens = rows_of(table_, first, tile.columns);
    if (table_grad_) {
      logits.multiply(p, Order::kTransposed, grad_, Order::kAsIs, rows_grad_.get(), false);
      narrow(table_.dtype, rows_grad_.get(), tile.columns * table_.columns,
             table_grad_ + first * table_.columns * size_of(table_.dtype));
    }
    logits.multiply(grad_, Order::kAsIs, tokens, Order::kTransposed, pull_.get(), false);
    std::vector<float> x(static_cast<size_t>(tile.columns));
    for (int64_t r = 0; r < rows_.rows(); ++r) {
      float* pull = pull_.get() + r * tile.columns;
      widen(tile.dtype, bytes(tile, r), tile.columns, x.data());
      differentiate(r, first, p.row<const float>(r), x, pull);
      narrow(out.dtype, pull, tile.columns, bytes(out, r));
    }
  }

 private:
  static char* bytes(const View& v, int64_t r) { return v.data + r * v.lead_stride[0] * size_of(v.dtype); }

  View probabilities(int64_t first, const View& tile) const {
    SoftmaxTileArguments s;
    s.logits = tile;
    s.first_token = first;
    s.softmax = rows_.softmax;
    s.logsumexp = logsumexp_;
    s.out = result(p_.get(), DType::kFloat32, rows_.rows(), tile.columns);
    s.threads = rows_.logits.threads(rows_.rows() * tile.columns);
    kernels().softmax_tile(s);
    return s.out;
  }

  void differentiate(int64_t r, int64_t first, const float* p, const std::vector<float>& x,
                     float* pull) const {
    const Softmax& softmax = rows_.softmax;
    const float inverse = softmax.temperature ? 1 / softmax.temperature[r] : 1;
    for (size_t k = 0; k < x.size(); ++k) {
      pull[k] = (pull[k] - level_[static_cast<size_t>(r)]) * p[k] * inverse;
      if (softmax.softcap == 0) continue;
      const float tanh = std::tanh(x[k] / softmax.softcap);
      pull[k] *= 1 - tanh * tanh;
    }
    const int64_t excluded = softmax.exclude - first;
    if (excluded >= 0 && excluded < static_cast<int64_t>(x.size())) pull[excluded] = 0;
  }

  const Rows& rows_;
  View table_, grad_;
  const double* logsumexp_;
  char* table_grad_;
  std::vector<float> level_;
  std::unique_ptr<float[]> p_, pull_, rows_grad_;
};

void expectation_backward(const Rows& rows, const View& table, const float* grad, const float* mean,
                          const double* logsumexp, const dlcore_logits_grad* logits_grad, void* table_grad) {
  needed("grad", grad, rows.rows());
  needed("mean", mean, rows.rows());
  needed("logsumexp", logsumexp, rows.rows());
  Gradient gradient("logits_grad", rows.logits, logits_grad);
  ExpectationBackward backward(rows, table, grad, mean, logsumexp, table_grad);
  rows.logits.pieces(0, [&](int64_t first, const View& tile) {
    const View out = gradient.tile(first, tile.columns);
    backward(first, tile, out);
    gradient.add(first, out);
  });
  gradient.finish();
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore;
using namespace dlcore::capi;

dlcore_status dlcore_categorical_expectation(const dlcore_categorical* softmax, const dlcore_matrix* table,
                                             float* mean, double* logsumexp) {
  return guarded(__func__, [&] {
    const Rows a(softmax, false);
    const View rows = table_of(table, a.logits.vocab());
    needed("mean", mean, a.rows());
    Summaries state(static_cast<size_t>(a.rows()));
    ScanArguments read;
    read.state = state.data();
    weigh(a, rows, read, mean, logsumexp);
  });
}

dlcore_status dlcore_categorical_sample_expectation(const dlcore_categorical* softmax,
                                                    const dlcore_matrix* table, dlcore_keys keys, float* mean,
                                                    double* logsumexp, int64_t* tokens, int64_t* argmax,
                                                    float* numbers) {
  return guarded(__func__, [&] {
    const Rows a(softmax, false);
    const View rows = table_of(table, a.logits.vocab());
    ScanArguments draw;
    draw.keys = capi::keys(keys, a.rows());
    needed("mean", mean, a.rows());
    needed("tokens", tokens, a.rows());
    Summaries state(static_cast<size_t>(a.rows()));
    draw.state = state.data();
    weigh(a, rows, draw, mean, logsumexp);
    write_draw(state.data(), state.data(), a.rows(), tokens, argmax, numbers);
  });
}

dlcore_status dlcore_categorical_expectation_backward(const dlcore_categorical* softmax,
                                                      const dlcore_matrix* table, const float* grad,
                                                      const float* mean, const double* logsumexp,
                                                      const dlcore_logits_grad* logits_grad,
                                                      void* table_grad) {
  return guarded(__func__, [&] {
    const Rows a(softmax, false);
    const View rows = table_of(table, a.logits.vocab());
    expectation_backward(a, rows, grad, mean, logsumexp, logits_grad, table_grad);
  });
}
