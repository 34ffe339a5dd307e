// What forward and backward share: a small matrix product on tiles that stay in the cache, row tiles, key
// tiles.
//
// Scores are kept transposed, keys down and query rows across the lanes: the softmax over keys is then
// vertical, and keys and values enter every product as scalars, as they lie in memory.
#pragma once

#include <algorithm>

#include "attention_plan.h"
#include "product.h"

namespace dlcore::DLCORE_ISA {

// The same bits where a factor of 0, from a key that a row does not see, must hide even NaN and infinity.
// `zeros_in_a`: the factors that may be 0 are a's, else b's.
template <bool by_column, bool zeros_in_a>
inline void multiply_guarded(const Operands& p, int64_t rows, int64_t sixteens) {
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t lane = 0; lane < sixteens * kLanes; lane += kLanes) {
      float* c = p.c + j * p.ldc + lane;
      Floats sum = broadcast(0.0f);
      for (int64_t k = 0; k < p.depth; ++k) {
        const float x = by_column ? p.a[k * p.lda + j] : p.a[j * p.lda + k];
        const Floats y = load(p.b + k * p.ldb + lane);
        if constexpr (zeros_in_a)
          sum = x == 0 ? sum : fused(y, x, sum);
        else
          sum = fused(y, select(equal(y, 0.0f), broadcast(0.0f), broadcast(x)), sum);
      }
      store(c, p.add ? added(c, p.factor ? p.factor + lane : nullptr, sum) : sum);
    }
}

// The largest of the numbers seen, by the bits of their sizes: infinity and NaN lie above all finite ones.
class Largeness {
 public:
  void see(const Floats& x) {
    largest_ = each(
        [](IntPart seen, FloatPart v) {
          const IntPart size = (IntPart)v & 0x7FFFFFFF;
          return size > seen ? size : seen;
        },
        largest_, x);
  }
  bool finite() const {
    return lane_bits(each([](IntPart v) { return (IntPart)(v >= 0x7F800000); }, largest_)) == 0;
  }

 private:
  Mask largest_ = {};
};

// `count` numbers as floats times `scale`, zeros up to a whole sixteen.
template <class T>
inline void read_row(const T* p, int64_t count, float scale, float* out, Largeness& size) {
  int64_t i = 0;
  const auto put = [&](const Floats& x) {
    store(out + i, x * scale);
    size.see(x);
  };
  for (; i + kLanes <= count; i += kLanes) put(load(p + i));
  if (i == count) return;
  T tail[kLanes] = {};
  std::memcpy(tail, p + i, static_cast<size_t>(count - i) * sizeof(T));
  put(load(tail));
}

// What the calling thread lends to all.
inline Scratch& shared_scratch() {
  thread_local Scratch kept;
  return kept;
}

// Row `key` of a head's keys or values, through the page table if there is one.
template <class T>
inline const T* key_row(const AttentionArguments& a, const Heads& heads, int64_t batch, int64_t key,
                        int64_t head) {
  if (!a.pages.table) return heads.at<const T>(batch, key, head);
  const int64_t page = a.pages.table[batch * a.pages.pages + key / a.pages.page_size];
  return heads.at<const T>(page, key % a.pages.page_size, head);
}

// Rows of k and v of a tile as floats, `k_stride` and `v_stride` floats apart.
struct KeyTile {
  const float* k;
  int64_t k_stride;
  const float* v;
  int64_t v_stride;
  bool finite;

  static int64_t columns(int64_t dim) { return round_up(dim, kLanes); }
  static int64_t floats(const AttentionArguments& a) {
    return kKeyTile * (columns(a.head_dim) + columns(a.value_dim));
  }
  static KeyTile in(const AttentionArguments& a, const float* floats) {
    const int64_t k_columns = columns(a.head_dim);
    return {floats, k_columns, floats + kKeyTile * k_columns, columns(a.value_dim), false};
  }
};

// A tile of a head converted to `floats`.
inline KeyTile read_tile(const AttentionArguments& a, int64_t batch, int64_t head, int64_t tile,
                         float* floats) {
  Largeness size;
  const auto read = [&](const Heads& heads, int64_t dim, float* out) {
    with_dtype(heads.dtype, [&](auto type) {
      using T = decltype(type);
      const int64_t from = tile * kKeyTile, to = std::min(from + kKeyTile, a.keys);
      for (int64_t key = from; key < to; ++key, out += KeyTile::columns(dim))
        read_row(key_row<T>(a, heads, batch, key, head), dim, 1.0f, out, size);
    });
  };
  read(a.k, a.head_dim, floats);
  read(a.v, a.value_dim, floats + kKeyTile * KeyTile::columns(a.head_dim));
  KeyTile rows = KeyTile::in(a, floats);
  rows.finite = size.finite();
  return rows;
}

// Tiles of one head, converted when first asked for and kept while there is room.
class KeyTiles {
 public:
  static int64_t slots(const AttentionArguments& a) {
    const int64_t tiles = (a.keys + kKeyTile - 1) / kKeyTile;
    return std::max<int64_t>(1, std::min(tiles, kRoom / KeyTile::floats(a)));
  }
  static int64_t floats(const AttentionArguments& a) { return slots(a) * KeyTile::floats(a); }

