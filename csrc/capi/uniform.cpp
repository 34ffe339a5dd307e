// The uniform-state NELBO, and its gradient.
#include "categorical.h"
#include "gradients.h"

namespace dlcore::capi {
namespace {

// What the loss and its gradient take beside the logits, checked.
struct Levels {
  Levels(const Rows& rows, const int64_t* x, const dlcore_doubles& at, const dlcore_doubles& by) {
    const int64_t count = rows.rows();
    if (rows.softmax.temperature || rows.softcap != 0 || rows.softmax.exclude >= 0)
      refuse(DLCORE_INVALID_VALUE, "temperature, softcap and exclude must be none");
    needed("index", rows.softmax.index.data, count);
    needed("x", x, count);
    token_ids("x", x, count, rows.logits.vocab());
    constexpr double least = std::numeric_limits<double>::denorm_min(), most = 1 - 0x1p-53;
    alpha = needed_per_row("alpha", at, count, least, most);
    dalpha = needed_per_row("dalpha", by, count, -kMost, 0);
  }

  PerRow<double> alpha, dalpha;
};

void nelbo(const Rows& rows, const int64_t* x, const Levels& levels, float* loss, double* saved) {
  const int64_t count = rows.rows(), vocab = rows.logits.vocab();
  needed("loss", loss, count);
  const auto own = saved ? nullptr : room<double>(5 * count);
  if (!saved) saved = own.get();
  std::fill_n(saved, 5 * count, 0.0);
  NelboArguments a;
  a.vocab = vocab;
  a.softmax = rows.softmax;
  a.alpha = levels.alpha;
  a.saved = saved;
  // A dense row is scanned and summed at once; a head's tiles are scanned first, then made again.
  a.scan = rows.logits.dense();
  a.target = {x, 1};
  if (!a.scan) {
    Summaries state(static_cast<size_t>(count));
    ScanArguments read;
    read.target = a.target;
    read.state = state.data();
    rows.scan(read);
    for (int64_t r = 0; r < count; ++r) start_nelbo(state[static_cast<size_t>(r)], r, count, saved);
  }
  rows.logits.tiles(0, [&](int64_t first, const View& tile) {
    a.logits = tile;
    a.first_token = first;
    a.threads = rows.logits.threads(count * tile.columns);
    kernels().nelbo(a);
  });
  finish_nelbo(saved, count, vocab, rows.softmax.index.data, x, levels.alpha, levels.dalpha, loss);
}

void nelbo_backward(const Rows& rows, const int64_t* x, const Levels& levels, const float* grad,
                    const double* saved, const dlcore_logits_grad* logits_grad) {
  NelboBackwardArguments a;
  needed("grad", grad, rows.rows());
  needed("saved", saved, rows.rows());
  Gradient gradient("logits_grad", rows.logits, logits_grad);
  a.vocab = rows.logits.vocab();
  a.softmax = rows.softmax;
  a.z = rows.softmax.index.data;
  a.x = x;
  a.alpha = levels.alpha;
  a.dalpha = levels.dalpha;
  a.grad = grad;
  a.saved = saved;
  rows.logits.tiles(0, [&](int64_t first, const View& tile) {
    a.logits = tile;
    a.first_token = first;
    a.out = gradient.tile(first, tile.columns);
    a.threads = rows.logits.threads(rows.rows() * tile.columns);
    kernels().nelbo_backward(a);
    gradient.add(first, a.out);
  });
  gradient.finish();
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore::capi;

dlcore_status dlcore_uniform_nelbo(const dlcore_categorical* softmax, const int64_t* x, dlcore_doubles alpha,
                                   dlcore_doubles dalpha, float* loss, double* saved) {
  return guarded(__func__, [&] {
    const Rows rows(softmax, false);
    nelbo(rows, x, Levels(rows, x, alpha, dalpha), loss, saved);
  });
}

dlcore_status dlcore_uniform_nelbo_backward(const dlcore_categorical* softmax, const int64_t* x,
                                            dlcore_doubles alpha, dlcore_doubles dalpha, const float* grad,
                                            const double* saved, const dlcore_logits_grad* logits_grad) {
  return guarded(__func__, [&] {
    const Rows rows(softmax, false);
    nelbo_backward(rows, x, Levels(rows, x, alpha, dalpha), grad, saved, logits_grad);
  });
}
