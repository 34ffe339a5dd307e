// The bindings of sphere.
#include "../module/sphere.h"
#include "module.h"
#include "sphere.h"

namespace dlcore::cuda {

void bind_sphere(py::module_& m) {
  m.def("sphere_map", [](int map, const std::vector<py::tuple>& inputs, const py::object& t,
                         const py::object& grad, Address grad_angle, const std::vector<py::object>& outputs,
                         Address number, Address stream) {
    sphere_map(dlcore::sphere_map(map, inputs, t, grad, grad_angle, outputs, number), stream_at(stream));
  });
  m.def("sphere_sample", [](const py::tuple& mean, const py::object& kappa, const py::object& key,
                            bool reject, const py::tuple& out, Address stream) {
    sphere_sample(dlcore::sphere_sample(mean, kappa, key, reject, out), stream_at(stream));
  });
  m.attr("MOST_CORRECTED") = kMostCorrected;
  m.def("sphere_correct", [](const py::tuple& x, const py::tuple& score, const py::object& step_size,
                             const py::object& key, const py::tuple& out, Address stream) {
    sphere_correct(dlcore::sphere_correct(x, score, step_size, key, out), stream_at(stream));
  });
  m.def("sphere_correct_backward",
        [](const py::tuple& grad, const py::tuple& x, const py::tuple& score, const py::object& step_size,
           const py::object& key, const py::tuple& x_grad, const py::tuple& score_grad, Address step_grad,
           Address stream) {
          SphereCorrectBackwardArguments a;
          a.forward = dlcore::sphere_correct(x, score, step_size, key, py::none());
          a.grad = view(grad);
          a.x_grad = view(x_grad);
          a.score_grad = view(score_grad);
          a.step_grad = at<double>(step_grad);
          sphere_correct_backward(a, stream_at(stream));
        });
}

}  // namespace dlcore::cuda
