// Bitstream diffusion on CUDA devices.
#include "../cuda/bits.h"
#include "bits.h"
#include "cuda.h"

namespace dlcore::capi {
namespace {

class BitsDevice {
 public:
  static constexpr Memory memory = Memory::kDevice;

  BitsDevice(void* workspace, void* stream) : workspace_(workspace), stream_(stream_of(stream)) {}

  template <class Numbers>
  BitParameters numbers(const Numbers& of, int64_t rows) {
    const int64_t each = of.shared() ? 1 : rows;
    auto* kept = take<float>(Numbers::count * each);
    cuda::bit_numbers(of, each, kept, stream_);
    return {kept, each, of.shared() ? 0 : 1, 0};
  }

  void operator()(const BitLogitsArguments& a, int64_t) const { cuda::bit_logits(a, stream_); }
  void operator()(const BitStepArguments& a, int64_t) const { cuda::bit_step(a, stream_); }
  void operator()(const BitPerturbArguments& a, int64_t) const { cuda::bit_perturb(a, stream_); }
  void operator()(const BitLossBackwardArguments& a, int64_t) const { cuda::bit_loss_backward(a, stream_); }
  void operator()(const BitEncodeArguments& a, int64_t) const { cuda::bit_encode(a, stream_); }
  void operator()(const BitDecodeArguments& a, int64_t) const { cuda::bit_decode(a, stream_); }

  void means(BitLossArguments a, float* loss) {
    a.sums = take<double>(a.x.rows * cuda::bit_loss_sums(a.x.rows, a.x.columns));
    cuda::bit_loss(a, loss, stream_);
  }

 private:
  template <class T>
  T* take(int64_t count) {
    if (!workspace_.given()) refuse(DLCORE_NULL_POINTER, "workspace must not be NULL");
    return workspace_.take<T>(count);
  }

  Workspace workspace_;
  cudaStream_t stream_;
};

// What the greediest functions take: a step, and the loss or its gradient.
int64_t workspace_bytes(const View& x) {
  Workspace memory(nullptr);
  memory.take<float>(BitStepNumbers::count * x.rows);
  memory.take<double>(x.rows * std::max<int64_t>(cuda::bit_loss_sums(x.rows, x.columns), 1));
  return memory.used();
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore::capi;

dlcore_status dlcore_cuda_bits_workspace(const dlcore_matrix* x, int64_t* bytes) {
  return queued(__func__, [&] {
    needed("bytes", bytes);
    *bytes = workspace_bytes(view("x", x));
  });
}

dlcore_status dlcore_cuda_bits_encode(const dlcore_bit_code* code, const int64_t* tokens, int64_t count,
                                      float* bits, void* stream) {
  return queued(__func__, [&] { bit_encode(code, tokens, count, bits, BitsDevice(nullptr, stream)); });
}

dlcore_status dlcore_cuda_bits_decode(const dlcore_bit_code* code, const dlcore_matrix* bits,
                                      int64_t vocab_size, int64_t* tokens, void* stream) {
  return queued(__func__, [&] { bit_decode(code, bits, vocab_size, tokens, BitsDevice(nullptr, stream)); });
}

dlcore_status dlcore_cuda_bits_matched_filter(const dlcore_bits* state, float* out, void* workspace,
                                              void* stream) {
  return queued(__func__, [&] { bit_logits(state, false, out, BitsDevice(workspace, stream)); });
}

dlcore_status dlcore_cuda_bits_posterior(const dlcore_bits* state, float* out, void* workspace,
                                         void* stream) {
  return queued(__func__, [&] { bit_logits(state, true, out, BitsDevice(workspace, stream)); });
}

dlcore_status dlcore_cuda_bits_step(const dlcore_bits* state, const dlcore_bits_update* update, float* next,
                                    float* probs, void* workspace, void* stream) {
  return queued(__func__, [&] { bit_step(state, update, next, probs, BitsDevice(workspace, stream)); });
}

dlcore_status dlcore_cuda_bits_perturb(const dlcore_matrix* x, dlcore_doubles spread, dlcore_keys keys,
                                       float* out, void* workspace, void* stream) {
  return queued(__func__, [&] { bit_perturb(x, spread, keys, out, BitsDevice(workspace, stream)); });
}

dlcore_status dlcore_cuda_bits_loss(const dlcore_bits* state, const dlcore_matrix* bits, int32_t kind,
                                    float* loss, void* workspace, void* stream) {
  return queued(__func__, [&] { bit_loss(state, bits, kind, loss, BitsDevice(workspace, stream)); });
}

dlcore_status dlcore_cuda_bits_loss_backward(const dlcore_bits* state, const dlcore_matrix* bits,
                                             int32_t kind, const float* grad, void* residual_grad,
                                             void* x_grad, void* workspace, void* stream) {
  return queued(__func__, [&] {
    bit_loss_backward(state, bits, kind, grad, residual_grad, x_grad, BitsDevice(workspace, stream));
  });
}
