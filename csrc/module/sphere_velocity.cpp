// The bindings of vocabulary drifts on the sphere.
#include "module.h"

namespace dlcore {
namespace {

// ((address, stride), terms), or None.
Radial radial(const py::object& o) {
  if (o.is_none()) return {};
  const auto t = o.cast<py::tuple>();
  return {per_row<float>(t[0]), t[1].cast<int64_t>()};
}

void weigh(const py::tuple& logits, Address reference, const py::object& weight, Address cosines, int threads) {
  SphereWeightsArguments a;
  a.logits = view(logits);
  a.reference = at<const double>(reference);
  a.radial = radial(weight);
  a.cosines = at<float>(cosines);
  run(kernels().sphere_weights, a, threads);
}

void velocity_gradient(const py::tuple& logits, Address logsumexp, Address mean, const py::object& weight,
                       Address cosines, Address pulls, const py::tuple& out, int threads) {
  SphereVelocityBackwardArguments a;
  a.logits = view(logits);
  a.logsumexp = at<const double>(logsumexp);
  a.mean = at<const float>(mean);
  a.radial = radial(weight);
  a.cosines = at<float>(cosines);
  a.pulls = at<float>(pulls);
  a.out = view(out);
  run(kernels().sphere_velocity_backward, a, threads);
}

void keep_largest(const py::tuple& logits, int64_t first_token, int64_t count, Address values, Address ids,
                  int threads) {
  LargestArguments a;
  a.logits = view(logits);
  a.first_token = first_token;
  a.count = count;
  a.values = at<float>(values);
  a.ids = at<int64_t>(ids);
  run(kernels().largest, a, threads);
}

}  // namespace

void bind_sphere_velocity(py::module_& m) {
  m.def("sphere_weights", weigh);
  m.def("sphere_velocity_backward", velocity_gradient);
  m.def("largest", keep_largest);
}

}  // namespace dlcore
