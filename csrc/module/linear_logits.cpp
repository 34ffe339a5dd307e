// The bindings of linear heads.
#include "module.h"

namespace dlcore {
namespace {

// (address, dtype, shape, stride) each; one of a matrix's strides is 1.
void multiply(const py::tuple& a, const py::tuple& b, Address bias, const py::tuple& out, bool add,
              const py::object& softcap, int threads) {
  using Pair = std::array<int64_t, 2>;
  const auto a_shape = a[2].cast<Pair>(), a_stride = a[3].cast<Pair>(), b_stride = b[3].cast<Pair>();
  MatmulArguments m;
  m.a = at<const float>(a[0].cast<Address>());
  m.a_by_column = a_stride[1] != 1;
  m.a_stride = a_stride[m.a_by_column ? 1 : 0];
  m.b = at<const char>(b[0].cast<Address>());
  m.b_dtype = static_cast<DType>(b[1].cast<int>());
  m.b_by_column = b_stride[1] != 1;
  m.b_stride = b_stride[m.b_by_column ? 1 : 0];
  m.bias = at<const float>(bias);
  m.out = at<float>(out[0].cast<Address>());
  m.out_stride = out[3].cast<Pair>()[0];
  m.rows = a_shape[0], m.depth = a_shape[1], m.columns = b[2].cast<Pair>()[1];
  m.add = add;
  m.softcap = softcap.is_none() ? 0 : softcap.cast<float>();
  run(kernels().matmul, m, threads);
}

}  // namespace

void bind_linear_logits(py::module_& m) { m.def("matmul", multiply); }

}  // namespace dlcore
