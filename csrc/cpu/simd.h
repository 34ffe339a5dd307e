// Sixteen lanes of float or uint32, whatever the machine's vectors hold: one, two or four registers.
//
// The compiler fuses and reorders nothing here (-ffp-contract=off), so all levels with fused multiply-add
// compute the same bits; x86-64's baseline has none and rounds twice in `fused`. Everything lives in the
// ISA's own namespace: a function compiled for AVX-512 must never be picked by the linker for a machine
// without it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace dlcore::DLCORE_ISA {

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kPartBytes = 64;
#elif defined(__AVX2__)
constexpr int kPartBytes = 32;
#else
constexpr int kPartBytes = 16;
#endif
constexpr int kPartLanes = kPartBytes / 4;
constexpr int kParts = kLanes / kPartLanes;

typedef float FloatPart __attribute__((vector_size(kPartBytes)));
typedef uint32_t WordPart __attribute__((vector_size(kPartBytes)));
typedef int32_t IntPart __attribute__((vector_size(kPartBytes)));
typedef uint64_t WidePart __attribute__((vector_size(kPartBytes)));
typedef uint16_t HalfPart __attribute__((vector_size(kPartBytes / 2)));

template <class P, int N = kParts>
struct Lanes {
  P part[N];
};
using Floats = Lanes<FloatPart>;
using Words = Lanes<WordPart>;
using Mask = Lanes<IntPart>;

// Several Floats that go through an expression side by side, where registers allow: latencies overlap.
constexpr int kAbreast = kParts == 1 ? 4 : 2;
using WideFloats = Lanes<FloatPart, kAbreast * kParts>;

// Applies f to the parts of its arguments.
template <class F, class P, int N, class... Q>
inline auto each(F f, const Lanes<P, N>& first, const Lanes<Q, N>&... rest) {
  Lanes<decltype(f(first.part[0], rest.part[0]...)), N> result;
  for (int i = 0; i < N; ++i) result.part[i] = f(first.part[i], rest.part[i]...);
  return result;
}

template <class P, int N>
inline Lanes<P, N> operator+(const Lanes<P, N>& a, const Lanes<P, N>& b) {
  return each([](P x, P y) { return x + y; }, a, b);
}
template <class P, int N>
inline Lanes<P, N> operator-(const Lanes<P, N>& a, const Lanes<P, N>& b) {
  return each([](P x, P y) { return x - y; }, a, b);
}
template <class P, int N>
inline Lanes<P, N> operator*(const Lanes<P, N>& a, const Lanes<P, N>& b) {
  return each([](P x, P y) { return x * y; }, a, b);
}
template <class P, int N>
inline Lanes<P, N> operator/(const Lanes<P, N>& a, const Lanes<P, N>& b) {
  return each([](P x, P y) { return x / y; }, a, b);
}
template <class P, int N>
inline Lanes<P, N> operator^(const Lanes<P, N>& a, const Lanes<P, N>& b) {
  return each([](P x, P y) { return x ^ y; }, a, b);
}
template <class P, int N>
inline Lanes<P, N> operator|(const Lanes<P, N>& a, const Lanes<P, N>& b) {
  return each([](P x, P y) { return x | y; }, a, b);
}

// x in all lanes. (x - 0 is x to the compiler; 0 + x is not, for x = -0.)
inline FloatPart spread(float x) { return x - FloatPart{}; }

// A scalar on either side stands for all lanes.
template <class P, int N>
using Scalar = std::remove_reference_t<decltype(P{}[0])>;

template <class P, int N>
inline Lanes<P, N> operator+(const Lanes<P, N>& a, Scalar<P, N> b) {
  return each([b](P x) { return x + b; }, a);
}
template <class P, int N>
inline Lanes<P, N> operator-(const Lanes<P, N>& a, Scalar<P, N> b) {
  return each([b](P x) { return x - b; }, a);
}
template <class P, int N>
inline Lanes<P, N> operator-(Scalar<P, N> a, const Lanes<P, N>& b) {
  return each([a](P x) { return a - x; }, b);
}
template <class P, int N>
inline Lanes<P, N> operator*(const Lanes<P, N>& a, Scalar<P, N> b) {
  return each([b](P x) { return x * b; }, a);
}
template <class P, int N>
inline Lanes<P, N> operator/(Scalar<P, N> a, const Lanes<P, N>& b) {
  return each([a](P x) { return a / x; }, b);
}
template <class P, int N>
inline Lanes<P, N> operator&(const Lanes<P, N>& a, Scalar<P, N> b) {
  return each([b](P x) { return x & b; }, a);
}
template <class P, int N>
inline Lanes<P, N> operator|(const Lanes<P, N>& a, Scalar<P, N> b) {
  return each([b](P x) { return x | b; }, a);
}
template <class P, int N>
inline Lanes<P, N> operator^(const Lanes<P, N>& a, Scalar<P, N> b) {
  return each([b](P x) { return x ^ b; }, a);
}
template <class P, int N>
inline Lanes<P, N> operator<<(const Lanes<P, N>& a, int n) {
  return each([n](P x) { return x << n; }, a);
}
template <class P, int N>
inline Lanes<P, N> operator>>(const Lanes<P, N>& a, int n) {
  return each([n](P x) { return x >> n; }, a);
}

