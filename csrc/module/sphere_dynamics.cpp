// The binding of the Langevin corrector on the sphere.
#include "module.h"

namespace dlcore {
namespace {

void correct(const py::tuple& x, const py::tuple& score, const py::object& step_size, const py::object& key,
             const py::tuple& out, int threads) {
  SphereCorrectArguments a;
  a.x = view(x);
  a.score = view(score);
  a.step_size = per_row<double>(step_size);
  a.keys = keys(key);
  a.out = view(out);
  run(kernels().sphere_correct, a, threads);
}

}  // namespace

void bind_sphere_dynamics(py::module_& m) { m.def("sphere_correct", correct); }

}  // namespace dlcore
