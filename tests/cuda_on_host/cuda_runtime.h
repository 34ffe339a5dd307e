// CUDA's vocabulary on the host, for tests: the kernels of csrc/cuda, compiled by a plain C++ compiler, run
// block by block with every thread a fiber. A test of logic and indexing, not of speed.
//
// Threads give way at barriers and warp operations alone, and the next to run is drawn at random, so a thread
// may be far ahead of its neighbours wherever no barrier holds it back. What a GPU would leave undefined is
// an error here: barriers that not all threads of a block reach, lanes that a mask names and that never come,
// loads and stores at addresses that are not multiples of their size.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __constant__
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr : int { cudaDevAttrMultiProcessorCount = 16 };

// Where the running thread is.
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_on_host {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 17;
// So few that a persistent grid goes round several times in a small test.
constexpr int kMultiprocessors = 1;

enum class Waits : int { kNothing, kBlock, kWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Waits waits = Waits::kNothing;
  unsigned mask = 0;    // of the warp operation that it waits for
  uint64_t posted = 0;  // what it gives to the others of its warp
  void* sanitizer = nullptr;
};

class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  // Block by block; false, with `error` set, where a kernel does what no GPU defines.
  bool run(dim3 grid, dim3 block, const std::function<void()>& body) {
    gridDim = grid;
    blockDim = block;
    body_ = &body;
    error.clear();
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x && error.empty(); ++x) {
          blockIdx = {x, y, z};
          run_block();
        }
    return error.empty();
  }

  void block_barrier() { wait(Waits::kBlock, 0); }

  // How many of the block's threads say so.
  int block_count(bool predicate) {
    fibers_[current_].posted = predicate;
    wait(Waits::kBlock, 0);
    int found = 0;
    for (size_t i = 0; i < threads(); ++i)
      found += fibers_[i].waits != Waits::kDone && fibers_[i].posted != 0;
    wait(Waits::kBlock, 0);
    return found;
  }

  // Posts `value`, waits for the lanes of `mask`, and calls read(lane, posted) for each of them.
  template <class Read>
  void exchange(unsigned mask, uint64_t value, Read read) {
    if (!(mask >> lane() & 1)) fail("a lane takes part in a warp operation whose mask leaves it out");
    fibers_[current_].posted = value;
    wait(Waits::kWarp, mask);
    const size_t warp = current_ - lane();
    for (size_t i = 0; i < kWarp; ++i)
      if (mask >> i & 1) read(static_cast<int>(i), fibers_[warp + i].posted);
    // Nobody posts anew before all have read.
    wait(Waits::kWarp, mask);
  }

  void fail(const char* why) {
    if (error.empty()) error = why;
    fibers_[current_].waits = Waits::kDone;
    give_way();
  }

  size_t lane() const { return current_ % kWarp; }

  std::string error;
  uint64_t seed = 1;

 private:
  size_t threads() const { return size_t{blockDim.x} * blockDim.y * blockDim.z; }

  void run_block() {
    const size_t count = threads();
    while (fibers_.size() < (count + kWarp - 1) / kWarp * kWarp) fibers_.emplace_back();
    for (size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& f = fibers_[i];
      f.waits = i < count ? Waits::kNothing : Waits::kDone;
      if (i >= count) continue;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      makecontext(&f.context, &Machine::enter, 0);
    }
    random_.seed(seed + blockIdx.x + 65537u * blockIdx.y);
    choose_ahead(count);
    while (const size_t next = pick(count)) resume(next - 1);
  }

  // One more than a fiber that can run, 0 if none is left to.
  size_t pick(size_t count) {
    if (!error.empty()) return 0;
    std::vector<size_t>& ready = ready_;
    ready.clear();
    const auto collect = [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i)
        if (fibers_[i].waits == Waits::kNothing) ready.push_back(i + 1);
    };
    // Most of the time one warp runs ahead, so that it meets what the others have not read yet.
    if (random_() % 16 != 0) {
      const size_t first = ahead_ * kWarp, end = first + kWarp < count ? first + kWarp : count;
      collect(first, end);
      if (ready.empty() && release_warp(first)) collect(first, end);
    }
    if (ready.empty()) collect(0, count);
    if (ready.empty() && release(count)) collect(0, count);
    if (ready.empty()) {
      for (size_t i = 0; i < count; ++i)
        if (fibers_[i].waits != Waits::kDone) {
          error = "a barrier or a warp operation waits for threads that never come";
          break;
        }
      return 0;
    }
    return ready[random_() % ready.size()];
  }

  void choose_ahead(size_t count) { ahead_ = random_() % ((count + kWarp - 1) / kWarp); }

  // Lets those go on whose barrier is complete; false if there are none.
  bool release(size_t count) {
    bool any = false, all = true;
    for (size_t i = 0; i < count; ++i)
      all &= fibers_[i].waits == Waits::kBlock || fibers_[i].waits == Waits::kDone;
    for (size_t i = 0; i < count && all; ++i)
      if (fibers_[i].waits == Waits::kBlock) {
        fibers_[i].waits = Waits::kNothing;
        any = true;
      }
    if (any) {
      choose_ahead(count);
      return true;
    }
    for (size_t warp = 0; warp < count; warp += kWarp) any |= release_warp(warp);
    return any;
  }

  // The same for the operations of the warp that begins at thread `warp`.
  bool release_warp(size_t warp) {
    bool any = false;
    for (size_t i = warp; i < warp + kWarp; ++i) {
      if (fibers_[i].waits != Waits::kWarp) continue;
      const unsigned mask = fibers_[i].mask;
      bool complete = true;
      for (size_t j = 0; j < kWarp; ++j)
        if (mask >> j & 1)
          complete &= fibers_[warp + j].waits == Waits::kWarp && fibers_[warp + j].mask == mask;
      if (!complete) continue;
      for (size_t j = 0; j < kWarp; ++j)
        if (mask >> j & 1) fibers_[warp + j].waits = Waits::kNothing;
      any = true;
    }
    return any;
  }

  void resume(size_t i) {
    current_ = i;
    threadIdx = {static_cast<unsigned>(i % blockDim.x), static_cast<unsigned>(i / blockDim.x % blockDim.y),
                 static_cast<unsigned>(i / blockDim.x / blockDim.y)};
    start_switch(&main_sanitizer_, fibers_[i].stack.get(), kStack);
    swapcontext(&main_, &fibers_[i].context);
    finish_switch(main_sanitizer_);
  }

  void wait(Waits what, unsigned mask) {
    fibers_[current_].waits = what;
    fibers_[current_].mask = mask;
    give_way();
  }

  void give_way() {
    Fiber& f = fibers_[current_];
    start_switch(f.waits == Waits::kDone ? nullptr : &f.sanitizer, main_stack_, main_size_);
    swapcontext(&f.context, &main_);
    finish_switch(f.sanitizer);
  }

  static void enter() {
    Machine& m = instance();
    m.entered();
    (*m.body_)();
    m.fibers_[m.current_].waits = Waits::kDone;
    m.give_way();
  }

  // AddressSanitizer wants to know of every change of stacks.
