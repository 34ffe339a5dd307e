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

// Dense rows, and the workspace that a scan of them leaves its results in.
struct DeviceRows {
  DeviceRows(const dlcore_categorical* softmax, void* workspace)
      : DeviceRows(pointed("softmax", softmax), workspace) {}

  int64_t rows() const { return logits.rows; }

  Summary* state() const { return reinterpret_cast<Summary*>(workspace); }
  // A mark per row, or what the NELBO keeps of it.
  uint8_t* skip() const { return reinterpret_cast<uint8_t*>(workspace + up(state_bytes())); }
  double* saved() const { return reinterpret_cast<double*>(skip()); }
  int64_t state_bytes() const { return rows() * static_cast<int64_t>(sizeof(Summary)); }
  int64_t row_bytes() const { return rows() * 5 * static_cast<int64_t>(sizeof(double)); }
  int64_t scratch_bytes() const {
    return std::max(cuda::scan_bytes(rows(), logits.columns), cuda::nelbo_bytes(rows(), logits.columns));
  }
  void* scratch() const { return workspace + up(state_bytes()) + up(row_bytes()); }
  int64_t bytes() const { return up(state_bytes()) + up(row_bytes()) + up(scratch_bytes()); }

  void scan(ScanArguments a, void* stream) const {
    a.logits = logits;
    a.softmax = softmax;
    a.state = state();
    cuda::scan(a, nullptr, scratch(), stream_of(stream));
  }

  View logits;
  Softmax softmax;
  char* workspace;

 private:
  DeviceRows(const dlcore_categorical& a, void* workspace)
      : logits(view("logits.values", a.logits.values)), workspace(static_cast<char*>(workspace)) {
    if (a.logits.weight.data || a.logits.bias)
      refuse(DLCORE_UNSUPPORTED, "logits.weight must be none on CUDA");
    product("workspace", {rows(), static_cast<int64_t>(sizeof(Summary))});
    softmax = softmax_of(a, rows(), logits.columns, true, Memory::kDevice);
  }

  static int64_t up(int64_t bytes) { return (bytes + 255) / 256 * 256; }
};

// The same, ready to be scanned.
DeviceRows scanned(const dlcore_categorical* softmax, void* workspace) {
  DeviceRows a(softmax, workspace);
  needed("workspace", static_cast<char*>(workspace), a.rows());
  return a;
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore;
using namespace dlcore::capi;

dlcore_status dlcore_cuda_categorical_workspace(const dlcore_categorical* softmax, int64_t* bytes) {
  return queued(__func__, [&] {
    needed("bytes", bytes);
    *bytes = DeviceRows(softmax, nullptr).bytes();
  });
}

dlcore_status dlcore_cuda_categorical_stats(const dlcore_categorical* softmax, int64_t* argmax,
                                            float* numbers, void* workspace, void* stream) {
  return queued(__func__, [&] {
    const DeviceRows a = scanned(softmax, workspace);
    needed("argmax", argmax, a.rows());
    needed("numbers", numbers, a.rows());
    a.scan({}, stream);
    cuda::finish_stats(a.state(), a.rows(), argmax, numbers, stream_of(stream));
  });
}

dlcore_status dlcore_cuda_categorical_sample(const dlcore_categorical* softmax, const dlcore_sampling* how,
                                             int64_t* tokens, float* numbers, void* workspace, void* stream) {
  return queued(__func__, [&] {
    const DeviceRows a = scanned(softmax, workspace);
    const dlcore_sampling& s = pointed("how", how);
    if (s.top_k.data || s.top_p.data || s.min_p.data)
      refuse(DLCORE_UNSUPPORTED, "top_k, top_p and min_p must be none on CUDA");
    ScanArguments draw;
    draw.keys = keys(s.keys, a.rows());
    needed("tokens", tokens, a.rows());
    needed("numbers", numbers, a.rows());
    a.scan(draw, stream);
    cuda::finish_sample(a.state(), a.state(), a.rows(), tokens, numbers, stream_of(stream));
  });
}

dlcore_status dlcore_cuda_categorical_sample_mixture(const dlcore_categorical* softmax,
                                                     const dlcore_mixture* how, int64_t* tokens,
                                                     void* workspace, void* stream) {
  return queued(__func__, [&] {
    const DeviceRows a = scanned(softmax, workspace);
    const MixtureArguments m =
        mixture_of(pointed("how", how), a.softmax, a.rows(), a.logits.columns, Memory::kDevice);
    needed("tokens", tokens, a.rows());
    cuda::plan_mixture(m, a.skip(), stream_of(stream));
    ScanArguments draw;
    draw.keys = m.keys;
    draw.skip = a.skip();
    a.scan(draw, stream);
    cuda::finish_mixture(m, a.state(), a.skip(), tokens, stream_of(stream));
  });
}

dlcore_status dlcore_cuda_categorical_log_probs(const dlcore_categorical* softmax, const int64_t* target,
                                                double* numbers, void* workspace, void* stream) {
  return queued(__func__, [&] {
    const DeviceRows a = scanned(softmax, workspace);
    needed("target", target, a.rows());
    needed("numbers", numbers, a.rows());
    ScanArguments read;
    read.target = {target, 1};
    a.scan(read, stream);
    cuda::finish_log_probs(a.state(), read.target, static_cast<bool>(a.softmax.index), a.rows(), numbers,
                           stream_of(stream));
  });
}

dlcore_status dlcore_cuda_uniform_nelbo(const dlcore_categorical* softmax, const int64_t* x,
                                        dlcore_doubles alpha, dlcore_doubles dalpha, float* loss,
                                        void* workspace, void* stream) {
  return queued(__func__, [&] {
    const DeviceRows a = scanned(softmax, workspace);
    const int64_t rows = a.rows(), vocab = a.logits.columns;
    const int64_t* z = a.softmax.index.data;
    if (a.softmax.temperature || a.softmax.softcap != 0 || a.softmax.exclude >= 0)
      refuse(DLCORE_INVALID_VALUE, "temperature, softcap and exclude must be none");
    needed("index", z, rows);
    needed("x", x, rows);
    needed("alpha", alpha.data, rows);
    needed("dalpha", dalpha.data, rows);
    const auto slope = per_row("dalpha", dalpha);
    NelboArguments n;
    n.alpha = per_row("alpha", alpha);
    needed("loss", loss, rows);
    ScanArguments read;
    read.target = {x, 1};
    a.scan(read, stream);
    cuda::start_nelbo(a.state(), rows, a.saved(), stream_of(stream));
    n.logits = a.logits;
    n.vocab = vocab;
    n.softmax = a.softmax;
    n.saved = a.saved();
    cuda::nelbo(n, a.scratch(), stream_of(stream));
    cuda::finish_nelbo(a.saved(), rows, vocab, z, x, n.alpha, slope, loss, stream_of(stream));
  });
}
