// Bitstream diffusion on the host.
#include "bits.h"

#include <list>

#include "places.h"

namespace dlcore::capi {
namespace {

constexpr int64_t kMostBits = 62;
constexpr float kClip = 30;

class BitsHost : public Host {
 public:
  using Host::Host;

  template <class Numbers>
  BitParameters numbers(const Numbers& of, int64_t rows) {
    const int64_t each = of.shared() ? 1 : rows;
    auto& kept = numbers_.emplace_back(static_cast<size_t>(Numbers::count * each));
    for (int64_t r = 0; r < each; ++r) of(r, kept.data() + r, each);
    return {kept.data(), each, of.shared() ? 0 : 1, 0};
  }

  void operator()(const BitLogitsArguments& a, int64_t n) const { run(&Kernels::bit_logits, a, n); }
  void operator()(const BitStepArguments& a, int64_t n) const { run(&Kernels::bit_step, a, n); }
  void operator()(const BitPerturbArguments& a, int64_t n) const { run(&Kernels::bit_perturb, a, n); }
  void operator()(const BitLossBackwardArguments& a, int64_t n) const {
    run(&Kernels::bit_loss_backward, a, n);
  }
  void operator()(const BitEncodeArguments& a, int64_t n) const { run(&Kernels::bit_encode, a, n); }
  void operator()(const BitDecodeArguments& a, int64_t n) const { run(&Kernels::bit_decode, a, n); }

  void means(BitLossArguments a, float* loss) const {
    const int64_t rows = a.x.rows, columns = a.x.columns, spans = bit_spans(columns);
    const auto sums = room<double>(rows * spans);
    a.sums = sums.get();
    run(&Kernels::bit_loss, a, rows * columns);
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t i = 0; i < spans; ++i) sum += sums[r * spans + i];
      loss[r] = static_cast<float>(sum / static_cast<double>(columns));
    }
  }

 private:
  std::list<std::vector<float>> numbers_;
};

BitsHost host_of(const dlcore_bits* state) { return BitsHost(pointed("state", state).threads); }

}  // namespace

BitCoding coding_of(int32_t coding, float clip) {
  one_of("coding", coding, 2);
  in_range("clip", clip, 0, kInfinity);
  return {coding == DLCORE_CODING_PM1 ? -1.0f : 0.0f, 1, clip == 0 ? kClip : clip};
}

void check_code(const dlcore_bit_code* code) {
  needed("code", code);
  if (code->width < 1 || code->width > kMostBits)
    refuse(DLCORE_INVALID_VALUE, "code->width must lie in [1, ", kMostBits, "], got ", code->width);
  one_of("code->order", code->order, 2);
  one_of("code->gray", code->gray, 2);
  one_of("code->coding", code->coding, 2);
}

BitState::BitState(const dlcore_bits* state)
    : x(view("x", pointed("state", state).x)), coding(coding_of(state->coding, state->clip)) {
  if (state->residual.data || state->residual.rows != 0)
    residual = view_like("residual", &state->residual, x);
}

void join(const BitParameters& shared, View& x, View& residual) {
  const auto has_gaps = [](const View& v) { return v.data && v.lead_stride[0] != v.columns; };
  if (shared.row != 0 || has_gaps(x) || has_gaps(residual)) return;
  for (View* v : {&x, &residual})
    if (v->data) *v = result(v->data, v->dtype, 1, v->rows * v->columns);
}

}  // namespace dlcore::capi

using namespace dlcore::capi;

dlcore_status dlcore_bits_encode(const dlcore_bit_code* code, const int64_t* tokens, int64_t count,
                                 float* bits, int32_t threads) {
  return guarded(__func__, [&] { bit_encode(code, tokens, count, bits, BitsHost(threads)); });
}

dlcore_status dlcore_bits_decode(const dlcore_bit_code* code, const dlcore_matrix* bits, int64_t vocab_size,
                                 int64_t* tokens, int32_t threads) {
  return guarded(__func__, [&] { bit_decode(code, bits, vocab_size, tokens, BitsHost(threads)); });
}

dlcore_status dlcore_bits_matched_filter(const dlcore_bits* state, float* out) {
  return guarded(__func__, [&] { bit_logits(state, false, out, host_of(state)); });
}

dlcore_status dlcore_bits_posterior(const dlcore_bits* state, float* out) {
  return guarded(__func__, [&] { bit_logits(state, true, out, host_of(state)); });
}

dlcore_status dlcore_bits_step(const dlcore_bits* state, const dlcore_bits_update* update, float* next,
                               float* probs) {
  return guarded(__func__, [&] { bit_step(state, update, next, probs, host_of(state)); });
}

dlcore_status dlcore_bits_perturb(const dlcore_matrix* x, dlcore_doubles spread, dlcore_keys keys, float* out,
                                  int32_t threads) {
  return guarded(__func__, [&] { bit_perturb(x, spread, keys, out, BitsHost(threads)); });
}

dlcore_status dlcore_bits_loss(const dlcore_bits* state, const dlcore_matrix* bits, int32_t kind,
                               float* loss) {
  return guarded(__func__, [&] { bit_loss(state, bits, kind, loss, host_of(state)); });
}

dlcore_status dlcore_bits_loss_backward(const dlcore_bits* state, const dlcore_matrix* bits, int32_t kind,
                                        const float* grad, void* residual_grad, void* x_grad) {
  return guarded(__func__,
                 [&] { bit_loss_backward(state, bits, kind, grad, residual_grad, x_grad, host_of(state)); });
}
