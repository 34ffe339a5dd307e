// The running reference of each row is its largest logit so far.
#include "weighing.h"

#include <cmath>

namespace dlcore::capi {

View table_of(const dlcore_matrix* table, int64_t vocab) {
  const View v = view("table", table);
  if (v.rows != vocab)
    refuse(DLCORE_INVALID_SHAPE, "table->rows must be the vocabulary, ", vocab, ", got ", v.rows);
  return v;
}

Weighing::Weighing(const Rows& rows, int64_t columns, const ScanArguments& scan, float* sums)
    : rows_(rows),
      columns_(columns),
      scan_(scan),
      sums_(sums),
      references_(room<double>(2 * rows.rows())),
      factor_(room<float>(rows.rows())),
      weights_(room<float>(rows.rows() * std::min(rows.logits.tile_width(), rows.logits.vocab()))) {
  std::fill_n(sums, product("mean", {rows.rows(), columns}), 0.0f);
}

void Weighing::scan(int64_t first, const View& tile) {
  rows_.scan(scan_, first, tile);
  if (follow_largest(scan_.state, rows_.rows(), first == 0, references_.get(), factor_.get())) scale();
}

View Weighing::probabilities(int64_t first, const View& tile) const {
  SoftmaxTileArguments s;
  s.logits = tile;
  s.first_token = first;
  s.softmax = rows_.softmax_tiles;
  s.logsumexp = references();
  s.out = result(weights_.get(), DType::kFloat32, rows_.rows(), tile.columns);
  s.threads = rows_.logits.threads(rows_.rows() * tile.columns);
  kernels().softmax_tile(s);
  return s.out;
}

void Weighing::logsumexp(double nothing, double* out) const {
  finish_logsumexp(scan_.state, rows_.rows(), nothing, out);
}

void Weighing::finish(double* wanted) {
  const int64_t rows = rows_.rows();
  const auto own = wanted ? nullptr : room<double>(rows);
  double* lse = wanted ? wanted : own.get();
  logsumexp(-kInfinity, lse);
  // NaN where there is nothing but -inf.
  for (int64_t r = 0; r < rows; ++r) factor_[r] = static_cast<float>(std::exp(references_[r] - lse[r]));
  scale();
}

void Weighing::scale() {
  for (int64_t i = 0; i < rows_.rows() * columns_; ++i) sums_[i] *= factor_[i / columns_];
}

}  // namespace dlcore::capi
