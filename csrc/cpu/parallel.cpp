#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace dlcore {
namespace {

// The entry point that GCC's and LLVM's OpenMP runtimes share.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

struct Runtime {
  GompParallel parallel = nullptr;
  std::string name = "std::thread";
};

#if defined(__linux__)
int find_openmp(dl_phdr_info* info, size_t, void* result) {
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* file = slash ? slash + 1 : info->dlpi_name;
  if (!std::strstr(file, "libgomp") && !std::strstr(file, "libomp") && !std::strstr(file, "libiomp"))
    return 0;
  void* library = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY);
  if (!library) return 0;
  auto* runtime = static_cast<Runtime*>(result);
  runtime->parallel = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
  if (runtime->parallel) runtime->name = file;
  return runtime->parallel ? 1 : 0;
}
#endif

// Looked up once, when the first kernel runs: torch has loaded its runtime by then.
const Runtime& runtime() {
  static const Runtime found = [] {
    Runtime r;
#if defined(__linux__)
    dl_iterate_phdr(find_openmp, &r);
#endif
    return r;
  }();
  return found;
}

struct Loop {
  RangeFunction function;
  void* context;
  int64_t count;
  int64_t chunk;
  std::atomic<int64_t> next{0};
};

void work(void* data) {
  auto* loop = static_cast<Loop*>(data);
  for (;;) {
    const int64_t begin = loop->next.fetch_add(loop->chunk, std::memory_order_relaxed);
    if (begin >= loop->count) return;
    loop->function(loop->context, begin, std::min(begin + loop->chunk, loop->count));
  }
}

}  // namespace

const char* parallel_runtime() { return runtime().name.c_str(); }

void parallel_ranges(RangeFunction function, void* context, int64_t count, int threads) {
  if (count <= 0) return;
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) return function(context, 0, count);
  // Several chunks a thread even out what else runs on the machine.
  Loop loop{function, context, count, std::max<int64_t>(1, count / (8 * threads))};
  if (runtime().parallel) {
    runtime().parallel(work, &loop, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(work, &loop);
  work(&loop);
  for (auto& helper : helpers) helper.join();
}

}  // namespace dlcore
