// Maps of the unit sphere, and draws of its laws, on the host.
#include "sphere.h"

#include "places.h"

namespace dlcore::capi {
namespace {

class SphereHost : public Host {
 public:
  using Host::Host;

  void operator()(const SphereMapArguments& a, int64_t n) const { run(&Kernels::sphere_map, a, n); }
  void operator()(const SphereCorrectArguments& a, int64_t n) const { run(&Kernels::sphere_correct, a, n); }
  void operator()(const SphereSampleArguments& a, int64_t n) const { run(&Kernels::sphere_sample, a, n); }
};

}  // namespace

View alike(const Vectors& input, const View& first) {
  const View v = view_like(input.name, input.matrix, first);
  if (v.dtype != first.dtype)
    refuse(DLCORE_INVALID_DTYPE, input.name, "->dtype must be that of the first argument, ",
           static_cast<int>(first.dtype), ", got ", static_cast<int>(v.dtype));
  return v;
}

View vectors(const Vectors& input, int64_t least) {
  const View v = view(input.name, input.matrix);
  if (v.columns < least)
    refuse(DLCORE_INVALID_SHAPE, input.name, "->columns must be at least ", least, ", got ", v.columns);
  return v;
}

SphereMapArguments map_arguments(SphereMap map, std::initializer_list<Vectors> inputs, int64_t least,
                                 const MapNumber& t, Memory memory) {
  SphereMapArguments a;
  a.map = map;
  const View x = a.inputs[0] = vectors(*inputs.begin(), least);
  for (size_t i = 1; i < inputs.size(); ++i) a.inputs[i] = alike(inputs.begin()[i], x);
  if (t.name) a.t = needed_per_row(t.name, t.values, x.rows, -kLargest, kLargest, memory);
  return a;
}

SphereMapArguments map_backward_arguments(SphereMap map, const dlcore_matrix* grad, const float* grad_angle,
                                          std::initializer_list<Vectors> inputs, int64_t least,
                                          std::initializer_list<void*> outputs, const MapNumber& t,
                                          float* t_grad, Memory memory) {
  SphereMapArguments a = map_arguments(map, inputs, least, t, memory);
  const View& x = a.inputs[0];
  a.backward = true;
  if (map == SphereMap::kAngle)
    needed("grad", grad_angle, x.rows);
  else
    a.grad = alike({"grad", grad}, x);
  a.grad_angle = grad_angle;
  for (size_t i = 0; i < outputs.size(); ++i)
    if (void* out = outputs.begin()[i]) a.outputs[i] = result(out, x.dtype, x.rows, x.columns);
  a.number = t_grad;
  return a;
}

SphereCorrectArguments correct_arguments(const dlcore_matrix* x, const dlcore_matrix* score,
                                         const dlcore_doubles& step_size, const dlcore_keys& key,
                                         Memory memory) {
  SphereCorrectArguments a;
  a.x = vectors({"x", x}, 2);
  a.score = alike({"score", score}, a.x);
  a.step_size = needed_per_row("step_size", step_size, a.x.rows, 0, kInfinity, memory);
  a.keys = keys(key, a.x.rows);
  return a;
}

SphereSampleArguments sample_arguments(const dlcore_matrix* mean, const dlcore_doubles& kappa, int32_t law,
                                       const dlcore_keys& key, void* out, Memory memory) {
  SphereSampleArguments a;
  a.mean = vectors({"mean", mean}, 2);
  a.kappa = needed_per_row("kappa", kappa, a.mean.rows, 0, kLargest, memory);
  one_of("law", law, 2);
  a.reject = law == DLCORE_VON_MISES_FISHER;
  a.keys = keys(key, a.mean.rows);
  needed("out", out, a.mean.rows);
  a.out = result(out, a.mean.dtype, a.mean.rows, a.mean.columns);
  return a;
}

}  // namespace dlcore::capi

using namespace dlcore;
using namespace dlcore::capi;

dlcore_status dlcore_sphere_normalize(const dlcore_matrix* x, void* out, int32_t threads) {
  return guarded(__func__,
                 [&] { sphere_map(SphereMap::kNormalize, {{"x", x}}, 1, out, SphereHost(threads)); });
}

dlcore_status dlcore_sphere_project(const dlcore_matrix* x, const dlcore_matrix* u, void* out,
                                    int32_t threads) {
  return guarded(__func__,
                 [&] { sphere_map(SphereMap::kProject, {{"x", x}, {"u", u}}, 1, out, SphereHost(threads)); });
}

dlcore_status dlcore_sphere_angle(const dlcore_matrix* x, const dlcore_matrix* y, float* radians,
                                  int32_t threads) {
  return guarded(__func__, [&] {
    sphere_map(SphereMap::kAngle, {{"x", x}, {"y", y}}, 1, radians, SphereHost(threads));
  });
}

