// Soft embeddings: the softmax's mean of a table's rows, with or without a draw.
#include <cmath>

#include "categorical.h"

namespace dlcore::capi {
namespace {

// A table (V, E), of whatever dtype.
View table_of(const dlcore_matrix* table, int64_t vocab) {
  const View v = view("table", table);
  if (v.rows != vocab)
    refuse(DLCORE_INVALID_SHAPE, "table->rows must be the vocabulary, ", vocab, ", got ", v.rows);
  return v;
}

// mean (rows, E) += weights (rows, n) · table[first, first + n).
void add_rows(const View& weights, const View& table, int64_t first, float* mean, const Logits& logits) {
  MatmulArguments m;
  m.a = weights.row<const float>(0);
  m.a_stride = m.depth = weights.columns;
  m.b = table.data + first * table.lead_stride[0] * size_of(table.dtype);
  m.b_dtype = table.dtype;
  m.b_stride = table.lead_stride[0];
  m.out = mean;
  m.out_stride = m.columns = table.columns;
  m.rows = weights.rows;
  m.add = true;
  m.threads = logits.threads(weights.rows * weights.columns / 16 * table.columns);
  kernels().matmul(m);
}

void scale_rows(float* mean, int64_t rows, int64_t columns, const float* factor) {
  for (int64_t i = 0; i < rows * columns; ++i) mean[i] *= factor[i / columns];
}

// Every logit is computed once: what is summed refers to the largest one so far, and is scaled down when a
// larger one appears.
void weigh(const Rows& a, const View& table, ScanArguments scan, float* mean) {
  const int64_t rows = a.rows();
  std::fill_n(mean, product("mean", {rows, table.columns}), 0.0f);
  const auto references = room<double>(2 * rows), logsumexp = room<double>(rows);
  const auto factor = room<float>(rows);
  const auto weights = room<float>(rows * std::min(a.logits.tile_width(), a.logits.vocab()));
  a.logits.pieces(a.softcap, [&](int64_t first, const View& tile) {
    a.scan(scan, first, tile);
    if (follow_largest(scan.state, rows, first == 0, references.get(), factor.get()))
      scale_rows(mean, rows, table.columns, factor.get());
    SoftmaxTileArguments s;
    s.logits = tile;
    s.first_token = first;
    s.softmax = a.softmax_tiles;
    s.logsumexp = references.get() + rows;
    s.out = result(weights.get(), DType::kFloat32, rows, tile.columns);
    s.threads = a.logits.threads(rows * tile.columns);
    kernels().softmax_tile(s);
    add_rows(s.out, table, first, mean, a.logits);
  });
  finish_logsumexp(scan.state, rows, logsumexp.get());
  for (int64_t r = 0; r < rows; ++r)
    factor[r] = static_cast<float>(std::exp(references[rows + r] - logsumexp[r]));
  scale_rows(mean, rows, table.columns, factor.get());
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore::capi;

dlcore_status dlcore_categorical_expectation(const dlcore_categorical* softmax, const dlcore_matrix* table,
                                             float* mean) {
  return guarded(__func__, [&] {
    const Rows a(softmax, false);
    const dlcore::View rows = table_of(table, a.logits.vocab());
    needed("mean", mean, a.rows());
    Summaries state(static_cast<size_t>(a.rows()));
    dlcore::ScanArguments read;
    read.state = state.data();
    weigh(a, rows, read, mean);
  });
}

dlcore_status dlcore_categorical_sample_expectation(const dlcore_categorical* softmax,
                                                    const dlcore_matrix* table, dlcore_keys keys, float* mean,
                                                    int64_t* tokens, int64_t* argmax, float* numbers) {
  return guarded(__func__, [&] {
    const Rows a(softmax, false);
    const dlcore::View rows = table_of(table, a.logits.vocab());
    dlcore::ScanArguments draw;
    draw.keys = dlcore::capi::keys(keys, a.rows());
    needed("mean", mean, a.rows());
    needed("tokens", tokens, a.rows());
    Summaries state(static_cast<size_t>(a.rows()));
    draw.state = state.data();
    weigh(a, rows, draw, mean);
    write_draw(state.data(), state.data(), a.rows(), tokens, argmax, numbers);
  });
}
