// Key tiles that are visited once: read where they lie or, if that can't be, converted beside the products on
// the tile before; and asked for beside those of a visit earlier. One line or conversion for each sixteen
// products is free; bursts of them, between the products, cost a tenth of the time and more.
#pragma once

#include "attention_tile.h"

namespace dlcore::DLCORE_ISA {

// Rows of keys or values of a tile, by the addresses of the first head's.
struct TileRows {
  const char* const* rows;
  int64_t offset;  // of the head, in bytes

  const char* at(int64_t row) const { return rows[row] + offset; }
};

// Asks for sixteen columns. (Inlined always: GCC drops calls of a function that does nothing but prefetch.)
template <class T>
struct Ask {
  TileRows rows;

  __attribute__((always_inline)) void operator()(int64_t row, int64_t column) const {
    __builtin_prefetch(rows.at(row) + column * static_cast<int64_t>(sizeof(T)), 0, 2);
  }
};

// Converts sixteen columns, and asks for those of another tile.
template <class T>
struct Convert {
  TileRows from;
  float* to;
  int64_t stride;
  Ask<T> ask;

  __attribute__((always_inline)) void operator()(int64_t row, int64_t column) const {
    ask(row, column);
    store(to + row * stride + column, load(reinterpret_cast<const T*>(from.at(row)) + column));
  }
};

class TileStream {
 public:
  static int64_t floats(const AttentionArguments& a) { return 2 * KeyTile::floats(a); }

  // Some heads of a sequence, with row tiles `sixteens` wide, through `count` visits.
  TileStream(const AttentionArguments& a, int64_t batch, int64_t first_head, int64_t heads, int64_t sixteens,
             const Visit* visits, int64_t count, Scratch& memory)
      : a_(a),
        batch_(batch),
        first_head_(first_head),
        heads_(heads),
        visits_(visits),
        count_(count),
        whole_(a.head_dim % kLanes + a.value_dim % kLanes == 0),
        once_(sixteens <= kWidest) {
    for (float*& p : memory_) p = memory.take(KeyTile::floats(a));
  }

  // work(head, visit, tile, beside_keys, beside_values) for every visit and head.
  template <class Work>
  void each(const Work& work) {
    if (count_ > 0) with_dtype(a_.k.dtype, [&](auto type) { each_as<decltype(type)>(work); });
  }

 private:
  // Of one head of the tile of visit `i`; `i` may pass the last visit.
  struct Place {
    int64_t i, head;
  };
  struct Addresses {
    const char *k[kKeyTile], *v[kKeyTile];
  };

  template <class T, class Work>
  void each_as(const Work& work) {
    find<T>(0), find<T>(1);
    bool converted = false;
    for (int64_t i = 0; i < count_; ++i) {
      find<T>(i + 2);
      for (int64_t head = 0; head < heads_; ++head) {
        const Place next = head + 1 < heads_ ? Place{i, head + 1} : Place{i + 1, 0};
        const KeyTile tile = in_place(i) ? found({i, head}) : converted ? floats() : read({i, head});
        converted = convertible(i, next);
        if (converted) {
          std::swap(memory_[0], memory_[1]);
          const auto [keys, values] = conversion<T>(next);
          work(head, visits_[i], tile, keys, values);
        } else {
          work(head, visits_[i], tile, Ask<T>{keys<T>({i + 1, head})}, Ask<T>{values<T>({i + 1, head})});
        }
      }
    }
  }

  // Whether the products can take rows as they lie.
  bool in_place(int64_t i) const {
    const bool together = !a_.pages.table || a_.pages.page_size % kKeyTile == 0;
    return whole_ && together && a_.k.dtype == DType::kFloat32 && visits_[i].full;
  }
  // Whether the products of visit `i` go through a whole tile, about once, and `next` wants to be converted;
  // where rows see it in part `read` does that, and finds whether it is finite.
  bool convertible(int64_t i, const Place& next) const {
    const Visit& visit = visits_[i];
    return once_ && visit.full && visit.end - visit.begin == kKeyTile && next.i < count_ && whole_ &&
           visits_[next.i].full && !in_place(next.i);
  }

  KeyTile found(const Place& place) const {
    const auto first = [&](const Heads& heads) {
      return key_row<float>(a_, heads, batch_, visits_[place.i].tile * kKeyTile, first_head_ + place.head);
    };
    return {first(a_.k), a_.k.row_stride, first(a_.v), a_.v.row_stride, false};
  }
  KeyTile read(const Place& place) const {
    return read_tile(a_, batch_, first_head_ + place.head, visits_[place.i].tile, memory_[0]);
  }
  KeyTile floats() const { return KeyTile::in(a_, memory_[0]); }

  template <class T>
  std::pair<Convert<T>, Convert<T>> conversion(const Place& place) {
    const KeyTile to = floats();
    const Place after{place.i + 1, place.head};
    return {{keys<T>(place), memory_[0], to.k_stride, {keys<T>(after)}},
            {values<T>(place), memory_[0] + (to.v - to.k), to.v_stride, {values<T>(after)}}};
  }

  template <class T>
  void find(int64_t i) {
    const int64_t first = visits_[std::min(i, count_ - 1)].tile * kKeyTile;
    for (int64_t r = 0; r < kKeyTile; ++r) {
      const int64_t key = std::min(first + r, a_.keys - 1);
      const auto row = [&](const Heads& heads) {
        return reinterpret_cast<const char*>(key_row<T>(a_, heads, batch_, key, first_head_));
      };
      addresses_[i % 3].k[r] = row(a_.k);
      addresses_[i % 3].v[r] = row(a_.v);
    }
  }
  template <class T>
  TileRows keys(const Place& place) const {
    return {addresses_[place.i % 3].k, place.head * a_.k.head_stride * static_cast<int64_t>(sizeof(T))};
  }
  template <class T>
  TileRows values(const Place& place) const {
    return {addresses_[place.i % 3].v, place.head * a_.v.head_stride * static_cast<int64_t>(sizeof(T))};
  }

  const AttentionArguments& a_;
  int64_t batch_, first_head_, heads_;
  const Visit* visits_;
  int64_t count_;
  bool whole_, once_;
  // A converted tile, and the one before.
  float* memory_[2];
  // Of the first head's rows, for a visit and the two that follow.
  Addresses addresses_[3];
};

}  // namespace dlcore::DLCORE_ISA
