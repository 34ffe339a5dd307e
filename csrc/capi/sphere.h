// The bodies of the sphere's functions, for the host and for devices.
#pragma once

#include <initializer_list>

#include "../common/sphere.h"
#include "../common/sphere_correct.h"
#include "capi.h"

namespace dlcore::capi {

// A normal number costs about as much as reading eight floats.
constexpr int64_t kSphereNoise = 8;

// An input by its name.
struct Vectors {
  const char* name;
  const dlcore_matrix* matrix;
};

// Another input, of the shape and the dtype of the first.
View alike(const Vectors& input, const View& first);

// Rows of at least so many columns.
View vectors(const Vectors& input, int64_t least);

// A parameter of a map, if it has one.
struct MapNumber {
  const char* name = nullptr;
  dlcore_floats values = {};
};

// Maps of one to three inputs, checked; the number must be finite.
SphereMapArguments map_arguments(SphereMap map, std::initializer_list<Vectors> inputs, int64_t least,
                                 const MapNumber& t, Memory memory);

// The same of a map's gradients; null where one is not wanted. `grad` is a row's vector or, of an angle,
// number.
SphereMapArguments map_backward_arguments(SphereMap map, const dlcore_matrix* grad, const float* grad_angle,
                                          std::initializer_list<Vectors> inputs, int64_t least,
                                          std::initializer_list<void*> outputs, const MapNumber& t,
                                          float* t_grad, Memory memory);

SphereCorrectArguments correct_arguments(const dlcore_matrix* x, const dlcore_matrix* score,
                                         const dlcore_doubles& step_size, const dlcore_keys& key,
                                         Memory memory);

SphereSampleArguments sample_arguments(const dlcore_matrix* mean, const dlcore_doubles& kappa, int32_t law,
                                       const dlcore_keys& key, void* out, Memory memory);

// A place runs arguments of kernels that read so many elements.

template <class Place>
void sphere_map(SphereMap map, std::initializer_list<Vectors> inputs, int64_t least, void* out,
                const Place& place, const MapNumber& t = {}) {
  SphereMapArguments a = map_arguments(map, inputs, least, t, Place::memory);
  const View& x = a.inputs[0];
  needed("out", out, x.rows);
  if (map == SphereMap::kAngle)
    a.number = static_cast<float*>(out);
  else
    a.outputs[0] = result(out, x.dtype, x.rows, x.columns);
  place(a, x.rows * x.columns);
}

template <class Place>
void sphere_map_backward(SphereMap map, const dlcore_matrix* grad, std::initializer_list<Vectors> inputs,
                         int64_t least, std::initializer_list<void*> outputs, const Place& place,
                         const MapNumber& t = {}, float* t_grad = nullptr) {
  const SphereMapArguments a =
      map_backward_arguments(map, grad, nullptr, inputs, least, outputs, t, t_grad, Place::memory);
  place(a, a.inputs[0].rows * a.inputs[0].columns);
}

template <class Place>
void sphere_angle_backward(const float* grad, const dlcore_matrix* x, const dlcore_matrix* y, void* x_grad,
                           void* y_grad, const Place& place) {
  const SphereMapArguments a = map_backward_arguments(SphereMap::kAngle, nullptr, grad, {{"x", x}, {"y", y}},
                                                      1, {x_grad, y_grad}, {}, nullptr, Place::memory);
  place(a, a.inputs[0].rows * a.inputs[0].columns);
}

template <class Place>
void sphere_step(const dlcore_matrix* x, const dlcore_matrix* velocity, const dlcore_floats& delta,
                 int32_t retraction, void* out, const Place& place) {
  one_of("retraction", retraction, 2);
  const SphereMap map = retraction == DLCORE_RETRACT_EXP ? SphereMap::kStep : SphereMap::kRetract;
  sphere_map(map, {{"x", x}, {"velocity", velocity}}, 1, out, place, {"delta", delta});
}

template <class Place>
void sphere_correct(const dlcore_matrix* x, const dlcore_matrix* score, const dlcore_doubles& step_size,
                    const dlcore_keys& key, void* out, const Place& place) {
  SphereCorrectArguments a = correct_arguments(x, score, step_size, key, Place::memory);
  needed("out", out, a.x.rows);
  a.out = result(out, a.x.dtype, a.x.rows, a.x.columns);
  place(a, kSphereNoise * a.x.rows * a.x.columns);
}

template <class Place>
void sphere_sample(const dlcore_matrix* mean, const dlcore_doubles& kappa, int32_t law,
                   const dlcore_keys& key, void* out, const Place& place) {
  const SphereSampleArguments a = sample_arguments(mean, kappa, law, key, out, Place::memory);
  place(a, kSphereNoise * a.mean.rows * a.mean.columns);
}

}  // namespace dlcore::capi
