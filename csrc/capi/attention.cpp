// Attention over key intervals and its gradient, and a step against a cache.
#include <algorithm>
#include <cmath>

#include "heads.h"

namespace dlcore::capi {
namespace {

// Fewer products than this are not worth waking another thread.
constexpr int64_t kSerial = 1 << 18;
// Positions fit int32.
constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();

void check_sizes(const dlcore_attention& a) {
  dtype_of(a.dtype);
  const auto within = [](const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
      refuse(DLCORE_INVALID_SHAPE, name, " must lie in [", low, ", ", high, "], got ", value);
  };
  at_least("batch", a.batch, 0);
  within("rows", a.rows, 0, kMostRows);
  within("keys", a.keys, 0, kMostRows);
  at_least("heads", a.heads, 1);
  at_least("kv_heads", a.kv_heads, 1);
  if (a.heads % a.kv_heads != 0)
    refuse(DLCORE_INVALID_SHAPE, "heads must be a multiple of kv_heads, ", a.kv_heads, ", got ", a.heads);
  within("head_dim", a.head_dim, 1, kMaxHeadDim);
  within("value_dim", a.value_dim, 0, kMaxHeadDim);
  in_range("scale", a.scale, -kLargest, kLargest);
  in_range("softcap", a.softcap, 0, kLargest);
}

// Sizes, queries, parameters and results.
void start(AttentionArguments& to, const dlcore_attention* attention, void* out, float* lse) {
  const dlcore_attention& a = pointed("attention", attention);
  check_sizes(a);
  const auto dtype = static_cast<DType>(a.dtype);
  to.batch = a.batch, to.rows = a.rows, to.keys = a.keys, to.heads = a.heads, to.kv_heads = a.kv_heads;
  to.head_dim = a.head_dim, to.value_dim = a.value_dim == 0 ? a.head_dim : a.value_dim;
  to.q = heads("q", a.q, dtype, {to.batch, to.rows, to.heads, to.head_dim});
  const Shape result{to.batch, to.rows, to.heads, to.value_dim};
  const int64_t size = product("out", {result.batch, result.rows, result.heads, result.columns});
  needed("out", out, size);
  needed("lse", lse, size);
  to.out = contiguous(out, dtype, result);
  to.lse = lse;
  to.scale = a.scale == 0 ? static_cast<float>(std::pow(static_cast<double>(a.head_dim), -0.5)) : a.scale;
  to.softcap = a.softcap;
}

int threads_of(const AttentionArguments& a, int32_t asked) {
  // Of scores: a product per number of q and key. threads_for knows another limit, that of elements read.
  const bool small =
      static_cast<double>(a.batch * a.rows * a.heads * a.head_dim) * static_cast<double>(a.keys) <
      static_cast<double>(kSerial);
  return threads_for(asked, small ? 0 : std::numeric_limits<int64_t>::max());
}

void check_intervals(const AttentionArguments& a) {
  for (int64_t i = 0; i < (a.shared_bounds ? std::min<int64_t>(a.batch, 1) : a.batch) * a.rows; ++i) {
    const int32_t *start = a.starts + 2 * i, *stop = a.stops + 2 * i;
    for (int k = 0; k < 2; ++k) {
      in_range("starts", start[k], 0, static_cast<double>(a.keys));
      in_range("stops", stop[k], 0, static_cast<double>(a.keys));
    }
    const bool both = start[0] < stop[0] && start[1] < stop[1];
    if (both && std::max(start[0], start[1]) < std::min(stop[0], stop[1]))
      refuse(DLCORE_INVALID_VALUE, "the two intervals of a row must not overlap");
  }
}

// What attention and its gradient take; false if there is nothing to do.
bool start_intervals(AttentionArguments& a, const dlcore_attention* attention, const int32_t* starts,
                     const int32_t* stops, int32_t shared_bounds, void* out, float* lse) {
  start(a, attention, out, lse);
  a.k = heads("k", attention->k, a.q.dtype, {a.batch, a.keys, a.kv_heads, a.head_dim});
  a.v = heads("v", attention->v, a.q.dtype, {a.batch, a.keys, a.kv_heads, a.value_dim});
  one_of("shared_bounds", shared_bounds, 2);
  a.shared_bounds = shared_bounds != 0;
  const int64_t rows = a.batch * a.rows;
  needed("starts", starts, rows);
  needed("stops", stops, rows);
  a.starts = starts;
  a.stops = stops;
  check_intervals(a);
  a.threads = threads_of(a, attention->threads);
  return rows > 0;
}

void intervals(const dlcore_attention* attention, const int32_t* starts, const int32_t* stops,
               int32_t shared_bounds, void* out, float* lse) {
  AttentionArguments a;
  if (start_intervals(a, attention, starts, stops, shared_bounds, out, lse)) kernels().attention(a);
}

void intervals_backward(const dlcore_attention* attention, const int32_t* starts, const int32_t* stops,
                        int32_t shared_bounds, const void* out, const float* lse, const void* grad,
                        const float* grad_lse, void* q_grad, void* k_grad, void* v_grad) {
  AttentionBackwardArguments a;
  const bool any = start_intervals(a, attention, starts, stops, shared_bounds, const_cast<void*>(out),
                                   const_cast<float*>(lse));
  const DType dtype = a.q.dtype;
  const Shape keys{a.batch, a.keys, a.kv_heads, a.head_dim}, values{a.batch, a.keys, a.kv_heads, a.value_dim};
  const int64_t queries = a.batch * a.rows, seen = a.batch * a.keys;
  needed("grad", grad, queries);
  needed("grad_lse", grad_lse, queries);
  needed("q_grad", q_grad, queries);
  needed("k_grad", k_grad, seen);
  needed("v_grad", v_grad, seen);
  a.grad_out = contiguous(const_cast<void*>(grad), dtype, {a.batch, a.rows, a.heads, a.value_dim});
  a.grad_lse = grad_lse;
  a.grad_q = contiguous(q_grad, dtype, {a.batch, a.rows, a.heads, a.head_dim});
  a.grad_k = contiguous(k_grad, dtype, keys);
  a.grad_v = contiguous(v_grad, dtype, values);
  if (any || seen > 0) kernels().attention_backward(a);
}

void check_cache(const dlcore_cache& c, const AttentionArguments& a) {
  at_least("max_len", c.max_len, 0);
  check_pages(c.page_table, a.batch, c.pages, c.page_size, c.num_pages);
  if (c.page_table && c.max_len > c.pages * c.page_size)
    refuse(DLCORE_INVALID_SHAPE, "max_len must be at most pages·page_size, ", c.pages * c.page_size, ", got ",
           c.max_len);
  needed("lengths", c.lengths, a.batch);
  for (int64_t b = 0; b < a.batch; ++b) {
    if (c.lengths[b] < 0) refuse(DLCORE_INVALID_VALUE, "lengths must be at least 0, got ", c.lengths[b]);
    if (c.lengths[b] + a.rows > c.max_len)
      refuse(DLCORE_INVALID_VALUE, "the cache is full: max_len is ", c.max_len, ", ", c.lengths[b] + a.rows,
             " are needed");
  }
  if (c.num_commit < 0 || c.num_commit > a.rows)
    refuse(DLCORE_INVALID_VALUE, "num_commit must lie in [0, ", a.rows, "], got ", c.num_commit);
  if (c.window < 0 || c.window > kMostRows)
    refuse(DLCORE_INVALID_VALUE, "window must lie in [0, ", kMostRows, "], got ", c.window);
  one_of("window_by_row", c.window_by_row, 2);
  one_of("shared_causal", c.shared_causal, 2);
}

void decode(const dlcore_attention* attention, const dlcore_cache* cache, void* out, float* lse) {
  AttentionDecodeArguments a;
  start(a, attention, out, lse);
  const dlcore_cache& c = pointed("cache", cache);
  const DType dtype = a.q.dtype;
  a.new_k = heads("k", attention->k, dtype, {a.batch, a.rows, a.kv_heads, a.head_dim});
  a.new_v = heads("v", attention->v, dtype, {a.batch, a.rows, a.kv_heads, a.value_dim});
  check_cache(c, a);
  const int64_t sequences = c.page_table ? c.num_pages : a.batch,
                length = c.page_table ? c.page_size : c.max_len;
  needed("cache->keys", c.keys, product("cache->keys", {sequences, length, a.kv_heads, a.head_dim}));
  needed("cache->values", c.values, product("cache->values", {sequences, length, a.kv_heads, a.value_dim}));
  a.k = contiguous(c.keys, dtype, {sequences, length, a.kv_heads, a.head_dim});
  a.v = contiguous(c.values, dtype, {sequences, length, a.kv_heads, a.value_dim});
  a.keys = c.max_len;
  if (c.page_table) {
    a.pages = {c.page_table, c.pages, c.page_size};
    a.keys = c.pages * c.page_size;
  }
  if (a.keys > kMostRows)
    refuse(DLCORE_INVALID_SHAPE, "max_len must be at most ", kMostRows, ", got ", a.keys);
  a.lengths = c.lengths;
  a.num_commit = c.num_commit;
  // As the kernels read them: whatever is not 0 is true.
  const int64_t flags = c.shared_causal ? std::min<int64_t>(a.batch, 1) : a.batch;
  const auto causal = room<bool>(flags);
  if (c.causal) {
    std::transform(c.causal, c.causal + flags, causal.get(), [](uint8_t flag) { return flag != 0; });
    a.causal = causal.get();
    a.shared_causal = c.shared_causal != 0;
  }
  a.window = c.window;
  a.window_by_row = c.window_by_row != 0;
  a.threads = threads_of(a, attention->threads);
  if (a.batch * a.rows > 0) attention_decode(a);
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore;

dlcore_status dlcore_attention_intervals(const dlcore_attention* attention, const int32_t* starts,
                                         const int32_t* stops, int32_t shared_bounds, void* out, float* lse) {
  return capi::guarded(__func__, [&] { capi::intervals(attention, starts, stops, shared_bounds, out, lse); });
}

dlcore_status dlcore_attention_decode(const dlcore_attention* attention, const dlcore_cache* cache, void* out,
                                      float* lse) {
  return capi::guarded(__func__, [&] { capi::decode(attention, cache, out, lse); });
}

dlcore_status dlcore_attention_intervals_backward(const dlcore_attention* attention, const int32_t* starts,
                                                  const int32_t* stops, int32_t shared_bounds,
                                                  const void* out, const float* lse, const void* grad,
                                                  const float* grad_lse, void* q_grad, void* k_grad,
                                                  void* v_grad) {
  return capi::guarded(__func__, [&] {
    capi::intervals_backward(attention, starts, stops, shared_bounds, out, lse, grad, grad_lse, q_grad,
                             k_grad, v_grad);
  });
}
