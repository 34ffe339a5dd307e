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
}

}  // namespace dlcore::cuda
