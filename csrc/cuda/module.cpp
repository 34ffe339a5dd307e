// dlcore._cuda: the CUDA kernels for Python. Tensors come as in csrc/module, the stream as its address.
#include "module.h"

#include "launch.h"

#ifndef DLCORE_CUDA_DEVICE
#define DLCORE_CUDA_DEVICE "cuda"
#endif

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "dlcore's CUDA kernels.";
  // What kind of torch device the pointers are of: tests build this module for the host.
  m.attr("DEVICE") = DLCORE_CUDA_DEVICE;
  dlcore::py::register_exception<dlcore::cuda::Error>(m, "Error", PyExc_RuntimeError);
  dlcore::cuda::bind_bits(m);
  dlcore::cuda::bind_categorical(m);
  dlcore::cuda::bind_guidance(m);
  dlcore::cuda::bind_rng(m);
  dlcore::cuda::bind_sphere(m);
  dlcore::cuda::bind_uniform(m);
}
