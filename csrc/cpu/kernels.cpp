#include "kernels.h"

#include <cstring>

namespace dlcore {
namespace {

struct Level {
  const Kernels& (*kernels)();
  bool (*runs_here)();
};

// The best first.
const Level levels[] = {
#if defined(DLCORE_HAS_AVX512)
    {avx512::level,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
#if defined(DLCORE_HAS_AVX2)
    {avx2::level,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
    {baseline::level, [] { return true; }},
};

const Kernels* best() {
  for (const Level& level : levels)
    if (level.runs_here()) return &level.kernels();
  return &baseline::level();
}

const Kernels*& current() {
  static const Kernels* chosen = best();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current(); }

bool choose_kernels(const char* name) {
  for (const Level& level : levels) {
    if (!level.runs_here() || std::strcmp(level.kernels().name, name) != 0) continue;
    current() = &level.kernels();
    return true;
  }
  return false;
}

}  // namespace dlcore
