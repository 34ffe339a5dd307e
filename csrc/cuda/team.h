// Rows on teams of threads: several rows a warp, one a warp, or one a block, as long as rows are. A thread
// reads 16 bytes of a vector at a time.
#pragma once

#include <algorithm>

#include "device.h"
#include "launch.h"

namespace dlcore::cuda {

constexpr int kPacketBytes = 16;
// Threads of a block that has several teams, and of the largest team.
constexpr int kTeamsThreads = 64, kMostThreads = 256;

// How rows of so many bytes are shared out: a team of threads each, who take `each` packets of a tile.
struct Teams {
  int size, threads, tiles, tile_bytes, last_bytes;  // of the last tile
  int64_t blocks;

  Teams(int64_t rows, int64_t bytes, int each) {
    const int64_t wanted = ceil_div(bytes, each * kPacketBytes);
    if (wanted > kWarp) {
      size = threads = static_cast<int>(std::min<int64_t>(ceil_div(wanted, kWarp) * kWarp, kMostThreads));
      blocks = rows;
    } else {
      // At least two lanes: memory is moved in sectors of 32 bytes.
      for (size = 2; size < wanted;) size *= 2;
      threads = kTeamsThreads;
      blocks = ceil_div(rows * size, threads);
    }
    tile_bytes = each * kPacketBytes * size;
    tiles = static_cast<int>(ceil_div(bytes, tile_bytes));
    last_bytes = static_cast<int>(bytes - (tiles - 1) * int64_t{tile_bytes});
  }
};

// The threads of one row: lanes of a warp, or all of a block, which then call every function together.
class Team {
 public:
  __device__ explicit Team(int size) : size_(size), lanes_(size < kWarp ? size : kWarp) {
    const int first = lane_id() / lanes_ * lanes_;
    mask_ = lanes_ == kWarp ? kAllLanes : ((1u << lanes_) - 1u) << first;
  }
  __device__ int size() const { return size_; }
  __device__ int rank() const { return static_cast<int>(threadIdx.x) % size_; }
  // Lanes of the team in this warp, and this one's place among them.
  __device__ int lanes() const { return lanes_; }
  __device__ int lane() const { return lane_id() % lanes_; }

  // Teams of a block are consecutive, and so are blocks.
  __device__ int first_row() const { return (blockIdx.x * blockDim.x + threadIdx.x) / size_; }
  __device__ int teams() const { return gridDim.x * blockDim.x / size_; }

  // Folds over the lanes of the team that are in this warp.
  template <class T, class F>
  __device__ T fold_lanes(T x, F f) const {
#pragma unroll
    for (int other = kWarp / 2; other > 0; other /= 2)
      if (other < lanes_) x = f(x, __shfl_xor_sync(mask_, x, other));
    return x;
  }

  template <class T>
  __device__ T from_lane(T x, int lane) const {
    return __shfl_sync(mask_, x, lane_id() / lanes_ * lanes_ + lane);
  }

  // Each of K numbers folded over the team, the same in all of its threads.
  template <int K, class T, class F>
  __device__ void fold(T (&x)[K], F f) {
#pragma unroll
    for (T& each : x) each = fold_lanes(each, f);
    if (size_ <= kWarp) return;
    // By turns: who writes here again has met, at the barrier in between, all who read.
    __shared__ T parts[2][kMostThreads / kWarp][K];
    T(*const mine)[K] = parts[turn_];
    turn_ ^= 1;
    if (lane_id() == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) mine[threadIdx.x / kWarp][k] = x[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] = mine[0][k];
    for (int warp = 1; warp < size_ / kWarp; ++warp) {
#pragma unroll
      for (int k = 0; k < K; ++k) x[k] = f(x[k], mine[warp][k]);
    }
  }
  template <class T, class F>
  __device__ T fold(T x, F f) {
    T all[1] = {x};
    fold(all, f);
    return all[0];
  }
  template <int K>
  __device__ void sum(float (&x)[K]) {
    fold(x, [](float a, float b) { return a + b; });
  }

 private:
  int size_, lanes_, turn_ = 0;
  unsigned mask_;
};

// Calls f(T{}) with the type of a dtype's numbers.
template <class F>
__device__ void for_dtype(DType dtype, F f) {
  if (dtype == DType::kFloat32)
    f(float{});
  else if (dtype == DType::kBFloat16)
    f(BFloat16{});
  else
    f(Float16{});
}

// Where a row of a view begins, and whether that is at a packet.
struct Vector {
  char* data = nullptr;
  bool aligned = false;

