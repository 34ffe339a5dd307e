// Bitstream diffusion.
#include <algorithm>
#include <cmath>

#include "capi.h"

namespace dlcore::capi {
namespace {

constexpr int64_t kMostBits = 62;
constexpr float kClip = 30;
constexpr double kNoiseScale = 1.003;
// Of the variance: x exactly between the two bits has logit 0 at sigma = 0 too.
constexpr double kLeastVariance = 1e-12;
// What drawing a normal costs, in elements read.
constexpr int64_t kNoise = 8;

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

// What every function of a state takes of it, checked.
struct State {
  explicit State(const dlcore_bits* state)
      : x(view("x", pointed("state", state).x)),
        coding(coding_of(state->coding, state->clip)),
        threads(state->threads) {
    if (state->residual.data || state->residual.rows != 0)
      residual = view_like("residual", &state->residual, x);
    threads_for(threads, 0);
  }

  int64_t size() const { return x.rows * x.columns; }
  double slope(double sigma) const {
    return (coding.high - coding.low) / std::max(sigma * sigma, kLeastVariance);
  }

  View x, residual;
  BitCoding coding;
  int32_t threads;
};

// Parameters as the kernels take them: columns of numbers, one for all rows or one per row.
class Parameters {
 public:
  Parameters(int count, std::initializer_list<PerRow<double>> of, int64_t rows)
      : each_(std::any_of(of.begin(), of.end(), [](const auto& p) { return p && p.stride != 0; }) ? rows : 1),
        numbers_(static_cast<size_t>(count * each_)) {}

  int64_t each() const { return each_; }
  bool shared() const { return each_ == 1; }
  void set(int which, int64_t row, double value) {
    numbers_[static_cast<size_t>(which * each_ + row)] = static_cast<float>(value);
  }
  BitParameters packed() const { return {numbers_.data(), each_, shared() ? 0 : 1, 0}; }

 private:
  int64_t each_;
  std::vector<float> numbers_;
};

// Rows that share their parameters and lie back to back are one long row.
void join(View& x, View& residual) {
  const auto has_gaps = [](const View& v) { return v.data && v.lead_stride[0] != v.columns; };
  if (has_gaps(x) || has_gaps(residual)) return;
  for (View* v : {&x, &residual})
    if (v->data) *v = result(v->data, v->dtype, 1, v->rows * v->columns);
}

Parameters slopes(const State& s, PerRow<double> sigma) {
  Parameters p(1, {sigma}, s.x.rows);
  for (int64_t r = 0; r < p.each(); ++r) p.set(0, r, s.slope(sigma[r]));
  return p;
}

void logits(const dlcore_bits* state, bool sigmoid, float* out) {
  const State s(state);
  const auto sigma = needed_per_row("sigma", state->sigma, s.x.rows, 0, kLargest);
  if (!sigmoid && s.residual.data) refuse(DLCORE_INVALID_VALUE, "residual must be none");
  needed("out", out, s.x.rows);
  if (s.x.rows == 0) return;
  const Parameters slope = slopes(s, sigma);
  BitLogitsArguments a;
  a.x = s.x;
  a.residual = s.residual;
  if (slope.shared()) join(a.x, a.residual);
  a.slope = slope.packed();
  a.coding = s.coding;
  a.sigmoid = sigmoid;
  a.out = out;
  a.threads = threads_for(s.threads, s.size());
  kernels().bit_logits(a);
}

void step(const dlcore_bits* state, const dlcore_bits_update* update, float* next, float* probs) {
  const State s(state);
  needed("update", update);
  const int64_t rows = s.x.rows;
  const auto sigma = needed_per_row("sigma", state->sigma, rows, kSmallest, kLargest);
  const auto sigma_next = needed_per_row("sigma_next", update->sigma_next, rows, 0, kLargest);
  const auto gamma = per_row("gamma_next", update->gamma_next, rows, 0, kLargest);
  const auto scale = per_row("noise_scale", update->noise_scale, rows, 0, kLargest);
  BitStepArguments a;
  if (gamma) a.keys = keys(update->keys, rows);
  needed("next", next, rows);
  needed("probs", probs, rows);
  if (rows == 0) return;
  Parameters p(3, {sigma, sigma_next, gamma, scale}, rows);
  for (int64_t r = 0; r < p.each(); ++r) {
    const double ratio = sigma_next[r] / sigma[r];
    in_range("sigma_next / sigma", ratio, 0, kLargest);
    p.set(0, r, s.slope(sigma[r]));
    p.set(1, r, ratio);
    const double noise = scale ? scale[r] : kNoiseScale;
    p.set(2, r, gamma ? noise * sigma_next[r] * std::sqrt(gamma[r] * (2 + gamma[r])) : 0);
  }
  a.x = s.x;
  a.residual = s.residual;
  if (p.shared() && !gamma) join(a.x, a.residual);
  a.parameters = p.packed();
  a.coding = s.coding;
  a.next = next;
  a.probs = probs;
  a.threads = threads_for(s.threads, s.size() * (gamma ? kNoise : 1));
  kernels().bit_step(a);
}

void perturb(const dlcore_matrix* x, const dlcore_doubles& spread, const dlcore_keys& key, float* out,
             int32_t threads) {
  BitPerturbArguments a;
  a.x = view("x", x);
  const int64_t rows = a.x.rows;
  const auto checked = needed_per_row("spread", spread, rows, 0, kLargest);
  a.keys = keys(key, rows);
  needed("out", out, rows);
  a.threads = threads_for(threads, rows * a.x.columns * kNoise);
  if (rows == 0) return;
  Parameters p(1, {checked}, rows);
  for (int64_t r = 0; r < p.each(); ++r) p.set(0, r, checked[r]);
  a.spread = p.packed();
  a.out = out;
  kernels().bit_perturb(a);
}

void mean_loss(const dlcore_bits* state, const dlcore_matrix* bits, int32_t kind, float* loss) {
  const State s(state);
  const int64_t rows = s.x.rows, spans = bit_spans(s.x.columns);
  BitLossArguments a;
  a.x = s.x;
  a.residual = view_like("residual", &state->residual, s.x);
  a.bits = view_like("bits", bits, s.x);
  const auto sigma = needed_per_row("sigma", state->sigma, rows, 0, kLargest);
  one_of("kind", kind, 2);
  needed("loss", loss, rows);
  if (rows == 0) return;
  const Parameters slope = slopes(s, sigma);
  const auto sums = room<double>(rows * spans);
  a.slope = slope.packed();
  a.coding = s.coding;
  a.squared = kind == DLCORE_SQUARED_ERROR;
  a.sums = sums.get();
  a.threads = threads_for(s.threads, s.size());
  kernels().bit_loss(a);
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < spans; ++i) sum += sums[r * spans + i];
    loss[r] = static_cast<float>(sum / static_cast<double>(s.x.columns));
  }
}

