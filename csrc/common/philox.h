// Noise stream v1, one number at a time: the definition that every vectorised version follows.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DLCORE_HD __host__ __device__
#else
#define DLCORE_HD
#endif

namespace dlcore {

// What a draw is for; draws of different domains share no counter.
enum class Domain : uint32_t {
  kElement = 0,
  kGroup = 1,
  kToken = 2,
  kRoute = 3,
  kDirection = 8,
  kCosine = 9
};

struct Key {
  int64_t seed;
  int64_t offset;
};

struct Block {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;
// Keys the hash of fold_in apart from every draw under the same seed.
constexpr uint32_t kFoldTweak0 = 0x243F6A88u;
constexpr uint32_t kFoldTweak1 = 0x85A308D3u;

DLCORE_HD inline uint32_t low_word(uint64_t x) { return static_cast<uint32_t>(x); }
DLCORE_HD inline uint32_t high_word(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

// The 64 bits of a product. (Of a plain one nvcc makes two instructions.)
DLCORE_HD inline uint64_t product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t r;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(r) : "r"(a), "r"(b));
  return r;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// Philox4x32-10: Salmon, Moraes, Dror and Shaw, SC 2011.
DLCORE_HD inline Block philox(Block counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = product(counter.word[0], kPhiloxMultiplier0);
    const uint64_t product1 = product(counter.word[2], kPhiloxMultiplier1);
    counter = {{high_word(product1) ^ counter.word[1] ^ key0, low_word(product1),
                high_word(product0) ^ counter.word[3] ^ key1, low_word(product0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

DLCORE_HD inline Key fold_in(Key key, int64_t data) {
  const auto seed = static_cast<uint64_t>(key.seed);
  const auto offset = static_cast<uint64_t>(key.offset);
  const auto value = static_cast<uint64_t>(data);
  const Block hashed = philox({{low_word(offset), high_word(offset), low_word(value), high_word(value)}},
                              low_word(seed) ^ kFoldTweak0, high_word(seed) ^ kFoldTweak1);
  return {key.seed, static_cast<int64_t>(static_cast<uint64_t>(hashed.word[1]) << 32 | hashed.word[0])};
}

// The second counter word of a draw: its domain, and the index's bits above 2^33.
DLCORE_HD inline uint32_t domain_word(Domain domain, int64_t block) {
  return static_cast<uint32_t>(domain) << 24 | high_word(static_cast<uint64_t>(block));
}

// Block i carries the 64 bits of draws 2i and 2i + 1.
DLCORE_HD inline Block block(Key key, Domain domain, int64_t index) {
  const auto seed = static_cast<uint64_t>(key.seed);
  const auto offset = static_cast<uint64_t>(key.offset);
  return philox({{low_word(static_cast<uint64_t>(index)), domain_word(domain, index), low_word(offset),
                  high_word(offset)}},
                low_word(seed), high_word(seed));
}

DLCORE_HD inline uint64_t bits(const Block& b, int half) {
  return static_cast<uint64_t>(b.word[2 * half + 1]) << 32 | b.word[2 * half];
}

// 53 bits -> (0, 1).
DLCORE_HD inline double uniform(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1p-53 + 0x1p-54; }

// An integer in [0, n) for n < 2^31.
DLCORE_HD inline int64_t below(uint64_t bits, int64_t n) {
  const auto count = static_cast<uint64_t>(n);
  return static_cast<int64_t>((high_word(bits) * count + (low_word(bits) * count >> 32)) >> 32);
}

}  // namespace dlcore
