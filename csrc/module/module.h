// What the families' bindings share: tensors come as (address, dtype, shape, stride) tuples or as addresses.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "../cpu/kernels.h"

namespace dlcore {

namespace py = pybind11;

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (address, dtype, shape, stride) of a tensor whose last dimension is contiguous.
inline View view(const py::tuple& t) {
  View v;
  v.data = at<char>(t[0].cast<Address>());
  v.dtype = static_cast<DType>(t[1].cast<int>());
  const auto shape = t[2].cast<py::tuple>(), stride = t[3].cast<py::tuple>();
  const size_t dims = shape.size();
  v.columns = shape[dims - 1].cast<int64_t>();
  v.rows = 1;
  for (size_t d = 0; d + 1 < dims; ++d) {
    const auto size = shape[d].cast<int64_t>(), step = stride[d].cast<int64_t>();
    v.rows *= size;
    if (size == 1) continue;
    // Dimensions that lie back to back are one.
    const int last = v.lead_dims - 1;
    if (last >= 0 && v.lead_stride[last] == size * step) {
      v.lead_size[last] *= size;
      v.lead_stride[last] = step;
      continue;
    }
    if (v.lead_dims == kMaxDims) throw py::value_error("dlcore: logits may have at most 8 separate strides");
    v.lead_size[v.lead_dims] = size;
    v.lead_stride[v.lead_dims++] = step;
  }
  return v;
}

// (address, dtype, shape, stride) of a (batch, rows, heads, columns) tensor with contiguous columns.
inline Heads heads(const py::tuple& t) {
  const auto stride = t[3].cast<std::array<int64_t, 4>>();
  return {at<char>(t[0].cast<Address>()), static_cast<DType>(t[1].cast<int>()), stride[0], stride[1],
          stride[2]};
}

// (address, stride), or None.
template <class T>
PerRow<T> per_row(const py::object& o) {
  if (o.is_none()) return {};
  const auto t = o.cast<std::pair<Address, int64_t>>();
  return {at<const T>(t.first), t.second};
}

// (address, per_row), or None.
inline Keys keys(const py::object& o) {
  if (o.is_none()) return {};
  const auto t = o.cast<std::pair<Address, bool>>();
  return {at<const int64_t>(t.first), t.second};
}

// (index, shift, temperature, softcap, exclude).
inline Softmax softmax(const py::tuple& t) {
  Softmax s;
  s.index = per_row<int64_t>(t[0]);
  s.shift = per_row<float>(t[1]);
  s.temperature = per_row<float>(t[2]);
  s.softcap = t[3].is_none() ? 0 : t[3].cast<float>();
  s.exclude = t[4].is_none() ? -1 : t[4].cast<int64_t>();
  return s;
}

// (vocab, z, coefficients, prior, exclude, temperature, key).
inline MixtureArguments mixture(const py::tuple& t, int64_t rows) {
  MixtureArguments a;
  a.rows = rows;
  a.vocab = t[0].cast<int64_t>();
  a.z = at<const int64_t>(t[1].cast<Address>());
  a.coefficients = per_row<double>(t[2]);
  a.prior = t[3].cast<int64_t>();
  a.exclude = t[4].is_none() ? -1 : t[4].cast<int64_t>();
  a.temperature = per_row<float>(t[5]);
  a.keys = keys(t[6]);
  return a;
}

// Runs a kernel without the GIL.
template <class Arguments>
void run(void (*kernel)(const Arguments&), Arguments arguments, int threads) {
  arguments.threads = threads;
  py::gil_scoped_release release;
  kernel(arguments);
}

void bind_attention(py::module_& m);
void bind_bits(py::module_& m);
void bind_categorical(py::module_& m);
void bind_guidance(py::module_& m);
void bind_linear_logits(py::module_& m);
void bind_rng(py::module_& m);
void bind_similarity(py::module_& m);
void bind_sphere(py::module_& m);
void bind_sphere_dynamics(py::module_& m);
void bind_sphere_velocity(py::module_& m);
void bind_uniform(py::module_& m);

}  // namespace dlcore
