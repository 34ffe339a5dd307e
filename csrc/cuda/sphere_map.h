// A map of the sphere on all rows, a team of threads each: a row is read once, unless it is longer than what
// its team's registers hold.
#pragma once

#include "../common/sphere_maps.h"
#include "sphere.h"
#include "team.h"

namespace dlcore::cuda {

// Packets of each vector that a thread keeps.
constexpr int kPackets = 6;

// A map's vectors, the gradient last, and what becomes of them. Bit k of `aligned`: vector k; from bit
// sphere::kMostVectors on: outputs.
struct MapRows {
  View vectors[sphere::kMostVectors], outputs[kSphereInputs];
  unsigned aligned = 0;
  PerRow<float> t;
  const float* grad_angle;
  float* number;
  int team, tiles, tile_bytes, last_bytes;

  __device__ int bytes(int tile) const { return tile == tiles - 1 ? last_bytes : tile_bytes; }
};

// Where packet p of this thread lies in a tile, in bytes.
__device__ inline int place(const Team& team, int p) {
  return (p * team.size() + team.rank()) * kPacketBytes;
}

template <int V>
struct Tile {
  uint4 packet[V][kPackets];

  // From byte `first` of the row on, of which `left` bytes are the tile's.
  __device__ void load(const Vector (&vector)[V], int64_t first, int left, const Team& team) {
#pragma unroll
    for (int p = 0; p < kPackets; ++p) {
      const int at = place(team, p);
#pragma unroll
      for (int k = 0; k < V; ++k)
        packet[k][p] = load_packet(vector[k].data + first + at, left - at, vector[k].aligned);
    }
  }

  // f(v) for each entry of packet p, v an entry of every vector.
  template <class T, class F>
  __device__ void each(int p, F f) const {
    constexpr int kEntries = kPacketBytes / sizeof(T);
    Packed<T, kEntries> packed[V];
#pragma unroll
    for (int k = 0; k < V; ++k) packed[k].word = packet[k][p];
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      float v[V];
#pragma unroll
      for (int k = 0; k < V; ++k) v[k] = widen(packed[k].elements[e]);
      f(e, v);
    }
  }
};

// Packet p of the outputs: entries from place(p) on, `left` bytes before the end of the tile's.
template <class Map, class T>
__device__ void combine(const Tile<Map::vectors>& tile, int p, int64_t first, int at, int left,
                        const double* totals, const sphere::Combination& made,
                        const Vector (&output)[Map::outputs]) {
  constexpr int kEntries = kPacketBytes / sizeof(T);
  Packed<T, kEntries> result[Map::outputs];
  const int64_t spike = made.at - (first + at) / static_cast<int64_t>(sizeof(T));
  tile.template each<T>(p, [&](int e, float* v) {
    Map::rebase(v, totals, made);
#pragma unroll
    for (int o = 0; o < Map::outputs; ++o) {
      float x = v[0] * made.coefficients[o][0];
#pragma unroll
      for (int k = 1; k < Map::vectors; ++k) x = fmaf(v[k], made.coefficients[o][k], x);
      if (o == 0 && spike == e) x += static_cast<float>(made.spike);
      result[o].elements[e] = narrow_to<T>(x);
    }
  });
#pragma unroll
  for (int o = 0; o < Map::outputs; ++o)
    if (output[o].data)
      store_packet(output[o].data + first + at, result[o].word, left - at, output[o].aligned);
}

template <class Map>
__device__ void map_row(const MapRows& a, Team& team, int64_t r) {
  const DType dtype = a.vectors[0].dtype;
  Vector vector[Map::vectors];
#pragma unroll
  for (int k = 0; k < Map::vectors; ++k) vector[k] = Vector(a.vectors[k], r, a.aligned >> k & 1);
  Tile<Map::vectors> tile;
  float sums[Map::sums] = {};
  for (int i = 0; i < a.tiles; ++i) {
    tile.load(vector, i * int64_t{a.tile_bytes}, a.bytes(i), team);
    for_dtype(dtype, [&](auto type) {
#pragma unroll
      for (int p = 0; p < kPackets; ++p)
        tile.template each<decltype(type)>(p, [&](int, const float* v) { Map::add(sums, v); });
    });
  }
  team.sum(sums);
  double totals[Map::sums];
#pragma unroll
  for (int k = 0; k < Map::sums; ++k) totals[k] = sums[k];
  const TeamRow<Map::vectors> row{
      team, vector, a.vectors[0].columns, dtype, a.t ? a.t[r] : 0.0, a.grad_angle ? a.grad_angle[r] : 0.0};
  const sphere::Combination made = Map::solve(totals, row);
  if (a.number && team.rank() == 0) a.number[r] = static_cast<float>(made.number);
  if constexpr (Map::outputs > 0) {
    Vector output[Map::outputs];
#pragma unroll
    for (int o = 0; o < Map::outputs; ++o)
      if (a.outputs[o].data) output[o] = Vector(a.outputs[o], r, a.aligned >> (sphere::kMostVectors + o) & 1);
    // Backwards: the last tile is at hand.
    for (int i = a.tiles - 1; i >= 0; --i) {
      const int64_t first = i * int64_t{a.tile_bytes};
      if (i != a.tiles - 1) tile.load(vector, first, a.bytes(i), team);
      for_dtype(dtype, [&](auto type) {
#pragma unroll
        for (int p = 0; p < kPackets; ++p)
          combine<Map, decltype(type)>(tile, p, first, place(team, p), a.bytes(i), totals, made, output);
      });
    }
  }
}

// So few registers that 24, 16, 12 or 10 warps are under way: each keeps 3 KB of every vector, so that memory
// has enough to do while rows are solved.
constexpr int most_registers(int vectors) {
  return vectors == 1 ? 80 : vectors == 2 ? 128 : vectors == 3 ? 168 : 200;
}

template <class Map>
__global__ void __maxnreg__(most_registers(Map::vectors)) map_kernel(const __grid_constant__ MapRows a) {
  Team team(a.team);
  for (int64_t r = team.first_row(); r < a.vectors[0].rows; r += team.teams()) map_row<Map>(a, team, r);
}

template <class Map>
void map_rows(const SphereMapArguments& a, cudaStream_t stream) {
  MapRows rows{};
  const View& x = a.inputs[0];
  const Teams teams(x.rows, x.columns * element_size(x.dtype), kPackets);
  const int inputs = a.grad.data ? Map::vectors - 1 : Map::vectors;
  for (int k = 0; k < Map::vectors; ++k) {
    rows.vectors[k] = k < inputs ? a.inputs[k] : a.grad;
    rows.aligned |= unsigned{aligned(rows.vectors[k])} << k;
  }
  for (int o = 0; o < Map::outputs; ++o) {
    rows.outputs[o] = a.outputs[o];
    rows.aligned |= unsigned{aligned(a.outputs[o])} << (sphere::kMostVectors + o);
  }
  rows.t = a.t;
  rows.grad_angle = a.grad_angle;
  rows.number = a.number;
  rows.team = teams.size;
  rows.tiles = teams.tiles;
  rows.tile_bytes = teams.tile_bytes;
  rows.last_bytes = teams.last_bytes;
  launch("a map of the sphere", map_kernel<Map>, teams.blocks, teams.threads, stream, rows);
}

}  // namespace dlcore::cuda
