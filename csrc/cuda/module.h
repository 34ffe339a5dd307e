// What the bindings of the CUDA families share.
#pragma once

#include <cuda_runtime.h>

#include "../module/module.h"

namespace dlcore::cuda {

inline cudaStream_t stream_at(Address address) { return at<CUstream_st>(address); }

void bind_bits(py::module_& m);
void bind_categorical(py::module_& m);
void bind_guidance(py::module_& m);
void bind_rng(py::module_& m);
void bind_sphere(py::module_& m);
void bind_uniform(py::module_& m);

}  // namespace dlcore::cuda
