#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <string>
#include <system_error>
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
// The loaded libraries that may lead to an OpenMP runtime: torch's kernels, by what they link, before any
// other.
int collect(dl_phdr_info* info, size_t, void* result) {
  auto* names = static_cast<std::vector<std::string>*>(result);
  const std::string name = info->dlpi_name;
  const std::string file = name.substr(name.rfind('/') + 1);
  if (file.rfind("libtorch_cpu", 0) == 0) names->insert(names->begin(), name);
  for (const char* runtime : {"libgomp", "libomp", "libiomp"})
    if (file.rfind(runtime, 0) == 0) names->push_back(name);
  return 0;
}

Runtime find_openmp() {
  std::vector<std::string> names;
  dl_iterate_phdr(collect, &names);
  for (const std::string& name : names) {
    void* library = dlopen(name.c_str(), RTLD_NOLOAD | RTLD_LAZY);
    void* entry = library ? dlsym(library, "GOMP_parallel") : nullptr;
    Dl_info where;
    if (entry && dladdr(entry, &where)) return {reinterpret_cast<GompParallel>(entry), where.dli_fname};
  }
  return {};
}
#else
Runtime find_openmp() { return {}; }
#endif

// Looked up once, when the first kernel runs: torch has loaded its runtime by then.
const Runtime& runtime() {
  static const Runtime found = find_openmp();
  return found;
}

struct Loop {
  RangeFunction function;
  void* context;
  int64_t count;
  int64_t chunk;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error = nullptr;
};

void work(void* data) {
  auto* loop = static_cast<Loop*>(data);
  for (;;) {
    const int64_t begin = loop->next.fetch_add(loop->chunk, std::memory_order_relaxed);
    if (begin >= loop->count || loop->failed) return;
    try {
      loop->function(loop->context, begin, std::min(begin + loop->chunk, loop->count));
    } catch (...) {
      // It must not leave the parallel region: the caller throws it again.
      if (!loop->failed.exchange(true)) loop->error = std::current_exception();
    }
  }
}

}  // namespace

const char* parallel_runtime() {
  const std::string& name = runtime().name;
  return name.c_str() + (name.rfind('/') == std::string::npos ? 0 : name.rfind('/') + 1);
}

void parallel_ranges(RangeFunction function, void* context, int64_t count, int threads) {
  if (count <= 0) return;
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) return function(context, 0, count);
  // Several chunks a thread even out what else runs on the machine.
  Loop loop{function, context, count, std::max<int64_t>(1, count / (8 * threads))};
  if (runtime().parallel) {
    runtime().parallel(work, &loop, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<size_t>(threads - 1));
    try {
      for (int i = 1; i < threads; ++i) helpers.emplace_back(work, &loop);
    } catch (const std::system_error&) {
      // The machine has no more threads: those that there are do the work.
    }
    work(&loop);
    for (auto& helper : helpers) helper.join();
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace dlcore
