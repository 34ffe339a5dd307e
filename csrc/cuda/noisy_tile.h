// A team's tile of a row's vectors and of normal noise.
#pragma once

#include "../common/noise.h"
#include "team.h"

namespace dlcore::cuda {

// Numbers of each vector that a thread keeps.
constexpr int kKept = 16;

template <class T>
constexpr int kPacketEntries = kPacketBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kKeptPackets = kKept / kPacketEntries<T>;

// Entries of a row that its largest team keeps.
constexpr int kMostKept = kKept * kMostThreads;

// Zeros past the row's end. N draws the normal numbers 2i and 2i + 1; WHOLE if no row has several tiles.
template <class T, int V, NormalPair (*N)(Key, int64_t), bool WHOLE = false>
class NoisyTile {
 public:
  __device__ NoisyTile(const Teams& teams, const Team& team, int64_t columns, Key key,
                       const Vector (&vector)[V])
      : teams_(teams), team_(team), columns_(columns), key_(key), vector_(vector) {
    if (WHOLE) make(0);
  }

  // f(v, noise) for each entry of the row that is this thread's, v an entry of every vector. What f makes of
  // the noise stays where one tile has the row.
  template <class F>
  __device__ void each(F f) {
    for (int tile = 0; tile < tiles(); ++tile) {
      hold(tile);
#pragma unroll
      for (int i = 0; i < kKept; ++i) call(f, i);
    }
  }

  // Stores f(v, noise) in every output that there is; f sets a number for each of them.
  template <int O, class F>
  __device__ void store(const Vector (&output)[O], F f) {
    for (int tile = 0; tile < tiles(); ++tile) {
      hold(tile);
#pragma unroll
      for (int p = 0; p < kKeptPackets<T>; ++p) {
        Packed<T, kPacketEntries<T>> packed[O];
#pragma unroll
        for (int e = 0; e < kPacketEntries<T>; ++e) {
          float results[O];
          call([&](const float* v, float noise) { f(v, noise, results); }, p * kPacketEntries<T> + e);
#pragma unroll
          for (int o = 0; o < O; ++o) packed[o].elements[e] = narrow_to<T>(results[o]);
        }
        const int64_t at = place(tile, p);
#pragma unroll
        for (int o = 0; o < O; ++o)
          store_packet(output[o].data + at, packed[o].word, left(at), output[o].aligned);
      }
    }
  }

  __device__ int tiles() const { return WHOLE ? 1 : teams_.tiles; }

 private:
  template <class F>
  __device__ void call(F f, int i) {
    float v[V];
#pragma unroll
    for (int k = 0; k < V; ++k)
      v[k] = widen(packed_[k][i / kPacketEntries<T>].elements[i % kPacketEntries<T>]);
    f(v, noise_[i]);
  }

  // Byte of the row where packet p begins.
  __device__ int64_t place(int tile, int p) const {
    return tile * int64_t{teams_.tile_bytes} + (p * team_.size() + team_.rank()) * kPacketBytes;
  }
  __device__ int left(int64_t at) const {
    const int64_t bytes = columns_ * static_cast<int64_t>(sizeof(T)) - at;
    return bytes > kPacketBytes ? kPacketBytes : static_cast<int>(bytes);
  }

  __device__ void hold(int tile) {
    if (WHOLE || tile == held_) return;
    held_ = tile;
    make(tile);
  }

  __device__ void make(int tile) {
#pragma unroll
    for (int p = 0; p < kKeptPackets<T>; ++p) {
      const int64_t at = place(tile, p), first = at / static_cast<int64_t>(sizeof(T));
#pragma unroll
      for (int k = 0; k < V; ++k)
        packed_[k][p].word = load_packet(vector_[k].data + at, left(at), vector_[k].aligned);
#pragma unroll
      for (int e = 0; e < kPacketEntries<T>; e += 2) {
        const NormalPair pair = N(key_, (first + e) / 2);
        noise_[p * kPacketEntries<T> + e] = first + e < columns_ ? pair.even : 0;
        noise_[p * kPacketEntries<T> + e + 1] = first + e + 1 < columns_ ? pair.odd : 0;
      }
    }
  }

  const Teams& teams_;
  const Team& team_;
  int64_t columns_;
  Key key_;
  const Vector (&vector_)[V];
  Packed<T, kPacketEntries<T>> packed_[V][kKeptPackets<T>];
  float noise_[kKept];
  int held_ = -1;
};

}  // namespace dlcore::cuda
