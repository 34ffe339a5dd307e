// Rows read and written in runs of four elements, of any dtype, with as wide loads as addresses allow; and
// the tiles of rows that a block takes.
#pragma once

#include "device.h"
#include "launch.h"

namespace dlcore::cuda {

constexpr int kRun = 4;
// Runs of a thread in a tile: the loads that are in flight at once.
constexpr int kRuns = 2;
constexpr int kTileThreads = 256;
// Blocks that a multiprocessor has registers for, at least.
constexpr int kTileBlocks = 2;

// Four floats of which WIDTH are loaded at once; zeros where the row has ended.
template <int WIDTH>
__device__ void load_floats(const float* p, int count, float (&x)[kRun]) {
  if (count >= kRun) {
#pragma unroll
    for (int i = 0; i < kRun; i += WIDTH) {
      const auto some = Packed<float, WIDTH>::load(p + i);
#pragma unroll
      for (int k = 0; k < WIDTH; ++k) x[i + k] = some.elements[k];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) x[i] = i < count ? p[i] : 0;
}

// A run of a row, as it lies in memory, of which WIDTH elements are loaded at once; zeros where the row has
// ended. It is only widened to floats when all loads have been asked for, so that several are in flight.
template <int WIDTH>
class Run {
 public:
  __device__ void load(const float* p, int count) {
    float x[kRun];
    load_floats<WIDTH>(p, count, x);
#pragma unroll
    for (int i = 0; i < kRun; ++i) word_[i] = bits_of(x[i]);
  }
  // 16 bits of any kind: two to a word, if at least two are loaded at once.
  __device__ void load(const uint16_t* p, int count) {
    if constexpr (WIDTH >= 2)
      if (count >= kRun) return load_words(p);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const uint32_t bits = i < count ? p[i] : 0;
      if (WIDTH == 1)
        word_[i] = bits;
      else
        word_[i / 2] = i % 2 ? word_[i / 2] | bits << 16 : bits;
    }
  }
  __device__ void widened(float, float (&x)[kRun]) const {
#pragma unroll
    for (int i = 0; i < kRun; ++i) x[i] = float_of(word_[i]);
  }
  template <class T>
  __device__ void widened(T, float (&x)[kRun]) const {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      Packed<T, 2> pair;
      pair.word = word_[WIDTH == 1 ? i : i / 2];
      x[i] = widen(pair.elements[WIDTH == 1 ? 0 : i % 2]);
    }
  }

 private:
  __device__ void load_words(const uint16_t* p) {
    if constexpr (WIDTH == 4) {
      const uint2 both = Packed<uint16_t, 4>::load(p).word;
      word_[0] = both.x;
      word_[1] = both.y;
    } else {
      word_[0] = Packed<uint16_t, 2>::load(p).word;
      word_[1] = Packed<uint16_t, 2>::load(p + 2).word;
    }
  }

  uint32_t word_[kRun];
};

