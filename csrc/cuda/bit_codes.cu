// Tokens to bits and back.
#include "../common/bits_functions.h"
#include "bits.h"
#include "runs.h"

namespace dlcore::cuda {
namespace {

constexpr int64_t kMostBits = 64;

void check_width(const char* op, int64_t width) {
  if (width < 1 || width > kMostBits)
    throw std::invalid_argument(std::string(op) + ": width must lie in [1, 64], got " +
                                std::to_string(width));
}

// n / d by way of a product, for d <= 64 and n < 64·kTileThreads.
class Divisor {
 public:
  explicit Divisor(int d) : d_(d), inverse_((1u << kShift) / static_cast<unsigned>(d) + 1) {}
  __device__ int quotient(int n) const {
    return static_cast<int>(product(static_cast<uint32_t>(n), inverse_) >> kShift);
  }
  __device__ int d() const { return d_; }

 private:
  // The product exceeds 2^kShift·n / d by less than n, which is less than 2^kShift / d.
  static constexpr int kShift = 20;
  static_assert(kTileThreads * kMostBits * kMostBits <= 1 << kShift);
  int d_;
  uint32_t inverse_;
};

// A block takes as many tokens at once as it has threads.
template <int WIDTH>
__global__ void __launch_bounds__(kTileThreads)
    encode_kernel(const __grid_constant__ BitEncodeArguments a, const __grid_constant__ Divisor width) {
  __shared__ uint64_t codes[kTileThreads];
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t first = int64_t{blockIdx.x} * kTileThreads; first < a.count;
       first += int64_t{gridDim.x} * kTileThreads) {
    const int64_t rest = a.count - first;
    const int tokens = static_cast<int>(rest < kTileThreads ? rest : kTileThreads);
    __syncthreads();  // the codes before have been read
    if (thread < tokens) {
      const auto token = static_cast<uint64_t>(a.tokens[first + thread]);
      codes[thread] = a.gray ? to_gray(token) : token;
    }
    __syncthreads();
    float* out = a.out + first * width.d();
    for (int at = thread * kRun; at < tokens * width.d(); at += kTileThreads * kRun) {
      const int count = tokens * width.d() - at;
      float x[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const int token = width.quotient(at + i), column = at + i - token * width.d();
        const uint64_t code = i < count ? codes[token] : 0;
        x[i] = code >> (a.msb ? width.d() - 1 - column : column) & 1 ? a.high : a.low;
      }
      store_run<WIDTH>(out + at, count, x);
    }
  }
}

template <int WIDTH>
__global__ void __launch_bounds__(kTileThreads)
    decode_kernel(const __grid_constant__ BitDecodeArguments a, const __grid_constant__ Tiling t) {
  Row row;
  const auto enter = [&](int64_t r) { row = Row(a.x, r); };
  for_tiles(t, enter, [&](const Place& place) {
    Run<WIDTH> runs[kRuns];
    uint64_t code = 0;
    int broken = 0;
    if (place.live) {
#pragma unroll
      for (int k = 0; k < kRuns; ++k) row.load(place.column(k), place.count(k), runs[k]);
#pragma unroll
      for (int k = 0; k < kRuns; ++k) {
        float x[kRun];
        row.widened(runs[k], x);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if (i >= place.count(k)) continue;
          const int column = place.column(k) + i, shift = a.msb ? place.left - 1 - column : column;
          code |= static_cast<uint64_t>(x[i] > a.threshold) << shift;
          broken |= x[i] != x[i];
        }
      }
    }
    for (int other = t.lanes / 2; other > 0; other /= 2) {
      code |= __shfl_xor_sync(kAllLanes, code, other);
      broken |= __shfl_xor_sync(kAllLanes, broken, other);
    }
    if (!place.live || place.own != 0) return;
    if (a.gray) code = from_gray(code);
    a.tokens[place.row] = broken ? -1 : wrapped(static_cast<int64_t>(code), a.vocab);
  });
}

// Elements of a thread at a time: a byte of bits.
constexpr int kByte = 8;

// The bits of a block's tokens, one after the other, and which of them are NaN. A token's may begin in a
// word's last bit: it is cut out of three words.
struct PackedBits {
  static constexpr int kWords = kTileThreads * static_cast<int>(kMostBits) / 32 + 2;
  uint32_t set[kWords], broken[kWords];