  Vector() = default;
  __device__ Vector(const View& v, int64_t r, bool aligned) : aligned(aligned) {
    data = v.data + (v.row<char>(r) - v.data) * (v.dtype == DType::kFloat32 ? 4 : 2);
  }
};

// The packet at p of which `left` bytes are the row's, zeros past its end: in loads as wide as p allows.
__device__ inline uint4 load_packet(const char* p, int left, bool aligned) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (left >= kPacketBytes && aligned) return __ldcs(reinterpret_cast<const uint4*>(p));
  if (left >= kPacketBytes && address % 8 == 0) {
    const uint2 first = __ldcs(reinterpret_cast<const uint2*>(p)),
                second = __ldcs(reinterpret_cast<const uint2*>(p) + 1);
    return {first.x, first.y, second.x, second.y};
  }
  unsigned word[4] = {};
  const auto half = [&](int k) { return unsigned{reinterpret_cast<const unsigned short*>(p)[k]}; };
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (4 * k + 4 <= left && address % 4 == 0) {
      word[k] = reinterpret_cast<const unsigned*>(p)[k];
      continue;
    }
    if (4 * k < left) word[k] = half(2 * k);
    if (4 * k + 2 < left) word[k] |= half(2 * k + 1) << 16;
  }
  return {word[0], word[1], word[2], word[3]};
}

__device__ inline void store_packet(char* p, const uint4& packet, int left, bool aligned) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (left >= kPacketBytes && aligned) {
    *reinterpret_cast<uint4*>(p) = packet;
    return;
  }
  if (left >= kPacketBytes && address % 8 == 0) {
    reinterpret_cast<uint2*>(p)[0] = {packet.x, packet.y};
    reinterpret_cast<uint2*>(p)[1] = {packet.z, packet.w};
    return;
  }
  const unsigned word[4] = {packet.x, packet.y, packet.z, packet.w};
  const auto half = [&](int k, unsigned x) {
    reinterpret_cast<unsigned short*>(p)[k] = static_cast<unsigned short>(x);
  };
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (4 * k + 4 <= left && address % 4 == 0) {
      reinterpret_cast<unsigned*>(p)[k] = word[k];
      continue;
    }
    if (4 * k < left) half(2 * k, word[k]);
    if (4 * k + 2 < left) half(2 * k + 1, word[k] >> 16);
  }
}

__device__ inline float entry_of(const char* data, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(data)[i];
  if (dtype == DType::kBFloat16) return widen(reinterpret_cast<const BFloat16*>(data)[i]);
  return widen(reinterpret_cast<const Float16*>(data)[i]);
}

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Whether all rows of a view begin at packets.
inline bool aligned(const View& v) {
  return most_abreast(v, element_size(v.dtype)) * element_size(v.dtype) == kPacketBytes;
}

// V vectors of a row, as csrc/common/sphere_rows.h asks for them.
template <int V>
struct TeamRow {
  Team& team;
  const Vector (&vector)[V];
  int64_t columns;
  DType dtype;
  double t = 0, grad_angle = 0;

  __device__ float entry(int k, int64_t i) const { return entry_of(vector[k].data, i, dtype); }
  __device__ float largest(int k) const {
    float found = 0;
    for (int64_t i = team.rank(); i < columns; i += team.size()) found = fmaxf(found, fabsf(entry(k, i)));
    return team.fold(found, [](float a, float b) { return fmaxf(a, b); });
  }
  __device__ int64_t smallest(int k) const {
    float least = -kNone;
    int64_t at = columns - 1;
    for (int64_t i = team.rank(); i < columns; i += team.size()) {
      const float size = fabsf(entry(k, i));
      if (!(size < least)) continue;
      least = size;
      at = i;
    }
    const float all = team.fold(least, [](float a, float b) { return fminf(a, b); });
    return team.fold(least == all ? at : columns - 1, [](int64_t a, int64_t b) { return a < b ? a : b; });
  }
  template <class F>
  __device__ double sum(F f) const {
    double total = 0;
    for (int64_t i = team.rank(); i < columns; i += team.size()) total += f(i);
    return team.fold(total, [](double a, double b) { return a + b; });
  }
};

}  // namespace dlcore::cuda