inline Floats broadcast(float x) {
  return each([x](FloatPart) { return spread(x); }, Floats{});
}
inline Words broadcast(uint32_t x) {
  return each([x](WordPart) { return WordPart{} + x; }, Words{});
}

// 0, 1, 2, ...
template <int N = kParts>
inline Lanes<WordPart, N> lane_ids() {
  WordPart ids;
  for (int i = 0; i < kPartLanes; ++i) ids[i] = static_cast<uint32_t>(i);
  Lanes<WordPart, N> r;
  for (int i = 0; i < N; ++i) r.part[i] = ids + static_cast<uint32_t>(i * kPartLanes);
  return r;
}

// Part by part: a copy of the whole would go through the stack.
template <class L>
inline L load_lanes(const void* p) {
  L r;
  for (auto& part : r.part) {
    std::memcpy(&part, p, sizeof part);
    p = static_cast<const char*>(p) + sizeof part;
  }
  return r;
}
template <class P, int N>
inline void store(void* p, const Lanes<P, N>& x) {
  for (const auto& part : x.part) {
    std::memcpy(p, &part, sizeof part);
    p = static_cast<char*>(p) + sizeof part;
  }
}
inline Floats load(const float* p) { return load_lanes<Floats>(p); }

// a0 b0 a1 b1 a2 ...
template <int N>
inline void store_interleaved(float* out, const Lanes<FloatPart, N>& a, const Lanes<FloatPart, N>& b) {
  IntPart low, high;
  for (int i = 0; i < kPartLanes; ++i) {
    low[i] = i / 2 + i % 2 * kPartLanes;
    high[i] = low[i] + kPartLanes / 2;
  }
  for (int i = 0; i < N; ++i, out += 2 * kPartLanes) {
    const FloatPart first = __builtin_shuffle(a.part[i], b.part[i], low);
    const FloatPart second = __builtin_shuffle(a.part[i], b.part[i], high);
    std::memcpy(out, &first, sizeof first);
    std::memcpy(out + kPartLanes, &second, sizeof second);
  }
}

// The k-th sixteen lanes of several.
inline Floats slice(const WideFloats& x, int k) {
  Floats r;
  for (int i = 0; i < kParts; ++i) r.part[i] = x.part[k * kParts + i];
  return r;
}

template <int N>
inline Lanes<WordPart, N> words_of(const Lanes<FloatPart, N>& x) {
  return each([](FloatPart v) { return (WordPart)v; }, x);
}
template <int N>
inline Lanes<FloatPart, N> floats_of(const Lanes<WordPart, N>& x) {
  return each([](WordPart v) { return (FloatPart)v; }, x);
}

template <int N>
inline Lanes<IntPart, N> less(const Lanes<FloatPart, N>& a, const Lanes<FloatPart, N>& b) {
  return each([](FloatPart x, FloatPart y) { return (IntPart)(x < y); }, a, b);
}
template <int N>
inline Lanes<IntPart, N> less(const Lanes<FloatPart, N>& a, float b) {
  return each([b](FloatPart x) { return (IntPart)(x < b); }, a);
}
template <int N>
inline Lanes<IntPart, N> equal(const Lanes<FloatPart, N>& a, const Lanes<FloatPart, N>& b) {
  return each([](FloatPart x, FloatPart y) { return (IntPart)(x == y); }, a, b);
}
template <int N>
inline Lanes<IntPart, N> equal(const Lanes<FloatPart, N>& a, float b) {
  return each([b](FloatPart x) { return (IntPart)(x == b); }, a);
}
template <class P, int N>
inline Lanes<P, N> select(const Lanes<IntPart, N>& mask, const Lanes<P, N>& yes, const Lanes<P, N>& no) {
  return each([](IntPart m, P y, P n) { return m ? y : n; }, mask, yes, no);
}
template <class P, int N>
inline Lanes<P, N> select(const Lanes<IntPart, N>& mask, const Lanes<P, N>& yes, Scalar<P, N> no) {
  return each([no](IntPart m, P y) { return m ? y : P{} + no; }, mask, yes);
}
template <class P, int N>
inline Lanes<P, N> select(const Lanes<IntPart, N>& mask, Scalar<P, N> yes, const Lanes<P, N>& no) {
  return each([yes](IntPart m, P n) { return m ? P{} + yes : n; }, mask, no);
}

