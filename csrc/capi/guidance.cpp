// Draws from two blended streams of logits.
#include "guidance.h"

namespace dlcore::capi {
namespace {

constexpr double kInfinite = std::numeric_limits<double>::infinity();

void check_coefficients(const PerRow<double>& coefficients, int64_t rows, Memory memory) {
  if (coefficients.stride != 0 && coefficients.stride < kGuidedCoefficients)
    refuse(DLCORE_INVALID_SHAPE, "coefficients.stride must be 0 or at least ", kGuidedCoefficients, ", got ",
           coefficients.stride);
  if (memory == Memory::kDevice) return;
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

}  // namespace

GuidedStepArguments guided_step_of(const dlcore_guided_step& step, int64_t* tokens, Memory memory) {
  GuidedStepArguments a;
  a.cond = view("cond", step.cond);
  a.uncond = view_like("uncond", &step.uncond, a.cond);
  const int64_t rows = a.cond.rows, vocab = a.cond.columns;
  needed("z", step.z, rows);
  a.z = step.z;
  needed("coefficients", step.coefficients.data, rows);
  a.coefficients = per_row("coefficients", step.coefficients);
  check_coefficients(a.coefficients, rows, memory);
  if (memory == Memory::kHost) token_ids("z", step.z, rows, vocab);
  token_ids("exclude", step.exclude, 1, vocab);
  if (step.exclude && vocab == 1)
    refuse(DLCORE_INVALID_VALUE, "exclude leaves no token in a vocabulary of 1");
  a.exclude = step.exclude ? *step.exclude : -1;
  a.keys = keys(step.keys, rows);
  needed("tokens", tokens, rows);
  a.tokens = tokens;
  return a;
}

}  // namespace dlcore::capi

using namespace dlcore;
using namespace dlcore::capi;

dlcore_status dlcore_guidance_cfg_uniform_step(const dlcore_guided_step* step, int64_t* tokens) {
  return guarded(__func__, [&] {
    GuidedStepArguments a = guided_step_of(pointed("step", step), tokens, Memory::kHost);
    a.threads = threads_for(step->threads, 2 * a.cond.rows * a.cond.columns);
    kernels().guided_step(a);
  });
}
