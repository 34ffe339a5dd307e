// The bindings of bits.
#include "../common/bits.h"

#include "module.h"

namespace dlcore {
namespace {

// (address, distance between parameters, stride of rows, stride of columns).
BitParameters parameters(const py::tuple& t) {
  return {at<const float>(t[0].cast<Address>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
          t[3].cast<int64_t>()};
}

// (low, high, clip).
BitCoding coding(const py::tuple& t) { return {t[0].cast<float>(), t[1].cast<float>(), t[2].cast<float>()}; }

View optional_view(const py::object& o) { return o.is_none() ? View{} : view(o.cast<py::tuple>()); }

void logits(const py::tuple& x, const py::object& residual, const py::tuple& slope, const py::tuple& code,
            bool sigmoid, Address out, int threads) {
  BitLogitsArguments a;
  a.x = view(x);
  a.residual = optional_view(residual);
  a.slope = parameters(slope);
  a.coding = coding(code);
  a.sigmoid = sigmoid;
  a.out = at<float>(out);
  run(kernels().bit_logits, a, threads);
}

void step(const py::tuple& x, const py::object& residual, const py::tuple& coefficients,
          const py::tuple& code, const py::object& key, Address next, Address probs, int threads) {
  BitStepArguments a;
  a.x = view(x);
  a.residual = optional_view(residual);
  a.parameters = parameters(coefficients);
  a.coding = coding(code);
  a.keys = keys(key);
  a.next = at<float>(next);
  a.probs = at<float>(probs);
  run(kernels().bit_step, a, threads);
}

void perturb(const py::tuple& x, const py::tuple& spread, const py::object& key, Address out, int threads) {
  BitPerturbArguments a;
  a.x = view(x);
  a.spread = parameters(spread);
  a.keys = keys(key);
  a.out = at<float>(out);
  run(kernels().bit_perturb, a, threads);
}

// ((residual, x, bits), slope, coding, squared).
BitLossArguments loss_arguments(const py::tuple& t) {
  const auto tensors = t[0].cast<py::tuple>();
  BitLossArguments a;
  a.residual = view(tensors[0]);
  a.x = view(tensors[1]);
  a.bits = view(tensors[2]);
  a.slope = parameters(t[1]);
  a.coding = coding(t[2]);
  a.squared = t[3].cast<bool>();
  return a;
}

void loss(const py::tuple& packed, Address sums, int threads) {
  BitLossArguments a = loss_arguments(packed);
  a.sums = at<double>(sums);
  run(kernels().bit_loss, a, threads);
}

void loss_backward(const py::tuple& packed, Address grad, const py::tuple& residual_grad,
                   const py::object& x_grad, int threads) {
  BitLossBackwardArguments a;
  a.loss = loss_arguments(packed);
  a.grad = at<const float>(grad);
  a.residual_grad = view(residual_grad);
  a.x_grad = optional_view(x_grad);
  run(kernels().bit_loss_backward, a, threads);
}

void encode(Address tokens, int64_t count, int width, bool msb, bool gray, std::pair<float, float> values,
            Address out, int threads) {
  BitEncodeArguments a;
  a.tokens = at<const int64_t>(tokens);
  a.count = count;
  a.width = width;
  a.msb = msb;
  a.gray = gray;
  a.low = values.first;
  a.high = values.second;
  a.out = at<float>(out);
  run(kernels().bit_encode, a, threads);
}

void decode(const py::tuple& x, bool msb, bool gray, float threshold, int64_t vocab, Address tokens,
            int threads) {
  BitDecodeArguments a;
  a.x = view(x);
  a.msb = msb;
  a.gray = gray;
  a.threshold = threshold;
  a.vocab = vocab;
  a.tokens = at<int64_t>(tokens);
  run(kernels().bit_decode, a, threads);
}

}  // namespace

void bind_bits(py::module_& m) {
  m.def("bit_spans", bit_spans);
  m.def("bit_logits", logits);
  m.def("bit_step", step);
  m.def("bit_perturb", perturb);
  m.def("bit_loss", loss);
  m.def("bit_loss_backward", loss_backward);
  m.def("bit_encode", encode);
  m.def("bit_decode", decode);
}

}  // namespace dlcore
