// Rows of logits on a device, for the functions of softmax.
#pragma once

#include "../cuda/categorical.h"
#include "../cuda/uniform.h"
#include "categorical.h"
#include "cuda.h"

namespace dlcore::capi {

inline bool truncates(const dlcore_sampling* how) {
  return how && (how->top_k.data || how->top_p.data || how->min_p.data);
}

// Rows of logits without a head, what a device takes.
inline View dense(const char* name, const dlcore_logits& logits) {
  const auto part = [&](const char* of) { return std::string(name) + of; };
  if (logits.weight.data) refuse(DLCORE_UNSUPPORTED, part(".weight"), " must be none on CUDA");
  if (logits.bias) refuse(DLCORE_UNSUPPORTED, part(".bias"), " must be none on CUDA");
  return view(part(".values").c_str(), logits.values);
}

// Dense rows, and what a call keeps of them on the device.
struct DeviceRows {
  DeviceRows(const dlcore_categorical* softmax, const dlcore_sampling* how, void* memory, Ids ids)
      : DeviceRows(pointed("softmax", softmax), truncates(how), memory, ids) {}

  int64_t rows() const { return logits.rows; }
  int64_t vocab() const { return logits.columns; }

  void scan(ScanArguments a, cudaStream_t stream) const {
    a.logits = logits;
    a.softmax = softmax;
    if (!a.state) a.state = state;
    cuda::scan(a, a.cuts ? ends : nullptr, scratch, stream);
  }

  View logits;
  Softmax softmax;
  Workspace memory;
  Summary *state, *drawn = nullptr;
  uint8_t* skip;
  double* saved;
  char* scratch;
  // To truncate draws.
  Selection *selections = nullptr, *inner = nullptr;
  Bin* bins = nullptr;
  Cut* cuts = nullptr;
  int64_t* ends = nullptr;

 private:
  DeviceRows(const dlcore_categorical& a, bool truncated, void* workspace, Ids ids);
};

// The same, ready to be scanned.
DeviceRows scanned(const dlcore_categorical* softmax, const dlcore_sampling* how, void* workspace,
                   Ids ids = Ids::kHere);

}  // namespace dlcore::capi
