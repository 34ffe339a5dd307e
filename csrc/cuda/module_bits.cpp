// The bindings of bits: as in csrc/module/bits.cpp, with a stream for threads.
#include "../module/bits.h"
#include "bits.h"
#include "module.h"

namespace dlcore::cuda {
namespace {

template <class Arguments>
auto on_stream(void (*kernel)(const Arguments&, cudaStream_t)) {
  return [kernel](const Arguments& a, Address stream) { kernel(a, stream_at(stream)); };
}

}  // namespace

void bind_bits(py::module_& m) {
  m.def("bit_logits", bound<Address>(bit_logits_arguments, on_stream(bit_logits)));
  m.def("bit_step", bound<Address>(bit_step_arguments, on_stream(bit_step)));
  m.def("bit_perturb", bound<Address>(bit_perturb_arguments, on_stream(bit_perturb)));
  m.def("bit_loss_sums", bit_loss_sums);
  m.def("bit_loss", [](const py::tuple& packed, Address sums, Address means, Address stream) {
    bit_loss(bit_loss_arguments(packed, sums), at<float>(means), stream_at(stream));
  });
  m.def("bit_loss_backward", bound<Address>(bit_loss_backward_arguments, on_stream(bit_loss_backward)));
  m.def("bit_encode", bound<Address>(bit_encode_arguments, on_stream(bit_encode)));
  m.def("bit_decode", bound<Address>(bit_decode_arguments, on_stream(bit_decode)));
}

}  // namespace dlcore::cuda
