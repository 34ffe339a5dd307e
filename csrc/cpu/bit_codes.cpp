// Tokens to bits and back. Compiled once per ISA level.
#include "../common/bits_functions.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace dlcore::DLCORE_ISA {
namespace {

// Rows that one task takes: a row is short.
constexpr int64_t kRowsAtOnce = 256;
constexpr int kMostBits = 64;

// The lowest `width` bits the other way round.
uint64_t reversed(uint64_t x, int width) {
  x = (x >> 1 & 0x5555555555555555u) | (x & 0x5555555555555555u) << 1;
  x = (x >> 2 & 0x3333333333333333u) | (x & 0x3333333333333333u) << 2;
  x = (x >> 4 & 0x0F0F0F0F0F0F0F0Fu) | (x & 0x0F0F0F0F0F0F0F0Fu) << 4;
  return __builtin_bswap64(x) >> (64 - width);
}

// Calls body(begin, end) on ranges that cover all rows.
template <class Body>
void for_rows(int64_t rows, int threads, Body body) {
  parallel_for((rows + kRowsAtOnce - 1) / kRowsAtOnce, threads,
               [&](int64_t task) { body(task * kRowsAtOnce, std::min(rows, (task + 1) * kRowsAtOnce)); });
}

// The bit of a code's sixteen that each lane takes.
Words lane_bit_masks(bool msb) {
  Words r;
  for (int i = 0; i < kLanes; ++i) r.part[i / kPartLanes][i % kPartLanes] = 1u << (msb ? kLanes - 1 - i : i);
  return r;
}

// The sixteen bits of a code that stand at columns [at, at + 16), as lane_bit_masks takes them.
uint32_t sixteen_bits(uint64_t code, int width, int at, bool msb) {
  const int shift = msb ? width - kLanes - at : at;
  return static_cast<uint32_t>(shift >= 0 ? code >> shift : code << -shift);
}

template <class T>
int64_t decode_row(const BitDecodeArguments& a, const T* row, int width) {
  uint64_t code = 0;
  uint32_t broken = 0;
  for (int at = 0; at < width; at += kLanes) {
    Floats x;
    uint32_t valid = 0xFFFFu;
    if (at + kLanes <= width) {
      x = load(row + at);
    } else {
      T padded[kLanes] = {};
      std::memcpy(padded, row + at, static_cast<size_t>(width - at) * sizeof(T));
      x = load(padded);
      valid = (1u << (width - at)) - 1;
    }
    code |= static_cast<uint64_t>(lane_bits(less(broadcast(a.threshold), x)) & valid) << at;
    broken |= ~lane_bits(equal(x, x)) & valid;
  }
  if (broken) return -1;
  if (a.msb) code = reversed(code, width);
  if (a.gray) code = from_gray(code);
  return wrapped(static_cast<int64_t>(code), a.vocab);
}

}  // namespace

namespace {

// What all tokens share is copied: for all that is known a result's store could change it.
void encode_rows(const BitEncodeArguments a, int64_t begin, int64_t end) {
  const Words masks = lane_bit_masks(a.msb);
  const Floats low = broadcast(a.low), high = broadcast(a.high);
  const auto code_of = [&](int64_t r) {
    const auto token = static_cast<uint64_t>(a.tokens[r]);
    return a.gray ? to_gray(token) : token;
  };
  const auto sixteen = [&](uint64_t code, int at) {
    const Words word = broadcast(sixteen_bits(code, a.width, at, a.msb));
    const Mask set = each([](WordPart w, WordPart m) { return (IntPart)((w & m) != 0); }, word, masks);
    return select(set, high, low);
  };
  const int padded = (a.width + kLanes - 1) / kLanes * kLanes;
  // What a row stores past its end later ones store over; the last ones must not.
  const int64_t last = end - (padded + a.width - 1) / a.width;
  float* out = a.out + begin * a.width;
  int64_t r = begin;
  for (; r <= last; ++r, out += a.width) {
    const uint64_t code = code_of(r);
    store(out, sixteen(code, 0));
    for (int at = kLanes; at < a.width; at += kLanes) store(out + at, sixteen(code, at));
  }
  for (; r < end; ++r, out += a.width) {
    float row[kMostBits];
    for (int at = 0; at < a.width; at += kLanes) store(row + at, sixteen(code_of(r), at));
    std::memcpy(out, row, static_cast<size_t>(a.width) * sizeof(float));
  }
}

}  // namespace

void bit_encode(const BitEncodeArguments& a) {
  for_rows(a.count, a.threads, [&](int64_t begin, int64_t end) { encode_rows(a, begin, end); });
}

void bit_decode(const BitDecodeArguments& a) {
  const int width = static_cast<int>(a.x.columns);
  with_dtype(a.x.dtype, [&](auto type) {
    for_rows(a.x.rows, a.threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        a.tokens[r] = decode_row(a, a.x.row<const decltype(type)>(r), width);
    });
  });
}

}  // namespace dlcore::DLCORE_ISA
