// What the functions of CUDA devices share, whose memory the host cannot read.
#pragma once

#include "../cuda/launch.h"
#include "capi.h"

namespace dlcore::capi {

template <class Body>
dlcore_status queued(const char* function, Body body) noexcept {
  return guarded(function, [&] {
    try {
      body();
    } catch (const cuda::Error& error) {
      refuse(DLCORE_CUDA_ERROR, error.what());
    }
  });
}

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

// Hands out parts of the caller's device memory; without any it counts what they take.
class Workspace {
 public:
  static constexpr int64_t kAlignment = 256;

  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {
    if (const auto beyond = reinterpret_cast<uintptr_t>(memory) % kAlignment)
      refuse(DLCORE_INVALID_VALUE, "workspace must be aligned to ", kAlignment, " bytes, got ", beyond,
             " beyond");
  }

  template <class T>
  T* take(int64_t count) {
    char* part = memory_ ? memory_ + used_ : nullptr;
    const int64_t bytes = product("workspace", {count, static_cast<int64_t>(sizeof(T))});
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(part);
  }
  int64_t used() const { return used_; }
  bool given() const { return memory_ != nullptr; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace dlcore::capi