#if defined(__SANITIZE_ADDRESS__)
  void start_switch(void** save, const void* stack, size_t size) {
    __sanitizer_start_switch_fiber(save, stack, size);
  }
  void finish_switch(void* save) { __sanitizer_finish_switch_fiber(save, nullptr, nullptr); }
  void entered() { __sanitizer_finish_switch_fiber(nullptr, &main_stack_, &main_size_); }
#else
  void start_switch(void**, const void*, size_t) {}
  void finish_switch(void*) {}
  void entered() {}
#endif

  std::vector<Fiber> fibers_;
  std::vector<size_t> ready_;
  size_t current_ = 0, ahead_ = 0;
  ucontext_t main_;
  const void* main_stack_ = nullptr;
  size_t main_size_ = 0;
  void* main_sanitizer_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  std::minstd_rand random_;
};

inline Machine& machine() { return Machine::instance(); }

template <class T>
uint64_t packed(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T unpacked(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// What lane `source` gives; a lane outside of the mask gives nothing that is defined.
template <class T>
T exchange(unsigned mask, T value, int source) {
  if (!(mask >> source & 1)) machine().fail("a shuffle reads a lane that its mask leaves out");
  T found{};
  machine().exchange(mask, packed(value), [&](int lane, uint64_t posted) {
    if (lane == source) found = unpacked<T>(posted);
  });
  return found;
}

template <class T, class F>
T fold(unsigned mask, T value, F f) {
  T result = value;
  machine().exchange(mask, packed(value),
                     [&](int, uint64_t posted) { result = f(result, unpacked<T>(posted)); });
  return result;
}

template <class T>
void aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) machine().fail("a misaligned address");
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::machine().block_barrier(); }
inline int __syncthreads_count(int predicate) { return cuda_on_host::machine().block_count(predicate != 0); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { cuda_on_host::exchange(mask, 0, 0); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return cuda_on_host::exchange(mask, value, source % cuda_on_host::kWarp);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return cuda_on_host::exchange(mask, value, static_cast<int>(cuda_on_host::machine().lane()) ^ other);
}
inline int __any_sync(unsigned mask, int predicate) {
  return cuda_on_host::fold(mask, predicate != 0, [](bool a, bool b) { return a || b; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned mine = predicate != 0 ? 1u << cuda_on_host::machine().lane() : 0u;
  return cuda_on_host::fold(mask, mine, [](unsigned a, unsigned b) { return a | b; });
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned long long __brevll(unsigned long long x) {
  unsigned long long reversed = 0;
  for (int i = 0; i < 64; ++i) reversed |= (x >> i & 1) << (63 - i);
  return reversed;
}
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p += value;
  return before;
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return cuda_on_host::fold(mask, value, [](int a, int b) { return a < b ? a : b; });
}
template <class T>
T __ldcs(const T* p) {
  cuda_on_host::aligned(p);
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return __ldcs(p);
}
template <class T>
void __stcs(T* p, T value) {
  cuda_on_host::aligned(p);
  *p = value;
}
template <class T>
void __stwb(T* p, T value) {
  __stcs(p, value);
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
  const dim3 block = config->blockDim;
  if (size_t{block.x} * block.y * block.z > 1024 || config->dynamicSmemBytes != 0)
    return cudaErrorInvalidConfiguration;
  const auto body = [&] { kernel(args...); };
  return cuda_on_host::machine().run(config->gridDim, block, body) ? cudaSuccess : cudaErrorLaunchFailure;
}

inline const char* cudaGetErrorName(cudaError_t e) {
  return e == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaErrorInvalidConfiguration";
}
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorLaunchFailure ? cuda_on_host::machine().error.c_str() : "no such launch";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_on_host::kMultiprocessors;
  return cudaSuccess;
}
