// The table of one ISA level. Compiled once per level.
#include "kernels.h"

#define DLCORE_TEXT(x) #x
#define DLCORE_NAME(x) DLCORE_TEXT(x)

namespace dlcore::DLCORE_ISA {

const Kernels& level() {
  static const Kernels table = {
      DLCORE_NAME(DLCORE_ISA),
      attention,
      attention_backward,
      bit_decode,
      bit_encode,
      bit_logits,
      bit_loss,
      bit_loss_backward,
      bit_perturb,
      bit_step,
      scan,
      softmax_tile,
      histogram,
      log_probs_backward,
      kl,
      kl_backward,
      matmul,
      nelbo,
      nelbo_backward,
      normal,
      sphere_map,
      sphere_sample,
      read,
      gumbel,
      sphere_correct,
      sphere_weights,
      sphere_velocity_backward,
      largest,
      row_cosine,
      guided_step,
  };
  return table;
}

}  // namespace dlcore::DLCORE_ISA
