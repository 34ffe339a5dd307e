#include "attention_plan.h"

#include <algorithm>
#include <numeric>

namespace dlcore {
namespace {

struct Bounds {
  const int32_t* starts;
  const int32_t* stops;
  int64_t start(int64_t query, int i) const { return starts[2 * query + i]; }
  int64_t stop(int64_t query, int i) const { return stops[2 * query + i]; }
  bool empty(int64_t query, int i) const { return start(query, i) >= stop(query, i); }
};

// Queries by where their first interval stops, so that a tile holds rows that see nearly the same keys: under
// the training mask a noisy block and the clean block before it.
std::vector<int32_t> sorted_queries(const Bounds& bounds, int64_t rows) {
  std::vector<int32_t> order(static_cast<size_t>(rows));
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int32_t x, int32_t y) {
    if (bounds.stop(x, 0) != bounds.stop(y, 0)) return bounds.stop(x, 0) < bounds.stop(y, 0);
    return bounds.start(x, 0) < bounds.start(y, 0);
  };
  if (!std::is_sorted(order.begin(), order.end(), before))
    std::stable_sort(order.begin(), order.end(), before);
  return order;
}

// What the queries of a tile see in one of their intervals: any of them, and all of them.
struct Reach {
  int64_t first = INT64_MAX, last = 0;
  int64_t all_first = 0, all_last = INT64_MAX;
};

Reach reach(const Bounds& bounds, const int32_t* queries, int64_t count, int i) {
  Reach r;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t start = bounds.start(queries[j], i), stop = bounds.stop(queries[j], i);
    r.all_first = std::max(r.all_first, start);
    r.all_last = std::min(r.all_last, bounds.empty(queries[j], i) ? 0 : stop);
    if (bounds.empty(queries[j], i)) continue;
    r.first = std::min(r.first, start);
    r.last = std::max(r.last, stop);
  }
  return r;
}

// The part of a key tile that some query sees; `begin` >= `end` if none does.
Visit seen(const Bounds& bounds, const int32_t* queries, int64_t count, int64_t tile) {
  const int64_t from = tile * kKeyTile, to = from + kKeyTile;
  Visit v{tile, kKeyTile, 0, false};
  for (int64_t j = 0; j < count; ++j)
    for (int i = 0; i < 2; ++i) {
      const int64_t begin = std::max(bounds.start(queries[j], i), from);
      const int64_t end = std::min(bounds.stop(queries[j], i), to);
      if (begin >= end) continue;
      v.begin = std::min(v.begin, begin - from);
      v.end = std::max(v.end, end - from);
    }
  return v;
}

std::vector<Visit> tile_visits(const Bounds& bounds, const int32_t* queries, int64_t count) {
  std::vector<Visit> visits;
  int64_t done_first = 0, done_last = 0;
  for (int i = 0; i < 2; ++i) {
    const Reach r = reach(bounds, queries, count, i);
    if (r.first >= r.last) continue;
    const int64_t first = r.first / kKeyTile, last = (r.last - 1) / kKeyTile + 1;
    for (int64_t tile = first; tile < last; ++tile) {
      if (tile >= done_first && tile < done_last) continue;
      const int64_t from = tile * kKeyTile, to = from + kKeyTile;
      if (r.all_first <= from && r.all_last >= to) {
        visits.push_back({tile, 0, kKeyTile, true});
        continue;
      }
      Visit v = seen(bounds, queries, count, tile);
      if (v.begin >= v.end) continue;
      v.full = r.all_first <= from + v.begin && r.all_last >= from + v.end;
      visits.push_back(v);
    }
    done_first = first;
    done_last = last;
  }
  return visits;
}

}  // namespace

AttentionPlan plan_attention(const AttentionArguments& a) {
  AttentionPlan plan;
  const int64_t group = a.heads / a.kv_heads;
  plan.heads_abreast = std::min(group, kRowTile);
  plan.head_chunks = (group + plan.heads_abreast - 1) / plan.heads_abreast;
  plan.queries_abreast = kRowTile / plan.heads_abreast;
  plan.row_tiles = (a.rows + plan.queries_abreast - 1) / plan.queries_abreast;
  const int64_t sets = a.shared_bounds ? 1 : a.batch;
  for (int64_t set = 0; set < sets; ++set) {
    const Bounds bounds{a.starts + set * 2 * a.rows, a.stops + set * 2 * a.rows};
    plan.order.push_back(sorted_queries(bounds, a.rows));
    auto& tiles = plan.visits.emplace_back();
    for (int64_t at = 0; at < a.rows; at += plan.queries_abreast)
      tiles.push_back(
          tile_visits(bounds, plan.order.back().data() + at, std::min(plan.queries_abreast, a.rows - at)));
  }
  return plan;
}

}  // namespace dlcore
