// dlcore._C: the CPU kernels for Python, bound family by family in csrc/module.
#include "module/module.h"

#include <string>

#include "cpu/parallel.h"

using namespace dlcore;

namespace {

// Reads memory as fast as the machine allows: the ceiling that benchmarks compare with.
float read_floats(Address data, int64_t count, int threads) {
  py::gil_scoped_release release;
  return kernels().read(at<const float>(data), count, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "dlcore's CPU kernels.";
  bind_attention(m);
  bind_bits(m);
  bind_categorical(m);
  bind_guidance(m);
  bind_linear_logits(m);
  bind_rng(m);
  bind_similarity(m);
  bind_sphere(m);
  bind_sphere_dynamics(m);
  bind_sphere_velocity(m);
  bind_uniform(m);
  m.def("read", read_floats);
  m.def("capability", [] { return std::string(kernels().name); });
  m.def("choose_capability", [](const std::string& name) { return choose_kernels(name.c_str()); });
  m.def("parallel_runtime", [] { return std::string(parallel_runtime()); });
}
