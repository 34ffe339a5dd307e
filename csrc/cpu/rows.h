// Reading a row of logits, of any dtype, in groups of 256 floats.
#pragma once

#include <algorithm>

#include "categorical.h"
#include "simd.h"
#include "vector_math.h"

namespace dlcore::DLCORE_ISA {

constexpr uintptr_t kCacheLine = 64;
// How many bytes ahead of a pass memory is asked for; found by trial.
constexpr uintptr_t kAhead = 16384;

// Asks for memory that lies `ahead` bytes from p, to read it or to write it; past the row's end that does no
// harm. (Inlined always: GCC drops calls of a function that does nothing but prefetch.)
template <uintptr_t bytes, int write, int locality = 3>
__attribute__((always_inline)) inline void prefetch_lines(const void* p, uintptr_t ahead) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(p) + ahead;
  for (uintptr_t i = 0; i < bytes; i += kCacheLine)
    __builtin_prefetch(reinterpret_cast<const void*>(from + i), write, locality);
}
template <int64_t count, class T>
__attribute__((always_inline)) inline void prefetch(const T* p, uintptr_t ahead) {
  prefetch_lines<count * sizeof(T), 0>(p, ahead);
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <int N>
inline auto load_halves(const void* p) {
  Lanes<WordPart, N> r;
  for (auto& part : r.part) {
    HalfPart halves;
    std::memcpy(&halves, p, sizeof halves);
    part = __builtin_convertvector(halves, WordPart);
    p = static_cast<const char*>(p) + sizeof halves;
  }
  return r;
}

inline Floats load(const BFloat16* p) { return floats_of(load_halves<kParts>(p) << 16); }

inline FloatPart widen(HalfPart half) {
#if defined(__AVX512F__)
  return (FloatPart)_mm512_maskz_cvtph_ps(0xFFFF, (__m256i)half);
#elif defined(__F16C__)
  return (FloatPart)_mm256_cvtph_ps((__m128i)half);
#else
  const WordPart h = __builtin_convertvector(half, WordPart);
  const WordPart magnitude = (h & 0x7FFFu) << 13;
  // 2^112 moves the exponent's bias, and makes subnormals right; infinities and NaN want the top exponent.
  const auto finite = (WordPart)((FloatPart)magnitude * 0x1p112f);
  const WordPart special = magnitude | 0x7F800000u;
  return (FloatPart)(((FloatPart)magnitude < 0x1p-96f ? finite : special) | (h & 0x8000u) << 16);
#endif
}

inline Floats load(const Float16* p) {
  Floats r;
  for (auto& part : r.part) {
    HalfPart halves;
    std::memcpy(&halves, p, sizeof halves);
    part = widen(halves);
    p += kPartLanes;
  }
  return r;
}

// Several sixteens at once, for sums over a group: in no particular order, but the same on every ISA level.
template <class T>
inline WideFloats load_wide(const T* p) {
  WideFloats r;
  for (int k = 0; k < kAbreast; ++k) {
    const Floats x = load(p + k * kLanes);
    for (int i = 0; i < kParts; ++i) r.part[k * kParts + i] = x.part[i];
  }
  return r;
}

// Even entries in one sixteen, odd ones in the next: two operations for two numbers, and no shuffle.
inline WideFloats load_wide(const BFloat16* p) {
  WideFloats r;
  for (int k = 0; k < kAbreast; k += 2)
    for (int i = 0; i < kParts; ++i) {
      WordPart both;
      std::memcpy(&both, p + k * kLanes + 2 * i * kPartLanes, sizeof both);
      r.part[k * kParts + i] = (FloatPart)(both << 16);
      r.part[(k + 1) * kParts + i] = (FloatPart)(both & 0xFFFF0000u);
    }
  return r;
}

inline float scalar(float x) { return x; }
template <class T>
inline float scalar(T x) {
  T lanes[kLanes] = {x};
  float wide[kLanes];
  store(wide, load(lanes));
  return wide[0];
}

inline void store_halves(void* p, const Words& x) {
  for (const auto& part : x.part) {
    const HalfPart halves = __builtin_convertvector(part, HalfPart);
    std::memcpy(p, &halves, sizeof halves);
    p = static_cast<char*>(p) + sizeof halves;
  }
}

inline void store_as(float* p, const Floats& x) { store(p, x); }

// Round to nearest even; NaN stays NaN.
inline void store_as(BFloat16* p, const Floats& x) {
  const Words b = words_of(x);
  const Words rounded = (b + 0x7FFFu + ((b >> 16) & 1u)) >> 16;
  store_halves(p, select(equal(x, x), rounded, 0x7FC0u));
}

inline void store_as(Float16* p, const Floats& x) {
  const Words b = words_of(x);
  const Words magnitude = b & 0x7FFFFFFFu;
  const Floats size = floats_of(magnitude);
  // Subnormal halves: adding 0.5 rounds at 2^-24 and leaves the bits in the low mantissa.
  const Words subnormal = words_of(size + 0.5f) - 0x3F000000u;
  const Words normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  Words r = select(less(size, 0x1p-14f), subnormal, normal);
  r = select(less(size, 65520.0f), r, 0x7C00u);
  store_halves(p, select(equal(x, x), r | ((b >> 16) & 0x8000u), 0x7E00u));
}

// `count` <= 256 entries as 256 floats, -inf past the end.
template <class T>
inline void read_group(const T* p, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(p + i));
  if (i == kGroup) return;
  T tail[kLanes] = {};
  std::memcpy(tail, p + i, static_cast<size_t>(count - i) * sizeof(T));
  store(out + i, load(tail));
  std::fill(out + count, out + kGroup, -std::numeric_limits<float>::infinity());
}