template <int WIDTH, class T>
__device__ void store_run(T* p, int count, const float (&x)[kRun]) {
  if (count >= kRun) {
#pragma unroll
    for (int i = 0; i < kRun; i += WIDTH) {
      Packed<T, WIDTH> some;
#pragma unroll
      for (int k = 0; k < WIDTH; ++k) some.elements[k] = narrow_to<T>(x[i + k]);
      some.store(p + i);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    if (i < count) p[i] = narrow_to<T>(x[i]);
}

DLCORE_HD inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A row of a view.
struct Row {
  char* data = nullptr;
  DType dtype = DType::kFloat32;

  Row() = default;
  __device__ Row(const View& v, int64_t row)
      : data(v.data + (v.row<char>(row) - v.data) * bytes_of(v.dtype)), dtype(v.dtype) {}

  template <int WIDTH>
  __device__ void load(int64_t column, int count, Run<WIDTH>& run) const {
    if (dtype == DType::kFloat32)
      run.load(reinterpret_cast<const float*>(data) + column, count);
    else
      run.load(reinterpret_cast<const uint16_t*>(data) + column, count);
  }
  template <int WIDTH>
  __device__ void widened(const Run<WIDTH>& run, float (&x)[kRun]) const {
    with_dtype_of(dtype, [&](auto type) { run.widened(type, x); });
  }
  template <int WIDTH>
  __device__ void store(int64_t column, int count, const float (&x)[kRun]) const {
    with_dtype_of(dtype, [&](auto type) {
      store_run<WIDTH>(reinterpret_cast<decltype(type)*>(data) + column, count, x);
    });
  }

 private:
  template <class F>
  __device__ static void with_dtype_of(DType dtype, F f) {
    if (dtype == DType::kFloat32) return f(float{});
    if (dtype == DType::kBFloat16) return f(BFloat16{});
    f(Float16{});
  }
};

// How rows are cut: `lanes` threads side by side take a row's span, a block as many rows as fit; the tiles of
// a group of rows come one after the other.
struct Tiling {
  int64_t rows, columns;
  int lanes = 1;  // a power of two
  int64_t spans, tiles;

  Tiling(int64_t rows, int64_t columns) : rows(rows), columns(columns) {
    while (lanes < kTileThreads && span() < columns) lanes *= 2;
    spans = ceil_div(columns, span());
    tiles = ceil_div(rows, kTileThreads / lanes) * spans;
  }
  DLCORE_HD int64_t span() const { return int64_t{lanes} * kRuns * kRun; }
};

// Where a thread works.
struct Place {
  int64_t row, span, first;  // its row, its span of it, and the span's first column
  int left;                  // columns of the span
  int own, apart;            // where this thread's first run begins in it, and how far away the next one
  bool live;                 // whether there is such a row

  // This thread's k-th run: where it begins in the span, and how many columns are left there.
  __device__ int column(int k) const { return own + k * apart; }
  __device__ int count(int k) const { return left - column(k); }
};

// Each block takes tiles that follow each other: enter(row) where a thread's row is another, body(place) on
// every tile, by all threads of the block.
template <class Enter, class Body>
__device__ void for_tiles(const Tiling& t, Enter enter, Body body) {
  int64_t tile = t.tiles * blockIdx.x / gridDim.x;
  const int64_t end = t.tiles * (blockIdx.x + 1) / gridDim.x;
  if (tile == end) return;
  const int abreast = kTileThreads / t.lanes;
  Place place;
  place.row = tile / t.spans * abreast + static_cast<int>(threadIdx.x) / t.lanes;
  place.span = tile % t.spans;
  place.own = (static_cast<int>(threadIdx.x) & (t.lanes - 1)) * kRun;
  place.apart = t.lanes * kRun;
  for (bool fresh = true; tile < end; ++tile) {
    place.live = place.row < t.rows;
    if (fresh && place.live) enter(place.row);
    place.first = place.span * t.span();
    const int64_t left = t.columns - place.first;
    place.left = static_cast<int>(left < t.span() ? left : t.span());
    body(place);
    fresh = ++place.span == t.spans;
    if (!fresh) continue;
    place.span = 0;
    place.row += abreast;
  }
}

// The sum over the threads of a row, in each of them. Called by all threads of a block; `shared` has a place
// for each warp.
__device__ inline double sum_row(double x, int lanes, double* shared) {
  for (int other = (lanes < kWarp ? lanes : kWarp) / 2; other > 0; other /= 2)
    x += __shfl_xor_sync(kAllLanes, x, other);
  if (lanes <= kWarp) return x;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = lanes / kWarp;
  __syncthreads();  // the sums before have been read
  if (lane_id() == 0) shared[warp] = x;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < warps; ++i) total += shared[warp / warps * warps + i];
  return total;
}

// The number of elements, up to four, that loads and stores of all these rows can take at once.
inline int narrowest(int width) { return width; }
template <class... Rest>
int narrowest(int width, const View& v, const Rest&... rest) {
  if (v.data) width = std::min(width, most_abreast(v, bytes_of(v.dtype)));
  return narrowest(width, rest...);
}

// A contiguous float32 array of rows as a view.
inline View floats(const float* data, int64_t rows, int64_t columns) {
  View v;
  v.data = reinterpret_cast<char*>(const_cast<float*>(data));
  v.rows = rows;
  v.columns = columns;
  if (rows == 1) return v;
  v.lead_dims = 1;
  v.lead_size[0] = rows;
  v.lead_stride[0] = columns;
  return v;
}

// Calls f with the width as a constant.
template <class F>
void with_width(int width, F f) {
  if (width == 4) return f(std::integral_constant<int, 4>{});
  if (width == 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}

}  // namespace dlcore::cuda
