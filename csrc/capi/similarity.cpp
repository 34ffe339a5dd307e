// How much rows of a cache differ from fresh ones.
#include "heads.h"

namespace dlcore::capi {
namespace {

void cosine(const dlcore_similarity& s, float* out) {
  const DType dtype = dtype_of(s.dtype);
  at_least("batch", s.batch, 0);
  at_least("rows", s.rows, 0);
  at_least("cached_rows", s.cached_rows, 0);
  at_least("heads", s.heads, 1);
  at_least("columns", s.columns, 1);
  check_pages(s.page_table, s.batch, s.pages, s.page_size, s.num_pages);
  CosineArguments a;
  a.batch = s.batch, a.rows = s.rows, a.heads = s.heads, a.columns = s.columns;
  a.cached_rows = s.page_table ? s.pages * s.page_size : s.cached_rows;
  a.fresh = heads("fresh", s.fresh, dtype, {s.batch, s.rows, s.heads, s.columns});
  if (s.page_table) {
    a.cached = heads("cached", s.cached, dtype, {s.num_pages, s.page_size, s.heads, s.columns});
    a.pages = {s.page_table, s.pages, s.page_size};
  } else {
    a.cached = heads("cached", s.cached, dtype, {s.batch, s.cached_rows, s.heads, s.columns});
  }
  a.positions = s.positions;
  needed("out", out, s.batch * s.rows);
  a.out = out;
  a.threads = threads_for(s.threads, s.batch * s.rows * s.heads * s.columns);
  kernels().row_cosine(a);
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore::capi;

dlcore_status dlcore_similarity_cosine(const dlcore_similarity* rows, float* out) {
  return guarded(__func__, [&] { cosine(pointed("rows", rows), out); });
}
