// Sums over the vocabulary, weighed with softmax, from one computation of each logit: what is summed refers
// to the largest logit so far, and is scaled down when a larger one appears.
#pragma once

#include "categorical.h"

namespace dlcore::capi {

// A table (V, E), of whatever dtype.
View table_of(const dlcore_matrix* table, int64_t vocab);

class Weighing {
 public:
  // sums (rows, columns) begin as zeros; `scan` says where the summaries go, and what else is wanted.
  Weighing(const Rows& rows, int64_t columns, const ScanArguments& scan, float* sums);

  // Brings summaries and sums up to this tile.
  void scan(int64_t first, const View& tile);
  // exp(logits - references) of it, (rows, columns) floats until the next tile.
  View probabilities(int64_t first, const View& tile) const;
  const double* references() const { return references_.get() + rows_.rows(); }
  // The logits' (rows), once all tiles are in; `nothing` where there is nothing but -inf.
  void logsumexp(double nothing, double* out) const;
  // Makes them the sums that are weighed with softmax itself; logsumexp (rows) may be null.
  void finish(double* logsumexp);

 private:
  void scale();

  const Rows& rows_;
  int64_t columns_;
  ScanArguments scan_;
  float* sums_;
  std::unique_ptr<double[]> references_;
  std::unique_ptr<float[]> factor_, weights_;
};

}  // namespace dlcore::capi
