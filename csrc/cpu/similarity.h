// How much rows of a cache differ from fresh ones.
#pragma once

#include "attention.h"

namespace dlcore {

// out (batch, rows) <- the cosine between each fresh row, all heads together, and the cached one at its
// position; NaN where that lies outside of the cache.
struct CosineArguments {
  int64_t batch = 0, rows = 0, cached_rows = 0, heads = 0, columns = 0;
  Heads fresh, cached;
  Pages pages;                         // of the cached rows
  const int64_t* positions = nullptr;  // (batch, rows), or null: row r is compared with cached row r
  float* out = nullptr;
  int threads = 1;
};

}  // namespace dlcore
