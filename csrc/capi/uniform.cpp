// The uniform-state NELBO.
#include "categorical.h"

namespace dlcore::capi {
namespace {

void nelbo(const Rows& rows, const int64_t* x, const dlcore_doubles& alpha, const dlcore_doubles& dalpha,
           float* loss) {
  const int64_t count = rows.rows(), vocab = rows.logits.vocab();
  const int64_t* z = rows.softmax.index.data;
  if (rows.softmax.temperature || rows.softcap != 0 || rows.softmax.exclude >= 0)
    refuse(DLCORE_INVALID_VALUE, "temperature, softcap and exclude must be none");
  needed("index", z, count);
  needed("x", x, count);
  token_ids("x", x, count, vocab);
  constexpr double least = std::numeric_limits<double>::denorm_min(), most = 1 - 0x1p-53;
  NelboArguments a;
  a.alpha = needed_per_row("alpha", alpha, count, least, most);
  const auto slope = needed_per_row("dalpha", dalpha, count, -kMost, 0);
  needed("loss", loss, count);
  std::vector<double> saved(static_cast<size_t>(5 * count));
  a.vocab = vocab;
  a.softmax = rows.softmax;
  a.saved = saved.data();
  // A dense row is scanned and summed at once; a head's tiles are scanned first, then made again.
  a.scan = rows.logits.dense();
  a.target = {x, 1};
  if (!a.scan) {
    Summaries state(static_cast<size_t>(count));
    ScanArguments read;
    read.target = a.target;
    read.state = state.data();
    rows.scan(read);
    for (int64_t r = 0; r < count; ++r) start_nelbo(state[static_cast<size_t>(r)], r, count, saved.data());
  }
  rows.logits.tiles(0, [&](int64_t first, const View& tile) {
    a.logits = tile;
    a.first_token = first;
    a.threads = rows.logits.threads(count * tile.columns);
    kernels().nelbo(a);
  });
  finish_nelbo(saved.data(), count, vocab, z, x, a.alpha, slope, loss);
}

}  // namespace
}  // namespace dlcore::capi

dlcore_status dlcore_uniform_nelbo(const dlcore_categorical* softmax, const int64_t* x, dlcore_doubles alpha,
                                   dlcore_doubles dalpha, float* loss) {
  using namespace dlcore::capi;
  return guarded(__func__, [&] { nelbo(Rows(softmax, false), x, alpha, dalpha, loss); });
}
