// Maps of the unit sphere, and draws of its laws, on CUDA devices.
#include "../cuda/sphere.h"
#include "cuda.h"
#include "sphere.h"

namespace dlcore::capi {
namespace {

class SphereDevice {
 public:
  static constexpr Memory memory = Memory::kDevice;

  explicit SphereDevice(void* stream) : stream_(stream_of(stream)) {}

  void operator()(const SphereMapArguments& a, int64_t) const { cuda::sphere_map(a, stream_); }
  void operator()(const SphereCorrectArguments& a, int64_t) const { cuda::sphere_correct(a, stream_); }
  void operator()(const SphereSampleArguments& a, int64_t) const { cuda::sphere_sample(a, stream_); }

 private:
  cudaStream_t stream_;
};

void correct_backward(const dlcore_matrix* grad, const dlcore_matrix* x, const dlcore_matrix* score,
                      const dlcore_doubles& step_size, const dlcore_keys& key, void* x_grad, void* score_grad,
                      double* step_grad, cudaStream_t stream) {
  SphereCorrectBackwardArguments a;
  a.forward = correct_arguments(x, score, step_size, key, Memory::kDevice);
  const View& v = a.forward.x;
  if (v.columns > cuda::kMostCorrected)
    refuse(DLCORE_UNSUPPORTED, "x->columns must be at most ", cuda::kMostCorrected, ", got ", v.columns);
  a.grad = alike({"grad", grad}, v);
  needed("x_grad", x_grad, v.rows);
  needed("score_grad", score_grad, v.rows);
  needed("step_grad", step_grad, v.rows);
  a.x_grad = result(x_grad, v.dtype, v.rows, v.columns);
  a.score_grad = result(score_grad, v.dtype, v.rows, v.columns);
  a.step_grad = step_grad;
  cuda::sphere_correct_backward(a, stream);
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore;
using namespace dlcore::capi;

dlcore_status dlcore_cuda_sphere_normalize(const dlcore_matrix* x, void* out, void* stream) {
  return queued(__func__,
                [&] { sphere_map(SphereMap::kNormalize, {{"x", x}}, 1, out, SphereDevice(stream)); });
}

dlcore_status dlcore_cuda_sphere_project(const dlcore_matrix* x, const dlcore_matrix* u, void* out,
                                         void* stream) {
  return queued(__func__,
                [&] { sphere_map(SphereMap::kProject, {{"x", x}, {"u", u}}, 1, out, SphereDevice(stream)); });
}

dlcore_status dlcore_cuda_sphere_angle(const dlcore_matrix* x, const dlcore_matrix* y, float* radians,
                                       void* stream) {
  return queued(__func__, [&] {
    sphere_map(SphereMap::kAngle, {{"x", x}, {"y", y}}, 1, radians, SphereDevice(stream));
  });
}

dlcore_status dlcore_cuda_sphere_slerp(const dlcore_matrix* x, const dlcore_matrix* y, dlcore_floats t,
                                       void* out, void* stream) {
  return queued(__func__, [&] {
    sphere_map(SphereMap::kSlerp, {{"x", x}, {"y", y}}, 2, out, SphereDevice(stream), {"t", t});
  });
}

dlcore_status dlcore_cuda_sphere_log_map(const dlcore_matrix* x, const dlcore_matrix* y, void* out,
                                         void* stream) {
  return queued(__func__,
                [&] { sphere_map(SphereMap::kLog, {{"x", x}, {"y", y}}, 2, out, SphereDevice(stream)); });
}

dlcore_status dlcore_cuda_sphere_exp_map(const dlcore_matrix* x, const dlcore_matrix* v, void* out,
                                         void* stream) {
  return queued(__func__,
                [&] { sphere_map(SphereMap::kExp, {{"x", x}, {"v", v}}, 1, out, SphereDevice(stream)); });
}

dlcore_status dlcore_cuda_sphere_rotate(const dlcore_matrix* x, const dlcore_matrix* source,
                                        const dlcore_matrix* target, void* out, void* stream) {
  return queued(__func__, [&] {
    sphere_map(SphereMap::kRotate, {{"x", x}, {"source", source}, {"target", target}}, 2, out,
               SphereDevice(stream));
  });
}

dlcore_status dlcore_cuda_sphere_step(const dlcore_matrix* x, const dlcore_matrix* velocity,
                                      dlcore_floats delta, int32_t retraction, void* out, void* stream) {
  return queued(__func__, [&] { sphere_step(x, velocity, delta, retraction, out, SphereDevice(stream)); });
}

dlcore_status dlcore_cuda_sphere_correct(const dlcore_matrix* x, const dlcore_matrix* score,
                                         dlcore_doubles step_size, dlcore_keys keys, void* out,
                                         void* stream) {
  return queued(__func__, [&] { sphere_correct(x, score, step_size, keys, out, SphereDevice(stream)); });
}

dlcore_status dlcore_cuda_sphere_sample(const dlcore_matrix* mean, dlcore_doubles kappa, int32_t law,
                                        dlcore_keys keys, void* out, void* stream) {
  return queued(__func__, [&] { sphere_sample(mean, kappa, law, keys, out, SphereDevice(stream)); });
}

dlcore_status dlcore_cuda_sphere_normalize_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                    void* x_grad, void* stream) {
  return queued(__func__, [&] {
    sphere_map_backward(SphereMap::kNormalize, grad, {{"x", x}}, 1, {x_grad}, SphereDevice(stream));
  });
}

dlcore_status dlcore_cuda_sphere_project_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                  const dlcore_matrix* u, void* x_grad, void* u_grad,
                                                  void* stream) {
  return queued(__func__, [&] {
    sphere_map_backward(SphereMap::kProject, grad, {{"x", x}, {"u", u}}, 1, {x_grad, u_grad},
                        SphereDevice(stream));
  });
}

dlcore_status dlcore_cuda_sphere_angle_backward(const float* grad, const dlcore_matrix* x,
                                                const dlcore_matrix* y, void* x_grad, void* y_grad,
                                                void* stream) {
  return queued(__func__, [&] { sphere_angle_backward(grad, x, y, x_grad, y_grad, SphereDevice(stream)); });
}

dlcore_status dlcore_cuda_sphere_slerp_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                const dlcore_matrix* y, dlcore_floats t, void* x_grad,
                                                void* y_grad, float* t_grad, void* stream) {
  return queued(__func__, [&] {
    sphere_map_backward(SphereMap::kSlerp, grad, {{"x", x}, {"y", y}}, 2, {x_grad, y_grad},
                        SphereDevice(stream), {"t", t}, t_grad);
  });
}