  KeyTiles(const AttentionArguments& a, int64_t batch, int64_t head, Scratch& scratch)
      : a_(a), batch_(batch), head_(head), held_(static_cast<size_t>(slots(a))) {
    memory_ = scratch.take(floats(a));
  }

  const KeyTile& operator[](int64_t tile) {
    const auto slot = static_cast<size_t>(tile) % held_.size();
    if (held_[slot].tile != tile) {
      float* memory = memory_ + static_cast<int64_t>(slot) * KeyTile::floats(a_);
      held_[slot] = {tile, read_tile(a_, batch_, head_, tile, memory)};
    }
    return held_[slot].rows;
  }

 private:
  struct Held {
    int64_t tile = -1;
    KeyTile rows = {};
  };
  // 2 MiB.
  static constexpr int64_t kRoom = 1 << 19;

  const AttentionArguments& a_;
  int64_t batch_, head_;
  float* memory_;
  std::vector<Held> held_;
};

// The rows of a tile: lane l is query l / heads of the tile, head l % heads of the chunk.
struct RowTile {
  RowTile(const AttentionArguments& a, const AttentionPlan& plan, int64_t batch, int64_t kv_head,
          int64_t chunk, int64_t tile)
      : a(a), batch(batch) {
    const int64_t group = a.heads / a.kv_heads, set = plan.bounds_of(batch);
    const int64_t first = tile * plan.queries_abreast;
    first_head = kv_head * group + chunk * plan.heads_abreast;
    heads = std::min(plan.heads_abreast, group - chunk * plan.heads_abreast);
    queries = plan.order[static_cast<size_t>(set)].data() + first;
    lanes = std::min(plan.queries_abreast, a.rows - first) * heads;
    sixteens = (lanes + kLanes - 1) / kLanes;
    width = sixteens * kLanes;
    visits = &plan.visits[static_cast<size_t>(set)][static_cast<size_t>(tile)];
    const int32_t* starts = a.starts + set * 2 * a.rows;
    const int32_t* stops = a.stops + set * 2 * a.rows;
    std::fill(&bounds[0][0], &bounds[0][0] + 4 * kRowTile, 0);
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int i = 0; i < 2; ++i) {
        bounds[i][lane] = starts[2 * query(lane) + i];
        bounds[2 + i][lane] = stops[2 * query(lane) + i];
      }
  }

  int64_t query(int64_t lane) const { return queries[lane / heads]; }
  int64_t head(int64_t lane) const { return first_head + lane % heads; }
  int64_t lse_at(int64_t lane) const { return (batch * a.heads + head(lane)) * a.rows + query(lane); }

  // Which lanes of a sixteen see a key.
  Mask sees(int64_t key, int64_t sixteen) const {
    const auto n = static_cast<int32_t>(key);
    const auto inside = [n](IntPart start, IntPart stop) { return (IntPart)((start <= n) & (n < stop)); };
    const int64_t at = sixteen * kLanes;
    const auto bound = [&](int i) { return load_lanes<Mask>(bounds[i] + at); };
    return each([](IntPart x, IntPart y) { return x | y; }, each(inside, bound(0), bound(2)),
                each(inside, bound(1), bound(3)));
  }

  // Rows of q or of a gradient, `dim` wide and scaled, one after the other; false if one is not finite.
  bool read(const Heads& from, int64_t dim, float scale, float* out) const {
    Largeness size;
    const int64_t stride = round_up(dim, kLanes);
    with_dtype(from.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t lane = 0; lane < lanes; ++lane)
        read_row(from.at<const T>(batch, query(lane), head(lane)), dim, scale, out + lane * stride, size);
    });
    std::fill(out + lanes * stride, out + width * stride, 0.0f);
    return size.finite();
  }

  // Rows as `read` gives them, from lanes down to lanes across.
  void across(const float* rows, int64_t dim, float* out) const {
    const int64_t stride = round_up(dim, kLanes);
    for (int64_t lane = 0; lane < width; lane += kLanes)
      for (int64_t d = 0; d < stride; d += kLanes)
        transpose(rows + lane * stride + d, stride, out + d * width + lane, width);
  }

  // Writes rows that lie across the lanes; `rows` is room for them one after the other.
  void write(const float* across, int64_t dim, float* rows, const Heads& to) const {
    const int64_t stride = round_up(dim, kLanes);
    for (int64_t lane = 0; lane < width; lane += kLanes)
      for (int64_t d = 0; d < stride; d += kLanes)
        transpose(across + d * width + lane, width, rows + lane * stride + d, stride);
    with_dtype(to.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t lane = 0; lane < lanes; ++lane)
        write_row(to.at<T>(batch, query(lane), head(lane)), dim, rows + lane * stride);
    });
  }

  template <class T>
  static void write_row(T* p, int64_t count, const float* values) {
    for (int64_t i = 0; i < count; i += kGroup) write_group(p + i, std::min(kGroup, count - i), values + i);
  }

  const AttentionArguments& a;
  int64_t batch, first_head, heads, lanes, sixteens, width;
  const int32_t* queries;
  const std::vector<Visit>* visits;
  // starts[0], starts[1], stops[0], stops[1] by lane; nothing for lanes past the last.
  alignas(64) int32_t bounds[4][kRowTile];
};

}  // namespace dlcore::DLCORE_ISA
