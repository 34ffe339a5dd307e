// The categorical family on CUDA devices, whose memory the host cannot read.
#include "../cuda/categorical.h"
#include "../cuda/launch.h"
#include "../cuda/uniform.h"
#include "categorical.h"

namespace dlcore::capi {
namespace {

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

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

// Hands out parts of the caller's device memory; without any it counts what they take.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    constexpr int64_t kAlignment = 256;
    char* part = memory_ ? memory_ + used_ : nullptr;
    const int64_t bytes = product("workspace", {count, static_cast<int64_t>(sizeof(T))});
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(part);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

bool truncates(const dlcore_sampling* how) {
  return how && (how->top_k.data || how->top_p.data || how->min_p.data);
}

// Dense rows, and what a call keeps of them on the device.
struct DeviceRows {
  DeviceRows(const dlcore_categorical* softmax, const dlcore_sampling* how, void* memory)
      : DeviceRows(pointed("softmax", softmax), truncates(how), memory) {}

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
  DeviceRows(const dlcore_categorical& a, bool truncated, void* workspace)
      : logits(view("logits.values", a.logits.values)), memory(workspace) {
    if (a.logits.weight.data || a.logits.bias)
      refuse(DLCORE_UNSUPPORTED, "logits.weight must be none on CUDA");
    softmax = softmax_of(a, rows(), vocab(), true, Memory::kDevice);
    state = memory.take<Summary>(rows());
    skip = memory.take<uint8_t>(rows());
    saved = memory.take<double>(5 * rows());
    scratch =
        memory.take<char>(std::max(cuda::scan_bytes(rows(), vocab()), cuda::nelbo_bytes(rows(), vocab())));
    if (!truncated) return;
    drawn = memory.take<Summary>(rows());
    selections = memory.take<Selection>(rows());
    inner = memory.take<Selection>(rows());
    bins = memory.take<Bin>(rows() * kBins);
    cuts = memory.take<Cut>(rows());
    ends = memory.take<int64_t>(rows());
  }
};

// The same, ready to be scanned.
DeviceRows scanned(const dlcore_categorical* softmax, const dlcore_sampling* how, void* workspace) {
  const DeviceRows a(softmax, how, workspace);
  needed("workspace", static_cast<char*>(workspace), a.rows());
  return a;
}

// The last kept entry of every row, by a radix search over the logits' ordered bits.
void select(const DeviceRows& a, PerRow<int64_t> top_k, PerRow<float> top_p, const Selection* within,
            Selection* selections, cudaStream_t stream) {
  cuda::start_selections(a.state, a.rows(), top_k, top_p, within, selections, stream);
  HistogramArguments h;
  h.logits = a.logits;
  h.vocab = a.vocab();
  h.softmax = a.softmax;
  h.state = a.state;
  h.selections = selections;
  h.bins = a.bins;
  for (h.level = 0; h.level < kLevels; ++h.level) {
    cuda::histogram(h, stream);
    cuda::narrow(a.bins, a.state, a.rows(), h.level, selections, stream);
  }
}

// Sets the cuts of scanned rows; top_p counts within what top_k keeps.
void cut(const DeviceRows& a, PerRow<int64_t> top_k, PerRow<float> top_p, PerRow<float> min_p,
         cudaStream_t stream) {
  const Selection* found = nullptr;
  if (top_k) select(a, top_k, {}, nullptr, a.selections, stream), found = a.selections;
  if (top_p) select(a, top_k, top_p, found, a.inner, stream), found = a.inner;
  cuda::finish_selections(a.state, a.rows(), min_p, a.softmax.temperature, found, a.cuts, stream);
  cuda::EndsArguments ends;
  ends.logits = a.logits;
  ends.softmax = a.softmax;
  ends.cuts = a.cuts;
  ends.ends = a.ends;
  cuda::find_ends(ends, stream);
}

void sample(const DeviceRows& a, const dlcore_sampling& how, int64_t* tokens, float* numbers,
            cudaStream_t stream) {
  const auto top_k = per_row("top_k", how.top_k);
  const auto top_p = per_row("top_p", how.top_p), min_p = per_row("min_p", how.min_p);
  ScanArguments draw;
  draw.keys = keys(how.keys, a.rows());
  draw.state = a.state;
  needed("tokens", tokens, a.rows());
  needed("numbers", numbers, a.rows());
  if (truncates(&how)) {
    a.scan({}, stream);
    cut(a, top_k, top_p, min_p, stream);
    draw.cuts = a.cuts;
    draw.state = a.drawn;
  }
  a.scan(draw, stream);
  cuda::finish_sample(a.state, draw.state, a.rows(), tokens, numbers, stream);
}

void sample_mixture(const DeviceRows& a, const dlcore_mixture& how, int64_t* tokens, cudaStream_t stream) {
  const MixtureArguments m = mixture_of(how, a.softmax, a.rows(), a.vocab(), Memory::kDevice);
  needed("tokens", tokens, a.rows());
  cuda::plan_mixture(m, a.skip, stream);
  ScanArguments draw;
  draw.keys = m.keys;
  draw.skip = a.skip;
  a.scan(draw, stream);
  cuda::finish_mixture(m, a.state, a.skip, tokens, stream);
}

void log_probs(const DeviceRows& a, const int64_t* target, double* numbers, cudaStream_t stream) {
  needed("target", target, a.rows());
  needed("numbers", numbers, a.rows());
  ScanArguments read;
  read.target = {target, 1};
  a.scan(read, stream);
  const bool with_index = static_cast<bool>(a.softmax.index);
  cuda::finish_log_probs(a.state, read.target, with_index, a.rows(), numbers, stream);
}

void nelbo(const DeviceRows& a, const int64_t* x, const dlcore_doubles& alpha, const dlcore_doubles& dalpha,
           float* loss, cudaStream_t stream) {
  const int64_t* z = a.softmax.index.data;
  if (a.softmax.temperature || a.softmax.softcap != 0 || a.softmax.exclude >= 0)
    refuse(DLCORE_INVALID_VALUE, "temperature, softcap and exclude must be none");
  needed("index", z, a.rows());
  needed("x", x, a.rows());
  needed("alpha", alpha.data, a.rows());
  needed("dalpha", dalpha.data, a.rows());
  needed("loss", loss, a.rows());
  NelboArguments n;
  n.logits = a.logits;
  n.vocab = a.vocab();
  n.softmax = a.softmax;
  n.alpha = per_row("alpha", alpha);
  n.saved = a.saved;
  const auto slope = per_row("dalpha", dalpha);
  ScanArguments read;
  read.target = {x, 1};
  a.scan(read, stream);
  cuda::start_nelbo(a.state, a.rows(), a.saved, stream);
  cuda::nelbo(n, a.scratch, stream);
  cuda::finish_nelbo(a.saved, a.rows(), a.vocab(), z, x, n.alpha, slope, loss, stream);
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore;
using namespace dlcore::capi;

dlcore_status dlcore_cuda_categorical_workspace(const dlcore_categorical* softmax, const dlcore_sampling* how,
                                                int64_t* bytes) {
  return queued(__func__, [&] {
    needed("bytes", bytes);
    *bytes = DeviceRows(softmax, how, nullptr).memory.used();
  });
}

dlcore_status dlcore_cuda_categorical_stats(const dlcore_categorical* softmax, int64_t* argmax,
                                            float* numbers, void* workspace, void* stream) {
  return queued(__func__, [&] {
    const DeviceRows a = scanned(softmax, nullptr, workspace);
    needed("argmax", argmax, a.rows());
    needed("numbers", numbers, a.rows());
    a.scan({}, stream_of(stream));
    cuda::finish_stats(a.state, a.rows(), argmax, numbers, stream_of(stream));
  });
}

dlcore_status dlcore_cuda_categorical_sample(const dlcore_categorical* softmax, const dlcore_sampling* how,
                                             int64_t* tokens, float* numbers, void* workspace, void* stream) {
  return queued(__func__, [&] {
    const DeviceRows a = scanned(softmax, how, workspace);
    sample(a, pointed("how", how), tokens, numbers, stream_of(stream));
  });
}

dlcore_status dlcore_cuda_categorical_sample_mixture(const dlcore_categorical* softmax,
                                                     const dlcore_mixture* how, int64_t* tokens,
                                                     void* workspace, void* stream) {
  return queued(__func__, [&] {
    const DeviceRows a = scanned(softmax, nullptr, workspace);
    sample_mixture(a, pointed("how", how), tokens, stream_of(stream));
  });
}

dlcore_status dlcore_cuda_categorical_log_probs(const dlcore_categorical* softmax, const int64_t* target,
                                                double* numbers, void* workspace, void* stream) {
  return queued(__func__,
                [&] { log_probs(scanned(softmax, nullptr, workspace), target, numbers, stream_of(stream)); });
}

dlcore_status dlcore_cuda_uniform_nelbo(const dlcore_categorical* softmax, const int64_t* x,
                                        dlcore_doubles alpha, dlcore_doubles dalpha, float* loss,
                                        void* workspace, void* stream) {
  return queued(__func__, [&] {
    nelbo(scanned(softmax, nullptr, workspace), x, alpha, dalpha, loss, stream_of(stream));
  });
}
