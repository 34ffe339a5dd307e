// The categorical arguments of the C API as the kernels take them.
#pragma once

#include "logits.h"

namespace dlcore::capi {

// What every function takes of a dlcore_categorical, checked; `greedy`: temperature 0 is taken.
struct Rows {
  Rows(const dlcore_categorical* a, bool greedy);

  int64_t rows() const { return logits.rows(); }

  // One read of the logits into summaries (rows); `scan` says what is wanted beside.
  void scan(ScanArguments scan) const;

  Logits logits;
  Softmax softmax;        // of logits as they are
  Softmax softmax_tiles;  // of `tiles`: a head's come softcapped
  float softcap;          // of a head's tiles

 private:
  Rows(const dlcore_categorical& a, bool greedy);
};

// Kept summaries of rows that are scanned.
using Summaries = std::vector<Summary>;

}  // namespace dlcore::capi
