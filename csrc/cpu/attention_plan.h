// Which key tiles each tile of query rows has to visit.
#pragma once

#include <vector>

#include "attention.h"

namespace dlcore {

constexpr int64_t kKeyTile = 64;
// Rows of a tile: queries times the heads that share their keys.
constexpr int64_t kRowTile = 64;

// The keys [begin, end) of a key tile, counted from its first; `full`: all rows see all of them.
struct Visit {
  int64_t tile, begin, end;
  bool full;
};

struct AttentionPlan {
  // Heads of a group side by side in a row tile, and how often that covers the group.
  int64_t heads_abreast = 1, head_chunks = 1;
  int64_t queries_abreast = 1, row_tiles = 0;
  // By set of intervals: queries in the order in which tiles take them, and the visits of every row tile.
  std::vector<std::vector<int32_t>> order;
  std::vector<std::vector<std::vector<Visit>>> visits;

  int64_t bounds_of(int64_t batch) const { return visits.size() == 1 ? 0 : batch; }
};

AttentionPlan plan_attention(const AttentionArguments& a);

}  // namespace dlcore
