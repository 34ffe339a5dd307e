// The kernels of one ISA level, and the choice between levels.
#pragma once

#include <functional>

#include "../common/bits.h"
#include "../common/guidance.h"
#include "../common/sphere.h"
#include "../common/sphere_correct.h"
#include "attention.h"
#include "categorical.h"
#include "linear_logits.h"
#include "rng.h"
#include "similarity.h"
#include "sphere_velocity.h"
#include "uniform.h"

namespace dlcore {

struct Kernels {
  const char* name;
  void (*attention)(const AttentionArguments&);
  void (*attention_backward)(const AttentionBackwardArguments&);
  void (*bit_decode)(const BitDecodeArguments&);
  void (*bit_encode)(const BitEncodeArguments&);
  void (*bit_logits)(const BitLogitsArguments&);
  void (*bit_loss)(const BitLossArguments&);
  void (*bit_loss_backward)(const BitLossBackwardArguments&);
  void (*bit_perturb)(const BitPerturbArguments&);
  void (*bit_step)(const BitStepArguments&);
  void (*scan)(const ScanArguments&);
  void (*softmax_tile)(const SoftmaxTileArguments&);
  void (*histogram)(const HistogramArguments&);
  void (*log_probs_backward)(const LogProbsBackwardArguments&);
  void (*kl)(const KLArguments&);
  void (*kl_backward)(const KLBackwardArguments&);
  void (*matmul)(const MatmulArguments&);
  void (*nelbo)(const NelboArguments&);
  void (*nelbo_backward)(const NelboBackwardArguments&);
  void (*normal)(const NormalArguments&);
  void (*sphere_map)(const SphereMapArguments&);
  void (*sphere_sample)(const SphereSampleArguments&);
  float (*read)(const float*, int64_t count, int threads);
  void (*gumbel)(const uint32_t* high, const uint32_t* low, int64_t count, float* out);
  void (*sphere_correct)(const SphereCorrectArguments&);
  void (*sphere_weights)(const SphereWeightsArguments&);
  void (*sphere_velocity_backward)(const SphereVelocityBackwardArguments&);
  void (*largest)(const LargestArguments&);
  void (*row_cosine)(const CosineArguments&);
  void (*guided_step)(const GuidedStepArguments&);
};

// Each level's sources are the same, compiled with other flags into a namespace of its own.
#if defined(DLCORE_ISA)
namespace DLCORE_ISA {
void attention(const AttentionArguments&);
void attention_backward(const AttentionBackwardArguments&);
void bit_decode(const BitDecodeArguments&);
void bit_encode(const BitEncodeArguments&);
void bit_logits(const BitLogitsArguments&);
void bit_loss(const BitLossArguments&);
void bit_loss_backward(const BitLossBackwardArguments&);
void bit_perturb(const BitPerturbArguments&);
void bit_step(const BitStepArguments&);
// done(row, summary) of each row in [begin, end) that is read, in order.
using RowDone = std::function<void(int64_t, const Summary&)>;
void scan_rows(const ScanArguments&, int64_t begin, int64_t end, const RowDone& done);
void scan(const ScanArguments&);
void softmax_tile(const SoftmaxTileArguments&);
void histogram(const HistogramArguments&);
void log_probs_backward(const LogProbsBackwardArguments&);
void kl(const KLArguments&);
void kl_backward(const KLBackwardArguments&);
void matmul(const MatmulArguments&);
void nelbo(const NelboArguments&);
void nelbo_backward(const NelboBackwardArguments&);
void normal(const NormalArguments&);
void sphere_map(const SphereMapArguments&);
void sphere_sample(const SphereSampleArguments&);
float read(const float*, int64_t count, int threads);
void gumbel(const uint32_t* high, const uint32_t* low, int64_t count, float* out);
void sphere_correct(const SphereCorrectArguments&);
void sphere_weights(const SphereWeightsArguments&);
void sphere_velocity_backward(const SphereVelocityBackwardArguments&);
void largest(const LargestArguments&);
void row_cosine(const CosineArguments&);
void guided_step(const GuidedStepArguments&);
}  // namespace DLCORE_ISA
#endif

namespace baseline {
const Kernels& level();
}
namespace avx2 {
const Kernels& level();
}
namespace avx512 {
const Kernels& level();
}

// The level in use: the best one, unless chosen. Never null.
const Kernels& kernels();

// Use a level ("avx512", "avx2", "baseline") from now on; false if this machine or build lacks it.
bool choose_kernels(const char* name);

}  // namespace dlcore