void encode(const dlcore_bit_code* code, const int64_t* tokens, int64_t count, float* bits, int32_t threads) {
  check_code(code);
  at_least("count", count, 0);
  const int64_t size = product("bits", {count, code->width});
  needed("tokens", tokens, count);
  token_ids("tokens", tokens, count, int64_t{1} << code->width);
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
  a.threads = threads_for(threads, size);
  kernels().bit_encode(a);
}

void decode(const dlcore_bit_code* code, const dlcore_matrix* bits, int64_t vocab_size, int64_t* tokens,
            int32_t threads) {
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
  a.threads = threads_for(threads, a.x.rows * a.x.columns);
  kernels().bit_decode(a);
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore;

dlcore_status dlcore_bits_encode(const dlcore_bit_code* code, const int64_t* tokens, int64_t count,
                                 float* bits, int32_t threads) {
  return capi::guarded(__func__, [&] { capi::encode(code, tokens, count, bits, threads); });
}

dlcore_status dlcore_bits_decode(const dlcore_bit_code* code, const dlcore_matrix* bits, int64_t vocab_size,
                                 int64_t* tokens, int32_t threads) {
  return capi::guarded(__func__, [&] { capi::decode(code, bits, vocab_size, tokens, threads); });
}

dlcore_status dlcore_bits_matched_filter(const dlcore_bits* state, float* out) {
  return capi::guarded(__func__, [&] { capi::logits(state, false, out); });
}

dlcore_status dlcore_bits_posterior(const dlcore_bits* state, float* out) {
  return capi::guarded(__func__, [&] { capi::logits(state, true, out); });
}

dlcore_status dlcore_bits_step(const dlcore_bits* state, const dlcore_bits_update* update, float* next,
                               float* probs) {
  return capi::guarded(__func__, [&] { capi::step(state, update, next, probs); });
}

dlcore_status dlcore_bits_perturb(const dlcore_matrix* x, dlcore_doubles spread, dlcore_keys keys, float* out,
                                  int32_t threads) {
  return capi::guarded(__func__, [&] { capi::perturb(x, spread, keys, out, threads); });
}

dlcore_status dlcore_bits_loss(const dlcore_bits* state, const dlcore_matrix* bits, int32_t kind,
                               float* loss) {
  return capi::guarded(__func__, [&] { capi::mean_loss(state, bits, kind, loss); });
}
