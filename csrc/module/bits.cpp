// The bindings of bits.
#include "bits.h"

namespace dlcore {
namespace {

// A kernel of the level that is in use, by its place in the table.
template <class Arguments>
auto on_threads(void (*Kernels::*kernel)(const Arguments&)) {
  return [kernel](const Arguments& a, int threads) { run(kernels().*kernel, a, threads); };
}

}  // namespace

void bind_bits(py::module_& m) {
  m.def("bit_spans", bit_spans);
  m.def("bit_logits", bound<int>(bit_logits_arguments, on_threads(&Kernels::bit_logits)));
  m.def("bit_step", bound<int>(bit_step_arguments, on_threads(&Kernels::bit_step)));
  m.def("bit_perturb", bound<int>(bit_perturb_arguments, on_threads(&Kernels::bit_perturb)));
  m.def("bit_loss", bound<int>(bit_loss_arguments, on_threads(&Kernels::bit_loss)));
  m.def("bit_loss_backward",
        bound<int>(bit_loss_backward_arguments, on_threads(&Kernels::bit_loss_backward)));
  m.def("bit_encode", bound<int>(bit_encode_arguments, on_threads(&Kernels::bit_encode)));
  m.def("bit_decode", bound<int>(bit_decode_arguments, on_threads(&Kernels::bit_decode)));
}

}  // namespace dlcore
