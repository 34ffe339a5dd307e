// Statistics and draws of softmax on CUDA devices.
#include "cuda_categorical.h"

namespace dlcore::capi {
namespace {

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

}  // namespace

DeviceRows::DeviceRows(const dlcore_categorical& a, bool truncated, void* workspace, Ids ids)
    : logits(dense("logits", a.logits)), memory(workspace) {
  softmax = softmax_of(a, rows(), vocab(), true, Memory::kDevice, ids);
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

DeviceRows scanned(const dlcore_categorical* softmax, const dlcore_sampling* how, void* workspace, Ids ids) {
  const DeviceRows a(softmax, how, workspace, ids);
  needed("workspace", static_cast<char*>(workspace), a.rows());
  return a;
}

}  // namespace dlcore::capi

using namespace dlcore;
using namespace dlcore::capi;

dlcore_status dlcore_cuda_categorical_workspace(const dlcore_categorical* softmax, const dlcore_sampling* how,
                                                int64_t* bytes) {
  return queued(__func__, [&] {
    needed("bytes", bytes);
    *bytes = DeviceRows(softmax, how, nullptr, Ids::kAnywhere).memory.used();
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

dlcore_status dlcore_cuda_categorical_summary(const dlcore_categorical* softmax, const dlcore_part* part,
                                              int64_t* tokens, double* numbers, void* workspace,
                                              void* stream) {
  return queued(__func__, [&] {
    const DeviceRows a = scanned(softmax, nullptr, workspace, Ids::kAnywhere);
    const ScanArguments read = scan_of(pointed("part", part), a.rows(), a.vocab());
    needed("tokens", tokens, a.rows());
    needed("numbers", numbers, a.rows());
    a.scan(read, stream_of(stream));
    cuda::finish_summary(a.state, a.rows(), tokens, numbers, stream_of(stream));
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
