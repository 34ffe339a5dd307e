// Draws from two blended streams of logits.
#include "capi.h"

namespace dlcore::capi {
namespace {

constexpr double kInfinite = std::numeric_limits<double>::infinity();

void check_coefficients(const PerRow<double>& coefficients, int64_t rows) {
  if (coefficients.stride != 0 && coefficients.stride < kGuidedCoefficients)
    refuse(DLCORE_INVALID_SHAPE, "coefficients.stride must be 0 or at least ", kGuidedCoefficients, ", got ",
           coefficients.stride);
  for (int64_t r = 0; r < values(coefficients, rows); ++r) {
    const double* c = &coefficients[r];
    in_range("coefficients: gamma", c[0], -kMost, kMost);
    in_range("coefficients: temperature", c[1], kSmallest, kLargest);
    in_range("coefficients: shift", c[2], -kLargest, kLargest);
    in_range("coefficients: alpha_s", c[3], 0, 1);
    in_range("coefficients: bonus", c[4], -kLargest, kLargest);
    in_range("coefficients: keep", c[5], -kInfinite, kInfinite);
  }
}

void step(const dlcore_guided_step& s, int64_t* tokens) {
  GuidedStepArguments a;
  a.cond = view("cond", s.cond);
  a.uncond = view_like("uncond", &s.uncond, a.cond);
  const int64_t rows = a.cond.rows, vocab = a.cond.columns;
  needed("z", s.z, rows);
  token_ids("z", s.z, rows, vocab);
  a.z = s.z;
  needed("coefficients", s.coefficients.data, rows);
  a.coefficients = per_row("coefficients", s.coefficients);
  check_coefficients(a.coefficients, rows);
  token_ids("exclude", s.exclude, 1, vocab);
  if (s.exclude && vocab == 1) refuse(DLCORE_INVALID_VALUE, "exclude leaves no token in a vocabulary of 1");
  a.exclude = s.exclude ? *s.exclude : -1;
  a.keys = keys(s.keys, rows);
  needed("tokens", tokens, rows);
  a.tokens = tokens;
  a.threads = threads_for(s.threads, 2 * rows * vocab);
  kernels().guided_step(a);
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore::capi;

dlcore_status dlcore_guidance_cfg_uniform_step(const dlcore_guided_step* step, int64_t* tokens) {
  return guarded(__func__, [&] { dlcore::capi::step(pointed("step", step), tokens); });
}