template <class T>
inline void write_group(T* p, int64_t count, const float* values) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_as(p + i, load(values + i));
  if (i == count) return;
  T tail[kLanes];
  store_as(tail, load(values + i));
  std::memcpy(p + i, tail, static_cast<size_t>(count - i) * sizeof(T));
}

// cap·tanh(x / cap); +inf, which no row may hold, becomes NaN.
inline Floats softcapped(const Floats& x, float cap) {
  // tanh(a) = sign(a)·(1 - e)/(1 + e), e = exp(-2|a|); close to 0 its series, where 1 - e cancels.
  const Floats a = x * (1.0f / cap);
  const Floats size = floats_of(words_of(a) & 0x7FFFFFFFu);
  const Floats e = exp2(max(kExponentFloor, size * (-2.0f * kLog2E)));
  const Floats far = (1.0f - e) / (e + 1.0f);
  const Floats square = size * size;
  Floats p = square * (-62.0f / 2835) + 17.0f / 315;
  p = square * p - 2.0f / 15;
  p = square * p + 1.0f / 3;
  const Floats tanh = select(less(size, 0.3f), size - size * square * p, far);
  const Floats capped = floats_of(words_of(tanh) | (words_of(a) & 0x80000000u)) * cap;
  return select(equal(x, std::numeric_limits<float>::infinity()), std::numeric_limits<float>::quiet_NaN(),
                capped);
}

// Softmax's parameters for one row.
struct RowSoftmax {
  int64_t index = -1;
  int64_t exclude = -1;
  float shift = 0;
  float inverse_temperature = 1;
  float softcap = 0;
  bool greedy = false;

  RowSoftmax() = default;
  RowSoftmax(const Softmax& softmax, int64_t row) : exclude(softmax.exclude), softcap(softmax.softcap) {
    if (softmax.index) index = softmax.index[row];
    if (softmax.shift) shift = softmax.shift[row];
    if (!softmax.temperature) return;
    greedy = softmax.temperature[row] == 0;
    if (!greedy) inverse_temperature = 1.0f / softmax.temperature[row];
  }

  // One entry as the softmax takes it, before the temperature.
  float transform(float x, int64_t token) const {
    if (softcap > 0) {
      float lanes[kLanes] = {x};
      store(lanes, softcapped(load(lanes), softcap));
      x = lanes[0];
    }
    if (token == index) x += shift;
    return token == exclude ? -std::numeric_limits<float>::infinity() : x;
  }

  // Whether a group at `token` holds an entry that the plain loops would get wrong.
  bool special(int64_t token) const {
    const auto inside = [token](int64_t id) { return id >= token && id < token + kGroup; };
    return softcap > 0 || (shift != 0 && inside(index)) || inside(exclude);
  }
};

// The group at `token` as 256 transformed floats, -inf past the end.
template <class T>
inline void read_transformed(const T* p, int64_t count, int64_t token, const RowSoftmax& row, float* out) {
  read_group(p, count, out);
  if (row.softcap > 0) {
    for (int64_t i = 0; i < kGroup; i += kLanes) store(out + i, softcapped(load(out + i), row.softcap));
    std::fill(out + count, out + kGroup, -std::numeric_limits<float>::infinity());
  }
  const auto at = [&](int64_t id) {
    return id >= token && id < token + count ? out + (id - token) : nullptr;
  };
  if (float* x = at(row.index)) *x += row.shift;
  if (float* x = at(row.exclude)) *x = -std::numeric_limits<float>::infinity();
}

template <class F>
inline void with_dtype(DType dtype, F f) {
  if (dtype == DType::kFloat32) return f(float{});
  if (dtype == DType::kBFloat16) return f(BFloat16{});
  f(Float16{});
}

}  // namespace dlcore::DLCORE_ISA
