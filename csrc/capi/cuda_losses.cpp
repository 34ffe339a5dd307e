// Log-probabilities, divergences and the uniform-state NELBO on CUDA devices, and their gradients.
#include "cuda_categorical.h"

namespace dlcore::capi {
namespace {

// Dense gradients: what a device takes.
View gradient(const char* name, const dlcore_logits_grad* grad, const View& logits) {
  const dlcore_logits_grad& out = pointed(name, grad);
  needed((std::string(name) + "->values").c_str(), out.values, logits.rows);
  if (out.weight || out.bias)
    refuse(DLCORE_UNSUPPORTED, name, "->weight and ", name, "->bias must be NULL on CUDA");
  return result(out.values, logits.dtype, logits.rows, logits.columns);
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

void log_probs_backward(const DeviceRows& rows, const int64_t* target, const double* grad,
                        const double* numbers, const dlcore_logits_grad* logits_grad, cudaStream_t stream) {
  if (rows.softmax.temperature) refuse(DLCORE_INVALID_VALUE, "temperature must be none");
  needed("target", target, rows.rows());
  needed("grad", grad, rows.rows());
  needed("numbers", numbers, rows.rows());
  LogProbsBackwardArguments a;
  a.logits = rows.logits;
  a.softmax = rows.softmax;
  a.target = {target, 1};
  a.grad = grad;
  a.numbers = numbers;
  a.out = gradient("logits_grad", logits_grad, a.logits);
  cuda::log_probs_backward(a, stream);
}

// Two rows of logits each, side by side.
struct DevicePair {
  DevicePair(const dlcore_logits* left, const dlcore_logits* right, const dlcore_floats& at)
      : p(dense("p", pointed("p", left))),
        q(dense("q", pointed("q", right))),
        temperature(per_row("temperature", at)) {
    if (q.rows != p.rows || q.columns != p.columns)
      refuse(DLCORE_INVALID_SHAPE, "q must have the rows and the vocabulary of p, ", p.rows, " and ",
             p.columns, ", got ", q.rows, " and ", q.columns);
    if (q.dtype != p.dtype)
      refuse(DLCORE_INVALID_DTYPE, "q.values.dtype must be that of p, ", static_cast<int>(p.dtype), ", got ",
             static_cast<int>(q.dtype));
  }

  View p, q;
  PerRow<float> temperature;
};

// What kl keeps on the device.
struct KLMemory {
  KLMemory(const View& p, void* workspace)
      : memory(workspace),
        state(memory.take<KLSummary>(p.rows)),
        scratch(memory.take<char>(cuda::kl_bytes(p.rows, p.columns))) {}

  Workspace memory;
  KLSummary* state;
  char* scratch;
};

void kl(const DevicePair& pair, double* numbers, void* workspace, cudaStream_t stream) {
  const int64_t rows = pair.p.rows;
  needed("numbers", numbers, rows);
  needed("workspace", static_cast<char*>(workspace), rows);
  const KLMemory memory(pair.p, workspace);
  KLArguments a;
  a.p = pair.p;
  a.q = pair.q;
  a.temperature = pair.temperature;
  a.state = memory.state;
  cuda::kl(a, true, memory.scratch, stream);
  cuda::finish_kl(memory.state, rows, numbers, stream);
}

void kl_backward(const DevicePair& pair, const double* grad, const double* numbers,
                 const dlcore_logits_grad* p_grad, const dlcore_logits_grad* q_grad, cudaStream_t stream) {
  needed("grad", grad, pair.p.rows);
  needed("numbers", numbers, pair.p.rows);
  KLBackwardArguments a;
  a.p = pair.p;
  a.q = pair.q;
  a.temperature = pair.temperature;
  a.grad = grad;
  a.numbers = numbers;
  a.p_out = gradient("p_grad", p_grad, a.p);
  a.q_out = gradient("q_grad", q_grad, a.q);
  cuda::kl_backward(a, stream);
}

// What the NELBO and its gradient take beside the logits.
struct DeviceLevels {
  DeviceLevels(const DeviceRows& a, const int64_t* clean, const dlcore_doubles& at, const dlcore_doubles& by)
      : z(a.softmax.index.data), x(clean) {
    if (a.softmax.temperature || a.softmax.softcap != 0 || a.softmax.exclude >= 0)
      refuse(DLCORE_INVALID_VALUE, "temperature, softcap and exclude must be none");
    needed("index", z, a.rows());
    needed("x", x, a.rows());
    needed("alpha", at.data, a.rows());
    needed("dalpha", by.data, a.rows());
    alpha = per_row("alpha", at);
    dalpha = per_row("dalpha", by);
  }

  const int64_t *z, *x;
  PerRow<double> alpha, dalpha;
};

void nelbo(const DeviceRows& rows, const DeviceLevels& levels, float* loss, double* saved,
           cudaStream_t stream) {
  needed("loss", loss, rows.rows());
  NelboArguments a;
  a.logits = rows.logits;
  a.vocab = rows.vocab();
  a.softmax = rows.softmax;
  a.alpha = levels.alpha;
  a.saved = saved ? saved : rows.saved;
  ScanArguments read;
  read.target = {levels.x, 1};
  rows.scan(read, stream);
  cuda::start_nelbo(rows.state, rows.rows(), a.saved, stream);
  cuda::nelbo(a, rows.scratch, stream);
  cuda::finish_nelbo(a.saved, rows.rows(), a.vocab, levels.z, levels.x, a.alpha, levels.dalpha, loss, stream);
}

void nelbo_backward(const DeviceRows& rows, const DeviceLevels& levels, const float* grad,
                    const double* saved, const dlcore_logits_grad* logits_grad, cudaStream_t stream) {
  needed("grad", grad, rows.rows());
  needed("saved", saved, rows.rows());
  NelboBackwardArguments a;
  a.logits = rows.logits;
  a.vocab = rows.vocab();
  a.softmax = rows.softmax;
  a.z = levels.z;
  a.x = levels.x;
  a.alpha = levels.alpha;
  a.dalpha = levels.dalpha;
  a.grad = grad;
  a.saved = saved;
  a.out = gradient("logits_grad", logits_grad, a.logits);
  cuda::nelbo_backward(a, stream);
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore::capi;

dlcore_status dlcore_cuda_categorical_log_probs(const dlcore_categorical* softmax, const int64_t* target,
                                                double* numbers, void* workspace, void* stream) {
  return queued(__func__,
                [&] { log_probs(scanned(softmax, nullptr, workspace), target, numbers, stream_of(stream)); });
}

dlcore_status dlcore_cuda_categorical_log_probs_backward(const dlcore_categorical* softmax,
                                                         const int64_t* target, const double* grad,
                                                         const double* numbers,
                                                         const dlcore_logits_grad* logits_grad,
                                                         void* stream) {
  return queued(__func__, [&] {
    const DeviceRows rows(softmax, nullptr, nullptr);
    log_probs_backward(rows, target, grad, numbers, logits_grad, stream_of(stream));
  });
}

dlcore_status dlcore_cuda_categorical_kl_workspace(const dlcore_logits* p, int64_t* bytes) {
  return queued(__func__, [&] {
    needed("bytes", bytes);
    *bytes = KLMemory(dense("p", pointed("p", p)), nullptr).memory.used();
  });
}

dlcore_status dlcore_cuda_categorical_kl(const dlcore_logits* p, const dlcore_logits* q,
                                         dlcore_floats temperature, double* numbers, void* workspace,
                                         void* stream) {
  return queued(__func__, [&] { kl(DevicePair(p, q, temperature), numbers, workspace, stream_of(stream)); });
}

dlcore_status dlcore_cuda_categorical_kl_backward(const dlcore_logits* p, const dlcore_logits* q,
                                                  dlcore_floats temperature, const double* grad,
                                                  const double* numbers, const dlcore_logits_grad* p_grad,
                                                  const dlcore_logits_grad* q_grad, void* stream) {
  return queued(__func__, [&] {
    kl_backward(DevicePair(p, q, temperature), grad, numbers, p_grad, q_grad, stream_of(stream));
  });
}

dlcore_status dlcore_cuda_uniform_nelbo(const dlcore_categorical* softmax, const int64_t* x,
                                        dlcore_doubles alpha, dlcore_doubles dalpha, float* loss,
                                        double* saved, void* workspace, void* stream) {
  return queued(__func__, [&] {
    const DeviceRows rows = scanned(softmax, nullptr, workspace);
    nelbo(rows, DeviceLevels(rows, x, alpha, dalpha), loss, saved, stream_of(stream));
  });
}

dlcore_status dlcore_cuda_uniform_nelbo_backward(const dlcore_categorical* softmax, const int64_t* x,
                                                 dlcore_doubles alpha, dlcore_doubles dalpha,
                                                 const float* grad, const double* saved,
                                                 const dlcore_logits_grad* logits_grad, void* stream) {
  return queued(__func__, [&] {
    const DeviceRows rows(softmax, nullptr, nullptr);
    nelbo_backward(rows, DeviceLevels(rows, x, alpha, dalpha), grad, saved, logits_grad, stream_of(stream));
  });
}