  template <int WIDTH>
  __device__ void pack(const Row& row, int64_t first, int at, int count, float threshold) {
    Run<WIDTH> runs[kByte / kRun];
#pragma unroll
    for (int k = 0; k < kByte / kRun; ++k) row.load(first + at + k * kRun, count - k * kRun, runs[k]);
    unsigned ones = 0, nans = 0;
#pragma unroll
    for (int k = 0; k < kByte / kRun; ++k) {
      float x[kRun];
      row.widened(runs[k], x);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        ones |= unsigned{x[i] > threshold} << (k * kRun + i);
        nans |= unsigned{x[i] != x[i]} << (k * kRun + i);
      }
    }
    reinterpret_cast<uint8_t*>(set)[at / kByte] = static_cast<uint8_t>(ones);
    reinterpret_cast<uint8_t*>(broken)[at / kByte] = static_cast<uint8_t>(nans);
  }
  __device__ static uint64_t cut(const uint32_t* words, int at, int width) {
    const int word = at / 32, bit = at % 32;
    const uint64_t low = words[word] | static_cast<uint64_t>(words[word + 1]) << 32;
    const uint64_t high = bit ? static_cast<uint64_t>(words[word + 2]) << (64 - bit) : 0;
    return (low >> bit | high) & ~uint64_t{0} >> (kMostBits - width);
  }
};

// Rows side by side, read as one.
template <int WIDTH>
__global__ void __launch_bounds__(kTileThreads)
    decode_packed_kernel(const __grid_constant__ BitDecodeArguments a) {
  // By turns: who packs here again has met, at the barrier in between, all who cut.
  __shared__ PackedBits packed[2];
  const int thread = static_cast<int>(threadIdx.x), width = static_cast<int>(a.x.columns);
  const Row all(a.x, 0);
  int turn = 0;
  for (int64_t first = int64_t{blockIdx.x} * kTileThreads; first < a.x.rows;
       first += int64_t{gridDim.x} * kTileThreads) {
    PackedBits& bits = packed[turn];
    turn ^= 1;
    const int64_t rest = a.x.rows - first;
    const int tokens = static_cast<int>(rest < kTileThreads ? rest : kTileThreads), count = tokens * width;
    for (int at = thread * kByte; at < count; at += kTileThreads * kByte)
      bits.pack<WIDTH>(all, first * width, at, count - at, a.threshold);
    __syncthreads();
    if (thread >= tokens) continue;
    uint64_t code = PackedBits::cut(bits.set, thread * width, width);
    if (a.msb) code = __brevll(code) >> (kMostBits - width);
    if (a.gray) code = from_gray(code);
    const bool broken = PackedBits::cut(bits.broken, thread * width, width) != 0;
    a.tokens[first + thread] = broken ? -1 : wrapped(static_cast<int64_t>(code), a.vocab);
  }
}

}  // namespace

void bit_encode(const BitEncodeArguments& a, cudaStream_t stream) {
  check_width("bits.encode", a.width);
  const auto run = [&](auto abreast) {
    launch("bits.encode", encode_kernel<abreast>, ceil_div(a.count, kTileThreads), kTileThreads, stream, a,
           Divisor(a.width));
  };
  with_width(narrowest(kRun, floats(a.out, 1, a.count * a.width)), run);
}

void bit_decode(const BitDecodeArguments& a, cudaStream_t stream) {
  check_width("bits.decode", a.x.columns);
  const bool packed = a.x.lead_dims == 0 || (a.x.lead_dims == 1 && a.x.lead_stride[0] == a.x.columns);
  if (packed) {
    View all = a.x;
    all.lead_dims = 0;
    const auto run = [&](auto abreast) {
      launch("bits.decode", decode_packed_kernel<abreast>, ceil_div(a.x.rows, kTileThreads), kTileThreads,
             stream, a);
    };
    return with_width(narrowest(kRun, all), run);
  }
  const Tiling t(a.x.rows, a.x.columns);
  const auto run = [&](auto abreast) {
    launch("bits.decode", decode_kernel<abreast>, t.tiles, kTileThreads, stream, a, t);
  };
  with_width(narrowest(kRun, a.x), run);
}

}  // namespace dlcore::cuda
