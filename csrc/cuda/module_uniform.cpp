// The bindings of uniform.
#include "module.h"
#include "uniform.h"

namespace dlcore::cuda {

void bind_uniform(py::module_& m) {
  m.def("start_nelbo", [](Address state, int64_t rows, Address saved, Address stream) {
    start_nelbo(at<Summary>(state), rows, at<double>(saved), stream_at(stream));
  });
  m.def("nelbo_bytes", nelbo_bytes);
  m.def("nelbo", [](const py::tuple& logits, int64_t first_token, int64_t vocab, const py::tuple& parameters,
                    const py::object& alpha, Address saved, Address workspace, Address stream) {
    NelboArguments a;
    a.logits = view(logits);
    a.first_token = first_token;
    a.vocab = vocab;
    a.softmax = softmax(parameters);
    a.alpha = per_row<double>(alpha);
    a.saved = at<double>(saved);
    nelbo(a, at<void>(workspace), stream_at(stream));
  });
  m.def("finish_nelbo", [](Address saved, int64_t rows, int64_t vocab, Address z, Address x,
                           const py::object& alpha, const py::object& dalpha, Address loss, Address stream) {
    finish_nelbo(at<double>(saved), rows, vocab, at<int64_t>(z), at<int64_t>(x), per_row<double>(alpha),
                 per_row<double>(dalpha), at<float>(loss), stream_at(stream));
  });
  m.def("nelbo_backward",
        [](const py::tuple& logits, int64_t first_token, int64_t vocab, const py::tuple& parameters,
           Address z, Address x, const py::object& alpha, const py::object& dalpha, Address grad,
           Address saved, const py::tuple& out, Address stream) {
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
          nelbo_backward(a, stream_at(stream));
        });
}

}  // namespace dlcore::cuda
