// The bodies of bits' functions, for the host and for devices.
#pragma once

#include <utility>

#include "../common/bit_numbers.h"
#include "capi.h"

namespace dlcore::capi {

// What drawing a normal costs, in elements read.
constexpr int64_t kBitNoise = 8;

BitCoding coding_of(int32_t coding, float clip);
void check_code(const dlcore_bit_code* code);

// What every function of a state takes of it, checked.
struct BitState {
  explicit BitState(const dlcore_bits* state);

  int64_t size() const { return x.rows * x.columns; }
  double range() const { return coding.high - coding.low; }

  View x, residual;
  BitCoding coding;
};

// Rows that share their parameters and lie back to back are one long row.
void join(const BitParameters& shared, View& x, View& residual);

// A place makes BitParameters of numbers, and runs arguments of kernels that read so many elements.

template <class Place>
void bit_logits(const dlcore_bits* state, bool sigmoid, float* out, Place place) {
  const BitState s(state);
  const auto sigma = needed_per_row("sigma", state->sigma, s.x.rows, 0, kLargest, Place::memory);
  if (!sigmoid && s.residual.data) refuse(DLCORE_INVALID_VALUE, "residual must be none");
  needed("out", out, s.x.rows);
  if (s.x.rows == 0) return;
  BitLogitsArguments a;
  a.x = s.x;
  a.residual = s.residual;
  a.slope = place.numbers(BitSlopes{sigma, s.range()}, s.x.rows);
  join(a.slope, a.x, a.residual);
  a.coding = s.coding;
  a.sigmoid = sigmoid;
  a.out = out;
  place(a, s.size());
}

template <class Place>
void bit_step(const dlcore_bits* state, const dlcore_bits_update* update, float* next, float* probs,
              Place place) {
  const BitState s(state);
  needed("update", update);
  const int64_t rows = s.x.rows;
  BitStepNumbers n;
  n.range = s.range();
  n.sigma = needed_per_row("sigma", state->sigma, rows, kSmallest, kLargest, Place::memory);
  n.sigma_next = needed_per_row("sigma_next", update->sigma_next, rows, 0, kLargest, Place::memory);
  n.gamma = per_row("gamma_next", update->gamma_next, rows, 0, kLargest, Place::memory);
  n.scale = per_row("noise_scale", update->noise_scale, rows, 0, kLargest, Place::memory);
  BitStepArguments a;
  if (n.gamma) a.keys = keys(update->keys, rows);
  needed("next", next, rows);
  needed("probs", probs, rows);
  if (rows == 0) return;
  if (Place::memory == Memory::kHost)
    for (int64_t r = 0; r < (n.shared() ? 1 : rows); ++r)
      in_range("sigma_next / sigma", n.ratio(r), 0, kLargest);
  a.x = s.x;
  a.residual = s.residual;
  a.parameters = place.numbers(n, rows);
  if (!n.gamma) join(a.parameters, a.x, a.residual);
  a.coding = s.coding;
  a.next = next;
  a.probs = probs;
  place(a, s.size() * (n.gamma ? kBitNoise : 1));
}

template <class Place>
void bit_perturb(const dlcore_matrix* x, const dlcore_doubles& spread, const dlcore_keys& key, float* out,
                 Place place) {
  BitPerturbArguments a;
  a.x = view("x", x);
  const int64_t rows = a.x.rows;
  const auto checked = needed_per_row("spread", spread, rows, 0, kLargest, Place::memory);
  a.keys = keys(key, rows);
  needed("out", out, rows);
  if (rows == 0) return;
  a.spread = place.numbers(BitSpreads{checked}, rows);
  a.out = out;
  place(a, rows * a.x.columns * kBitNoise);
}

// What the loss and its gradient take, the slope aside, which is to be made of numbers.
template <class Place>
std::pair<BitLossArguments, BitSlopes> bit_loss_arguments(const dlcore_bits* state, const dlcore_matrix* bits,
                                                          int32_t kind) {
  const BitState s(state);
  BitLossArguments a;
  a.x = s.x;
  a.residual = view_like("residual", &state->residual, s.x);
  a.bits = view_like("bits", bits, s.x);
  const auto sigma = needed_per_row("sigma", state->sigma, s.x.rows, 0, kLargest, Place::memory);
  one_of("kind", kind, 2);
  a.coding = s.coding;
  a.squared = kind == DLCORE_SQUARED_ERROR;
  return {a, {sigma, s.range()}};
}

template <class Place>
void bit_loss(const dlcore_bits* state, const dlcore_matrix* bits, int32_t kind, float* loss, Place place) {
  auto [a, slopes] = bit_loss_arguments<Place>(state, bits, kind);
  needed("loss", loss, a.x.rows);
  if (a.x.rows == 0) return;
  a.slope = place.numbers(slopes, a.x.rows);
  place.means(a, loss);
}

template <class Place>
void bit_loss_backward(const dlcore_bits* state, const dlcore_matrix* bits, int32_t kind, const float* grad,
                       void* residual_grad, void* x_grad, Place place) {
  const auto [loss, slopes] = bit_loss_arguments<Place>(state, bits, kind);
  BitLossBackwardArguments a;
  a.loss = loss;
  const View &x = a.loss.x, &residual = a.loss.residual;
  needed("grad", grad, x.rows);
  needed("residual_grad", residual_grad, x.rows);
  if (x.rows == 0) return;
  a.residual_grad = result(residual_grad, residual.dtype, x.rows, x.columns);
  if (x_grad) a.x_grad = result(x_grad, x.dtype, x.rows, x.columns);
  a.loss.slope = place.numbers(slopes, x.rows);
  a.grad = place.numbers(BitMeanGrads{grad, x.columns}, x.rows).data;
  place(a, x.rows * x.columns);
}

template <class Place>
void bit_encode(const dlcore_bit_code* code, const int64_t* tokens, int64_t count, float* bits, Place place) {
  check_code(code);
  at_least("count", count, 0);
  const int64_t size = product("bits", {count, code->width});
  needed("tokens", tokens, count);
  if (Place::memory == Memory::kHost) token_ids("tokens", tokens, count, int64_t{1} << code->width);
  needed("bits", bits, count);
  const BitCoding coding = coding_of(code->coding, 0);
  BitEncodeArguments a;
  a.tokens = tokens;
  a.count = count;
  a.width = static_cast<int>(code->width);
  a.msb = code->order == DLCORE_MSB_FIRST;
  a.gray = code->gray != 0;
  a.low = coding.low;
  a.high = coding.high;
  a.out = bits;
  place(a, size);
}

template <class Place>
void bit_decode(const dlcore_bit_code* code, const dlcore_matrix* bits, int64_t vocab_size, int64_t* tokens,
                Place place) {
  check_code(code);
  BitDecodeArguments a;
  a.x = view("bits", bits);
  if (a.x.columns != code->width)
    refuse(DLCORE_INVALID_SHAPE, "bits->columns must be code->width, ", code->width, ", got ", a.x.columns);
  if (vocab_size < 0 || vocab_size > int64_t{1} << code->width)
    refuse(DLCORE_INVALID_VALUE, "vocab_size must lie in [0, 2^", code->width, "], got ", vocab_size);
  needed("tokens", tokens, a.x.rows);
  a.msb = code->order == DLCORE_MSB_FIRST;
  a.gray = code->gray != 0;
  a.threshold = code->coding == DLCORE_CODING_PM1 ? 0.0f : 0.5f;
  a.vocab = vocab_size;
  a.tokens = tokens;
  place(a, a.x.rows * a.x.columns);
}

}  // namespace dlcore::capi
