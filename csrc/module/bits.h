// How the arguments of bits come from Python, for the kernels of either device.
#pragma once

#include "../common/bits.h"
#include "module.h"

namespace dlcore {

// (address, distance between parameters, stride of rows, stride of columns).
inline BitParameters bit_parameters(const py::tuple& t) {
  return {at<const float>(t[0].cast<Address>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
          t[3].cast<int64_t>()};
}

// (low, high, clip).
inline BitCoding bit_coding(const py::tuple& t) {
  return {t[0].cast<float>(), t[1].cast<float>(), t[2].cast<float>()};
}

inline View optional_view(const py::object& o) { return o.is_none() ? View{} : view(o.cast<py::tuple>()); }

inline BitLogitsArguments bit_logits_arguments(const py::tuple& x, const py::object& residual,
                                               const py::tuple& slope, const py::tuple& coding, bool sigmoid,
                                               Address out) {
  BitLogitsArguments a;
  a.x = view(x);
  a.residual = optional_view(residual);
  a.slope = bit_parameters(slope);
  a.coding = bit_coding(coding);
  a.sigmoid = sigmoid;
  a.out = at<float>(out);
  return a;
}

inline BitStepArguments bit_step_arguments(const py::tuple& x, const py::object& residual,
                                           const py::tuple& coefficients, const py::tuple& coding,
                                           const py::object& key, Address next, Address probs) {
  BitStepArguments a;
  a.x = view(x);
  a.residual = optional_view(residual);
  a.parameters = bit_parameters(coefficients);
  a.coding = bit_coding(coding);
  a.keys = keys(key);
  a.next = at<float>(next);
  a.probs = at<float>(probs);
  return a;
}

inline BitPerturbArguments bit_perturb_arguments(const py::tuple& x, const py::tuple& spread,
                                                 const py::object& key, Address out) {
  BitPerturbArguments a;
  a.x = view(x);
  a.spread = bit_parameters(spread);
  a.keys = keys(key);
  a.out = at<float>(out);
  return a;
}

// packed: ((residual, x, bits), slope, coding, squared).
inline BitLossArguments bit_loss_arguments(const py::tuple& packed, Address sums) {
  const auto tensors = packed[0].cast<py::tuple>();
  BitLossArguments a;
  a.residual = view(tensors[0]);
  a.x = view(tensors[1]);
  a.bits = view(tensors[2]);
  a.slope = bit_parameters(packed[1]);
  a.coding = bit_coding(packed[2]);
  a.squared = packed[3].cast<bool>();
  a.sums = at<double>(sums);
  return a;
}

inline BitLossBackwardArguments bit_loss_backward_arguments(const py::tuple& packed, Address grad,
                                                            const py::tuple& residual_grad,
                                                            const py::object& x_grad) {
  BitLossBackwardArguments a;
  a.loss = bit_loss_arguments(packed, 0);
  a.grad = at<const float>(grad);
  a.residual_grad = view(residual_grad);
  a.x_grad = optional_view(x_grad);
  return a;
}

inline BitEncodeArguments bit_encode_arguments(Address tokens, int64_t count, int width, bool msb, bool gray,
                                               std::pair<float, float> values, Address out) {
  BitEncodeArguments a;
  a.tokens = at<const int64_t>(tokens);
  a.count = count;
  a.width = width;
  a.msb = msb;
  a.gray = gray;
  a.low = values.first;
  a.high = values.second;
  a.out = at<float>(out);
  return a;
}

inline BitDecodeArguments bit_decode_arguments(const py::tuple& x, bool msb, bool gray, float threshold,
                                               int64_t vocab, Address tokens) {
  BitDecodeArguments a;
  a.x = view(x);
  a.msb = msb;
  a.gray = gray;
  a.threshold = threshold;
  a.vocab = vocab;
  a.tokens = at<int64_t>(tokens);
  return a;
}

// A function of Python that makes arguments of all that it is given but the last, and runs a kernel on both.
template <class Last, class Arguments, class... P, class Run>
auto bound(Arguments (*parse)(P...), Run run) {
  return [=](P... given, Last last) { run(parse(given...), last); };
}

}  // namespace dlcore
