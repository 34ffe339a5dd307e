// Maps of the unit sphere, and draws of its laws.
#include "capi.h"

namespace dlcore::capi {
namespace {

// A normal number costs about as much as reading eight floats.
constexpr int64_t kNoise = 8;

void dimension(const char* name, const View& v, int64_t least) {
  if (v.columns < least)
    refuse(DLCORE_INVALID_SHAPE, name, "->columns must be at least ", least, ", got ", v.columns);
}

struct Input {
  const char* name;
  const dlcore_matrix* matrix;
};

// Another input, of the shape and the dtype of the first.
View alike(const Input& input, const View& first) {
  const View v = view_like(input.name, input.matrix, first);
  if (v.dtype != first.dtype)
    refuse(DLCORE_INVALID_DTYPE, input.name, "->dtype must be that of the first argument, ",
           static_cast<int>(first.dtype), ", got ", static_cast<int>(v.dtype));
  return v;
}

// A map of one to three inputs, of `least` columns or more; `t` must be finite where it is wanted.
void map(SphereMap map, std::initializer_list<Input> inputs, int64_t least, void* out, int32_t threads,
         const char* t_name = nullptr, const dlcore_floats& t = {}) {
  SphereMapArguments a;
  a.map = map;
  const View x = a.inputs[0] = view(inputs.begin()->name, inputs.begin()->matrix);
  dimension(inputs.begin()->name, x, least);
  for (size_t i = 1; i < inputs.size(); ++i) a.inputs[i] = alike(inputs.begin()[i], x);
  if (t_name) a.t = needed_per_row(t_name, t, x.rows, -kLargest, kLargest);
  needed("out", out, x.rows);
  if (map == SphereMap::kAngle)
    a.number = static_cast<float*>(out);
  else
    a.outputs[0] = result(out, x.dtype, x.rows, x.columns);
  a.threads = threads_for(threads, x.rows * x.columns);
  kernels().sphere_map(a);
}

void correct(const dlcore_matrix* x, const dlcore_matrix* score, const dlcore_doubles& step_size,
             const dlcore_keys& key, void* out, int32_t threads) {
  SphereCorrectArguments a;
  a.x = view("x", x);
  dimension("x", a.x, 2);
  a.score = alike({"score", score}, a.x);
  a.step_size = needed_per_row("step_size", step_size, a.x.rows, 0, kInfinity);
  a.keys = keys(key, a.x.rows);
  needed("out", out, a.x.rows);
  a.out = result(out, a.x.dtype, a.x.rows, a.x.columns);
  a.threads = threads_for(threads, kNoise * a.x.rows * a.x.columns);
  kernels().sphere_correct(a);
}

void sample(const dlcore_matrix* mean, const dlcore_doubles& kappa, int32_t law, const dlcore_keys& key,
            void* out, int32_t threads) {
  SphereSampleArguments a;
  a.mean = view("mean", mean);
  dimension("mean", a.mean, 2);
  a.kappa = needed_per_row("kappa", kappa, a.mean.rows, 0, kLargest);
  one_of("law", law, 2);
  a.reject = law == DLCORE_VON_MISES_FISHER;
  a.keys = keys(key, a.mean.rows);
  needed("out", out, a.mean.rows);
  a.out = result(out, a.mean.dtype, a.mean.rows, a.mean.columns);
  a.threads = threads_for(threads, kNoise * a.mean.rows * a.mean.columns);
  kernels().sphere_sample(a);
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore;

dlcore_status dlcore_sphere_normalize(const dlcore_matrix* x, void* out, int32_t threads) {
  return capi::guarded(__func__, [&] { capi::map(SphereMap::kNormalize, {{"x", x}}, 1, out, threads); });
}

dlcore_status dlcore_sphere_project(const dlcore_matrix* x, const dlcore_matrix* u, void* out,
                                    int32_t threads) {
  return capi::guarded(__func__,
                       [&] { capi::map(SphereMap::kProject, {{"x", x}, {"u", u}}, 1, out, threads); });
}

dlcore_status dlcore_sphere_angle(const dlcore_matrix* x, const dlcore_matrix* y, float* radians,
                                  int32_t threads) {
  return capi::guarded(__func__,
                       [&] { capi::map(SphereMap::kAngle, {{"x", x}, {"y", y}}, 1, radians, threads); });
}

dlcore_status dlcore_sphere_slerp(const dlcore_matrix* x, const dlcore_matrix* y, dlcore_floats t, void* out,
                                  int32_t threads) {
  return capi::guarded(__func__,
                       [&] { capi::map(SphereMap::kSlerp, {{"x", x}, {"y", y}}, 2, out, threads, "t", t); });
}

dlcore_status dlcore_sphere_log_map(const dlcore_matrix* x, const dlcore_matrix* y, void* out,
                                    int32_t threads) {
  return capi::guarded(__func__, [&] { capi::map(SphereMap::kLog, {{"x", x}, {"y", y}}, 2, out, threads); });
}

dlcore_status dlcore_sphere_exp_map(const dlcore_matrix* x, const dlcore_matrix* v, void* out,
                                    int32_t threads) {
  return capi::guarded(__func__, [&] { capi::map(SphereMap::kExp, {{"x", x}, {"v", v}}, 1, out, threads); });
}

dlcore_status dlcore_sphere_rotate(const dlcore_matrix* x, const dlcore_matrix* source,
                                   const dlcore_matrix* target, void* out, int32_t threads) {
  return capi::guarded(__func__, [&] {
    capi::map(SphereMap::kRotate, {{"x", x}, {"source", source}, {"target", target}}, 2, out, threads);
  });
}

dlcore_status dlcore_sphere_step(const dlcore_matrix* x, const dlcore_matrix* velocity, dlcore_floats delta,
                                 int32_t retraction, void* out, int32_t threads) {
  return capi::guarded(__func__, [&] {
    capi::one_of("retraction", retraction, 2);
    const SphereMap map = retraction == DLCORE_RETRACT_EXP ? SphereMap::kStep : SphereMap::kRetract;
    capi::map(map, {{"x", x}, {"velocity", velocity}}, 1, out, threads, "delta", delta);
  });
}

dlcore_status dlcore_sphere_correct(const dlcore_matrix* x, const dlcore_matrix* score,
                                    dlcore_doubles step_size, dlcore_keys keys, void* out, int32_t threads) {
  return capi::guarded(__func__, [&] { capi::correct(x, score, step_size, keys, out, threads); });
}

dlcore_status dlcore_sphere_sample(const dlcore_matrix* mean, dlcore_doubles kappa, int32_t law,
                                   dlcore_keys keys, void* out, int32_t threads) {
  return capi::guarded(__func__, [&] { capi::sample(mean, kappa, law, keys, out, threads); });
}
