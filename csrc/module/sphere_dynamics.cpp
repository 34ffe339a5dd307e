// The binding of the Langevin corrector on the sphere.
#include "sphere.h"

namespace dlcore {
namespace {

void correct(const py::tuple& x, const py::tuple& score, const py::object& step_size, const py::object& key,
             const py::tuple& out, int threads) {
  run(kernels().sphere_correct, sphere_correct(x, score, step_size, key, out), threads);
}

}  // namespace

void bind_sphere_dynamics(py::module_& m) { m.def("sphere_correct", correct); }

}  // namespace dlcore
