// The bindings of sphere.
#include "sphere.h"

namespace dlcore {
namespace {

void map_sphere(int map, const std::vector<py::tuple>& inputs, const py::object& t, const py::object& grad,
                Address grad_angle, const std::vector<py::object>& outputs, Address number, int threads) {
  run(kernels().sphere_map, sphere_map(map, inputs, t, grad, grad_angle, outputs, number), threads);
}

void sample_sphere(const py::tuple& mean, const py::object& kappa, const py::object& key, bool reject,
                   const py::tuple& out, int threads) {
  run(kernels().sphere_sample, sphere_sample(mean, kappa, key, reject, out), threads);
}

}  // namespace

void bind_sphere(py::module_& m) {
  m.def("sphere_map", map_sphere);
  m.def("sphere_sample", sample_sphere);
}

}  // namespace dlcore
