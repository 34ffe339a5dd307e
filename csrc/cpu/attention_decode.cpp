// A step against a cache: rows written, intervals made, attention run.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace dlcore {
namespace {

// Fewer numbers than this are not worth waking another thread.
constexpr int64_t kSerial = 1 << 14;

// A new row of all heads, to where it belongs in the cache.
template <class T>
void write_row(const AttentionDecodeArguments& a, const Heads& from, const Heads& to, int64_t dim,
               int64_t batch, int64_t row) {
  int64_t sequence = batch, at = a.lengths[batch] + row;
  if (a.pages.table) {
    sequence = a.pages.table[batch * a.pages.pages + at / a.pages.page_size];
    at %= a.pages.page_size;
  }
  const bool together = from.head_stride == dim && to.head_stride == dim;
  const int64_t heads = together ? 1 : a.kv_heads, columns = together ? a.kv_heads * dim : dim;
  for (int64_t head = 0; head < heads; ++head)
    std::memmove(to.at<T>(sequence, at, head), from.at<const T>(batch, row, head),
                 static_cast<size_t>(columns) * sizeof(T));
}

template <class T>
void write_rows(const AttentionDecodeArguments& a) {
  const int64_t numbers = a.batch * a.rows * a.kv_heads * (a.head_dim + a.value_dim);
  parallel_for(a.batch * a.rows, numbers < kSerial ? 1 : a.threads, [&](int64_t i) {
    write_row<T>(a, a.new_k, a.k, a.head_dim, i / a.rows, i % a.rows);
    write_row<T>(a, a.new_v, a.v, a.value_dim, i / a.rows, i % a.rows);
  });
}

// The keys [first, second) that a new row sees.
std::pair<int64_t, int64_t> interval(const AttentionDecodeArguments& a, int64_t batch, int64_t row) {
  const bool committed = row < a.num_commit, causal = a.causal && a.causal[a.shared_causal ? 0 : batch];
  const int64_t block = committed ? 0 : a.num_commit;
  int64_t first = 0, last = causal ? row + 1 : committed ? a.num_commit : a.rows;
  if (a.window > 0) first = a.lengths[batch] + (a.window_by_row ? row : block) - (a.window - 1);
  if (a.window > 0 && a.window_by_row) last = std::min(last, row + a.window);
  return {std::max<int64_t>(0, first), a.lengths[batch] + last};
}

}  // namespace

void attention_decode(const AttentionDecodeArguments& a) {
  a.k.dtype == DType::kFloat32 ? write_rows<float>(a) : write_rows<uint16_t>(a);
  std::vector<int32_t> starts(static_cast<size_t>(2 * a.batch * a.rows)), stops(starts.size());
  for (int64_t i = 0; i < a.batch * a.rows; ++i) {
    const auto [first, last] = interval(a, i / a.rows, i % a.rows);
    starts[static_cast<size_t>(2 * i)] = static_cast<int32_t>(first);
    stops[static_cast<size_t>(2 * i)] = static_cast<int32_t>(last);
  }
  AttentionArguments rest = a;
  rest.starts = starts.data();
  rest.stops = stops.data();
  rest.shared_bounds = false;
  kernels().attention(rest);
}

}  // namespace dlcore