dlcore_status dlcore_sphere_slerp(const dlcore_matrix* x, const dlcore_matrix* y, dlcore_floats t, void* out,
                                  int32_t threads) {
  return guarded(__func__, [&] {
    sphere_map(SphereMap::kSlerp, {{"x", x}, {"y", y}}, 2, out, SphereHost(threads), {"t", t});
  });
}

dlcore_status dlcore_sphere_log_map(const dlcore_matrix* x, const dlcore_matrix* y, void* out,
                                    int32_t threads) {
  return guarded(__func__,
                 [&] { sphere_map(SphereMap::kLog, {{"x", x}, {"y", y}}, 2, out, SphereHost(threads)); });
}

dlcore_status dlcore_sphere_exp_map(const dlcore_matrix* x, const dlcore_matrix* v, void* out,
                                    int32_t threads) {
  return guarded(__func__,
                 [&] { sphere_map(SphereMap::kExp, {{"x", x}, {"v", v}}, 1, out, SphereHost(threads)); });
}

dlcore_status dlcore_sphere_rotate(const dlcore_matrix* x, const dlcore_matrix* source,
                                   const dlcore_matrix* target, void* out, int32_t threads) {
  return guarded(__func__, [&] {
    sphere_map(SphereMap::kRotate, {{"x", x}, {"source", source}, {"target", target}}, 2, out,
               SphereHost(threads));
  });
}

dlcore_status dlcore_sphere_step(const dlcore_matrix* x, const dlcore_matrix* velocity, dlcore_floats delta,
                                 int32_t retraction, void* out, int32_t threads) {
  return guarded(__func__, [&] { sphere_step(x, velocity, delta, retraction, out, SphereHost(threads)); });
}

dlcore_status dlcore_sphere_correct(const dlcore_matrix* x, const dlcore_matrix* score,
                                    dlcore_doubles step_size, dlcore_keys keys, void* out, int32_t threads) {
  return guarded(__func__, [&] { sphere_correct(x, score, step_size, keys, out, SphereHost(threads)); });
}

dlcore_status dlcore_sphere_sample(const dlcore_matrix* mean, dlcore_doubles kappa, int32_t law,
                                   dlcore_keys keys, void* out, int32_t threads) {
  return guarded(__func__, [&] { sphere_sample(mean, kappa, law, keys, out, SphereHost(threads)); });
}

dlcore_status dlcore_sphere_normalize_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                               void* x_grad, int32_t threads) {
  return guarded(__func__, [&] {
    sphere_map_backward(SphereMap::kNormalize, grad, {{"x", x}}, 1, {x_grad}, SphereHost(threads));
  });
}

dlcore_status dlcore_sphere_project_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                             const dlcore_matrix* u, void* x_grad, void* u_grad,
                                             int32_t threads) {
  return guarded(__func__, [&] {
    sphere_map_backward(SphereMap::kProject, grad, {{"x", x}, {"u", u}}, 1, {x_grad, u_grad},
                        SphereHost(threads));
  });
}

dlcore_status dlcore_sphere_angle_backward(const float* grad, const dlcore_matrix* x, const dlcore_matrix* y,
                                           void* x_grad, void* y_grad, int32_t threads) {
  return guarded(__func__, [&] { sphere_angle_backward(grad, x, y, x_grad, y_grad, SphereHost(threads)); });
}

dlcore_status dlcore_sphere_slerp_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                           const dlcore_matrix* y, dlcore_floats t, void* x_grad,
                                           void* y_grad, float* t_grad, int32_t threads) {
  return guarded(__func__, [&] {
    sphere_map_backward(SphereMap::kSlerp, grad, {{"x", x}, {"y", y}}, 2, {x_grad, y_grad},
                        SphereHost(threads), {"t", t}, t_grad);
  });
}

dlcore_status dlcore_sphere_log_map_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                             const dlcore_matrix* y, void* x_grad, void* y_grad,
                                             int32_t threads) {
  return guarded(__func__, [&] {
    sphere_map_backward(SphereMap::kLog, grad, {{"x", x}, {"y", y}}, 2, {x_grad, y_grad},
                        SphereHost(threads));
  });
}

dlcore_status dlcore_sphere_exp_map_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                             const dlcore_matrix* v, void* x_grad, void* v_grad,
                                             int32_t threads) {
  return guarded(__func__, [&] {
    sphere_map_backward(SphereMap::kExp, grad, {{"x", x}, {"v", v}}, 1, {x_grad, v_grad},
                        SphereHost(threads));
  });
}

dlcore_status dlcore_sphere_rotate_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                            const dlcore_matrix* source, const dlcore_matrix* target,
                                            void* x_grad, void* source_grad, void* target_grad,
                                            int32_t threads) {
  return guarded(__func__, [&] {
    sphere_map_backward(SphereMap::kRotate, grad, {{"x", x}, {"source", source}, {"target", target}}, 2,
                        {x_grad, source_grad, target_grad}, SphereHost(threads));
  });
}