// Bit i: lane i of the mask.
inline uint32_t lane_bits(const Mask& mask) {
  uint32_t bits = 0;
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    const auto part = static_cast<uint32_t>(_mm512_movepi32_mask((__m512i)mask.part[i]));
#elif defined(__AVX2__)
    const auto part = static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask.part[i]));
#elif defined(__SSE2__)
    const auto part = static_cast<uint32_t>(_mm_movemask_ps((__m128)mask.part[i]));
#else
    uint32_t part = 0;
    for (int lane = 0; lane < kPartLanes; ++lane) part |= (mask.part[i][lane] & 1u) << lane;
#endif
    bits |= part << (i * kPartLanes);
  }
  return bits;
}

// a > b ? a : b, so b where either is NaN.
// (Masked intrinsics stand for plain ones that GCC 12 warns about in its own header.)
inline FloatPart max(FloatPart a, FloatPart b) {
#if defined(__AVX512F__)
  return (FloatPart)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (FloatPart)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (FloatPart)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
template <int N>
inline Lanes<FloatPart, N> max(const Lanes<FloatPart, N>& a, const Lanes<FloatPart, N>& b) {
  return each([](FloatPart x, FloatPart y) { return max(x, y); }, a, b);
}
template <int N>
inline Lanes<FloatPart, N> max(float a, const Lanes<FloatPart, N>& b) {
  return each([a](FloatPart y) { return max(spread(a), y); }, b);
}

// The square root, correctly rounded.
inline FloatPart root(FloatPart x) {
#if defined(__AVX512F__)
  return (FloatPart)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);
#elif defined(__AVX2__)
  return (FloatPart)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (FloatPart)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kPartLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
template <int N>
inline Lanes<FloatPart, N> root(const Lanes<FloatPart, N>& x) {
  return each([](FloatPart v) { return root(v); }, x);
}

// a < b ? a : b, so b where either is NaN.
inline FloatPart min(FloatPart a, FloatPart b) {
#if defined(__AVX512F__)
  return (FloatPart)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (FloatPart)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (FloatPart)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
template <int N>
inline Lanes<FloatPart, N> min(float a, const Lanes<FloatPart, N>& b) {
  return each([a](FloatPart y) { return min(spread(a), y); }, b);
}

// Within ±limit; NaN stays NaN.
template <int N>
[[gnu::always_inline]] inline Lanes<FloatPart, N> clamped(const Lanes<FloatPart, N>& x, float limit) {
  return max(-limit, min(limit, x));
}

// 0, where x is less; NaN stays NaN.
template <int N>
[[gnu::always_inline]] inline Lanes<FloatPart, N> positive_part(const Lanes<FloatPart, N>& x) {
  return max(0.0f, x);
}

template <int N>
[[gnu::always_inline]] inline Lanes<FloatPart, N> magnitude(const Lanes<FloatPart, N>& x) {
  return floats_of(words_of(x) & 0x7FFFFFFFu);
}

// Whether `fused` rounds once.
#if defined(__AVX512F__) || defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// a·b + c, rounded once where the machine can.
inline FloatPart fused(FloatPart a, FloatPart b, FloatPart c) {
#if defined(__AVX512F__)
  return (FloatPart)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (FloatPart)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (FloatPart)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
template <int N>
inline Lanes<FloatPart, N> fused(const Lanes<FloatPart, N>& a, const Lanes<FloatPart, N>& b,
                                 const Lanes<FloatPart, N>& c) {
  return each([](FloatPart x, FloatPart y, FloatPart z) { return fused(x, y, z); }, a, b, c);
}
template <int N>
inline Lanes<FloatPart, N> fused(const Lanes<FloatPart, N>& a, const Lanes<FloatPart, N>& b, float c) {
  return each([c](FloatPart x, FloatPart y) { return fused(x, y, spread(c)); }, a, b);
}
template <int N>
inline Lanes<FloatPart, N> fused(const Lanes<FloatPart, N>& a, float b, const Lanes<FloatPart, N>& c) {
  return each([b](FloatPart x, FloatPart z) { return fused(x, spread(b), z); }, a, c);
}
template <int N>
inline Lanes<FloatPart, N> fused(const Lanes<FloatPart, N>& a, float b, float c) {
  return each([b, c](FloatPart x) { return fused(x, spread(b), spread(c)); }, a);
}

// A float rounded to an integer n, to multiply others by 2^n. AVX-512 has both operations; elsewhere adding
// 1.5·2^23 rounds and leaves n in the low bits. The bits that come out are the same.
class Exponent {
 public:
  Exponent() = default;
#if defined(__AVX512F__)
  explicit Exponent(FloatPart x) : n_((FloatPart)_mm512_maskz_roundscale_ps(0xFFFF, (__m512)x, 0)) {}
  FloatPart value() const { return n_; }
  FloatPart scale(FloatPart x) const {
    return (FloatPart)_mm512_maskz_scalef_ps(0xFFFF, (__m512)x, (__m512)n_);
  }
#else
  explicit Exponent(FloatPart x) : n_(x + kMagic) {}
  FloatPart value() const { return n_ - kMagic; }
  FloatPart scale(FloatPart x) const { return (FloatPart)((WordPart)x + ((WordPart)n_ << 23)); }
#endif

 private:
  static constexpr float kMagic = 12582912.0f;
  FloatPart n_;
};

// The 64-bit products of the even 32-bit lanes with a word.
inline WidePart multiply_even(WidePart x, uint32_t word) {
#if defined(__AVX512F__)
  return (WidePart)_mm512_maskz_mul_epu32(0xFF, (__m512i)x, _mm512_set1_epi32(static_cast<int>(word)));
#elif defined(__AVX2__)
  return (WidePart)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi32(static_cast<int>(word)));
#elif defined(__SSE2__)
  return (WidePart)_mm_mul_epu32((__m128i)x, _mm_set1_epi32(static_cast<int>(word)));
#else
  return (x & 0xFFFFFFFFull) * word;
#endif
}

// 32-bit words in 64-bit lanes, whose upper halves hold anything: what products want. Those of lanes 0, 2,
// ... and those of lanes 1, 3, ...
template <int N>
struct SpreadWords {
  WidePart even[N], odd[N];
};

template <int N>
inline SpreadWords<N> spread_words(const Lanes<WordPart, N>& x) {
  SpreadWords<N> r;
  for (int i = 0; i < N; ++i) {
    r.even[i] = (WidePart)x.part[i];
    r.odd[i] = (WidePart)x.part[i] >> 32;
  }
  return r;
}

// The same word in all lanes.
template <int N>
inline SpreadWords<N> same_words(uint32_t word) {
  SpreadWords<N> r;
  for (int i = 0; i < N; ++i) r.even[i] = r.odd[i] = WidePart{} + word;
  return r;
}

template <int N>
inline Lanes<WordPart, N> gathered(const SpreadWords<N>& x) {
  IntPart from;
  for (int i = 0; i < kPartLanes; ++i) from[i] = i % 2 == 0 ? i : kPartLanes + i - 1;
  Lanes<WordPart, N> r;
  for (int i = 0; i < N; ++i)
    r.part[i] = __builtin_shuffle((WordPart)x.even[i], (WordPart)x.odd[i], (WordPart)from);
  return r;
}

inline WidePart exclusive_or(WidePart a, WidePart b, WidePart c) {
#if defined(__AVX512F__)
  return (WidePart)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// x[(i + by) % lanes] in lane i.
template <int by>
inline FloatPart rotate(FloatPart x) {
  IntPart from;
  for (int i = 0; i < kPartLanes; ++i) from[i] = (i + by) % kPartLanes;
  return __builtin_shuffle(x, from);
}

// Reductions in one fixed order, whatever the width: lanes 8 apart, 4 apart, 2 apart, neighbours.
template <class F>
inline float reduce(Floats x, F f) {
  for (int n = kParts / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x.part[i] = f(x.part[i], x.part[i + n]);
  FloatPart v = x.part[0];
  if constexpr (kPartLanes > 8) v = f(v, rotate<8>(v));
  if constexpr (kPartLanes > 4) v = f(v, rotate<4>(v));
  v = f(v, rotate<2>(v));
  v = f(v, rotate<1>(v));
  return v[0];
}
inline float sum(const Floats& x) {
  return reduce(x, [](FloatPart a, FloatPart b) { return a + b; });
}
inline float largest(const Floats& x) {
  return reduce(x, [](FloatPart a, FloatPart b) { return max(a, b); });
}

// The largest of `count` floats; here and below `count` is a multiple of 16.
inline float largest(const float* x, int64_t count) {
  Floats m = load(x);
  for (int64_t i = kLanes; i < count; i += kLanes) m = max(load(x + i), m);
  return largest(m);
}

// The first of `count` floats that is equal to `value`, the last one if none is.
inline int64_t first_equal(const float* x, int64_t count, float value) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const uint32_t found = lane_bits(equal(load(x + i), value));
    if (found != 0) return i + __builtin_ctz(found);
  }
  return count - 1;
}

// The largest of `count` floats, and the first place where it stands.
struct Largest {
  float value;
  int64_t at;
};
inline Largest first_largest(const float* x, int64_t count) {
  const float value = largest(x, count);
  return {value, first_equal(x, count, value)};
}

}  // namespace dlcore::DLCORE_ISA
