// The bindings of uniform.
#include "module.h"

namespace dlcore {
namespace {

void sum_nelbo(const py::tuple& logits, int64_t first_token, int64_t vocab, const py::tuple& parameters,
               const py::object& alpha, const py::object& target, Address saved, int threads) {
  NelboArguments a;
  a.scan = !target.is_none();
  a.target = per_row<int64_t>(target);
  a.logits = view(logits);
  a.first_token = first_token;
  a.vocab = vocab;
  a.softmax = softmax(parameters);
  a.alpha = per_row<double>(alpha);
  a.saved = at<double>(saved);
  run(kernels().nelbo, a, threads);
}

void nelbo_gradient(const py::tuple& logits, int64_t first_token, int64_t vocab, const py::tuple& parameters,
                    Address z, Address x, const py::object& alpha, const py::object& dalpha, Address grad,
                    Address saved, const py::tuple& out, int threads) {
  NelboBackwardArguments a;
  a.logits = view(logits);
  a.first_token = first_token;
  a.vocab = vocab;
  a.softmax = softmax(parameters);
  a.z = at<const int64_t>(z);
  a.x = at<const int64_t>(x);
  a.alpha = per_row<double>(alpha);
  a.dalpha = per_row<double>(dalpha);
  a.grad = at<const float>(grad);
  a.saved = at<const double>(saved);
  a.out = view(out);
  run(kernels().nelbo_backward, a, threads);
}

}  // namespace

void bind_uniform(py::module_& m) {
  m.def("start_nelbo", [](Address state, int64_t rows, Address saved) {
    for (int64_t r = 0; r < rows; ++r) start_nelbo(at<Summary>(state)[r], r, rows, at<double>(saved));
  });
  m.def("nelbo", sum_nelbo);
  m.def("finish_nelbo", [](Address saved, int64_t rows, int64_t vocab, Address z, Address x,
                           const py::object& alpha, const py::object& dalpha, Address loss) {
    finish_nelbo(at<double>(saved), rows, vocab, at<int64_t>(z), at<int64_t>(x), per_row<double>(alpha),
                 per_row<double>(dalpha), at<float>(loss));
  });
  m.def("nelbo_backward", nelbo_gradient);
}

}  // namespace dlcore