dlcore_status dlcore_cuda_sphere_log_map_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                  const dlcore_matrix* y, void* x_grad, void* y_grad,
                                                  void* stream) {
  return queued(__func__, [&] {
    sphere_map_backward(SphereMap::kLog, grad, {{"x", x}, {"y", y}}, 2, {x_grad, y_grad},
                        SphereDevice(stream));
  });
}

dlcore_status dlcore_cuda_sphere_exp_map_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                  const dlcore_matrix* v, void* x_grad, void* v_grad,
                                                  void* stream) {
  return queued(__func__, [&] {
    sphere_map_backward(SphereMap::kExp, grad, {{"x", x}, {"v", v}}, 1, {x_grad, v_grad},
                        SphereDevice(stream));
  });
}

dlcore_status dlcore_cuda_sphere_rotate_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                 const dlcore_matrix* source, const dlcore_matrix* target,
                                                 void* x_grad, void* source_grad, void* target_grad,
                                                 void* stream) {
  return queued(__func__, [&] {
    sphere_map_backward(SphereMap::kRotate, grad, {{"x", x}, {"source", source}, {"target", target}}, 2,
                        {x_grad, source_grad, target_grad}, SphereDevice(stream));
  });
}

dlcore_status dlcore_cuda_sphere_correct_backward(const dlcore_matrix* grad, const dlcore_matrix* x,
                                                  const dlcore_matrix* score, dlcore_doubles step_size,
                                                  dlcore_keys keys, void* x_grad, void* score_grad,
                                                  double* step_grad, void* stream) {
  return queued(__func__, [&] {
    correct_backward(grad, x, score, step_size, keys, x_grad, score_grad, step_grad, stream_of(stream));
  });
}
