// Gradients of dense logits are written where they belong; a head's come by products with its tiles'.
#include "gradients.h"

#include "halves.h"

namespace dlcore::capi {

Gradient::Gradient(const char* name, const Logits& logits, const dlcore_logits_grad* out)
    : logits_(logits), out_(pointed(name, out)) {
  needed((std::string(name) + "->values").c_str(), out_.values, logits.rows());
  if (!logits.weight().data && out_.weight)
    refuse(DLCORE_INVALID_VALUE, name, "->weight must be NULL without a weight");
  if (!logits.biased() && out_.bias) refuse(DLCORE_INVALID_VALUE, name, "->bias must be NULL without a bias");
  if (logits.dense()) return;
  const int64_t depth = logits.weight().columns, width = std::min(logits.tile_width(), logits.vocab());
  hidden_.resize(static_cast<size_t>(product(name, {logits.rows(), depth})));
  tile_ = room<float>(product(name, {logits.rows(), width}));
  if (out_.weight) weight_ = room<float>(product(name, {width, depth}));
}

View Gradient::tile(int64_t first, int64_t tokens) const {
  const int64_t rows = logits_.rows();
  if (!logits_.dense()) return result(tile_.get(), DType::kFloat32, rows, tokens);
  return columns_of(result(out_.values, logits_.dtype(), rows, logits_.vocab()), first, tokens);
}

void Gradient::add(int64_t first, const View& gradient) {
  if (logits_.dense()) return;
  const int64_t tokens = gradient.columns, depth = logits_.weight().columns;
  const View weight = rows_of(logits_.weight(), first, tokens);
  logits_.multiply(gradient, Order::kAsIs, weight, Order::kAsIs, hidden_.data(), true);
  const auto at = [&](void* out, int64_t size) {
    return static_cast<char*>(out) + first * size * size_of(logits_.dtype());
  };
  if (out_.weight) {
    logits_.multiply(gradient, Order::kTransposed, logits_.hidden(), Order::kAsIs, weight_.get(), false);
    narrow(logits_.dtype(), weight_.get(), tokens * depth, at(out_.weight, depth));
  }
  if (!out_.bias) return;
  std::vector<float> sums(static_cast<size_t>(tokens));
  for (int64_t r = 0; r < gradient.rows; ++r)
    for (int64_t k = 0; k < tokens; ++k) sums[static_cast<size_t>(k)] += gradient.row<const float>(r)[k];
  narrow(logits_.dtype(), sums.data(), tokens, at(out_.bias, 1));
}

void Gradient::finish() const {
  if (logits_.dense()) return;
  narrow(logits_.dtype(), hidden_.data(), static_cast<int64_t>(hidden_.size()),
         static_cast<char*>(out_.values));
}

}  // namespace dlcore::capi
