// What the bindings of sphere's kernels, for the CPU and for CUDA, take.
#pragma once

#include <vector>

#include "module.h"

namespace dlcore {

inline View view_or_none(const py::object& o) { return o.is_none() ? View{} : view(o.cast<py::tuple>()); }

inline SphereMapArguments sphere_map(int map, const std::vector<py::tuple>& inputs, const py::object& t,
                                     const py::object& grad, Address grad_angle,
                                     const std::vector<py::object>& outputs, Address number) {
  SphereMapArguments a;
  a.map = static_cast<SphereMap>(map);
  a.backward = !grad.is_none() || grad_angle != 0;
  for (size_t i = 0; i < inputs.size(); ++i) a.inputs[i] = view(inputs[i]);
  a.t = per_row<float>(t);
  a.grad = view_or_none(grad);
  a.grad_angle = at<const float>(grad_angle);
  for (size_t i = 0; i < outputs.size(); ++i) a.outputs[i] = view_or_none(outputs[i]);
  a.number = at<float>(number);
  return a;
}

inline SphereSampleArguments sphere_sample(const py::tuple& mean, const py::object& kappa,
                                           const py::object& key, bool reject, const py::tuple& out) {
  SphereSampleArguments a;
  a.mean = view(mean);
  a.kappa = per_row<double>(kappa);
  a.keys = keys(key);
  a.reject = reject;
  a.out = view(out);
  return a;
}

inline SphereCorrectArguments sphere_correct(const py::tuple& x, const py::tuple& score,
                                             const py::object& step_size, const py::object& key,
                                             const py::object& out) {
  SphereCorrectArguments a;
  a.x = view(x);
  a.score = view(score);
  a.step_size = per_row<double>(step_size);
  a.keys = keys(key);
  a.out = view_or_none(out);
  return a;
}

}  // namespace dlcore
