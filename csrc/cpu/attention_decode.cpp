// A step against a cache: rows written, intervals made, attention run.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace dlcore {
namespace {

// Fewer bytes than this are not worth waking another thread.
constexpr int64_t kSerialBytes = 1 << 16;

// Where position `at` of a sequence stands in the cache: (batch or page, row).
struct Slot {
  int64_t batch, row;
  Slot(const AttentionArguments& a, int64_t batch, int64_t at) : batch(batch), row(at) {
    if (!a.pages.table) return;
    this->batch = a.pages.table[batch * a.pages.pages + at / a.pages.page_size];
    row = at % a.pages.page_size;
  }
};

void write_rows(const AttentionDecodeArguments& a) {
  const int64_t size = a.k.dtype == DType::kFloat32 ? 4 : 2;
  const auto at = [size](const Heads& x, int64_t batch, int64_t row, int64_t head) {
    return x.data + size * (batch * x.batch_stride + row * x.row_stride + head * x.head_stride);
  };
  const int64_t bytes = a.batch * a.rows * a.kv_heads * (a.head_dim + a.value_dim) * size;
  parallel_for(a.batch * a.rows, bytes < kSerialBytes ? 1 : a.threads, [&](int64_t i) {
    const int64_t batch = i / a.rows, row = i % a.rows;
    const Slot slot(a, batch, a.lengths[batch] + row);
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      std::memmove(at(a.k, slot.batch, slot.row, head), at(a.new_k, batch, row, head),
                   static_cast<size_t>(a.head_dim * size));
      std::memmove(at(a.v, slot.batch, slot.row, head), at(a.new_v, batch, row, head),
                   static_cast<size_t>(a.value_dim * size));
    }
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
  write_rows(a);
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
