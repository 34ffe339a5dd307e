// The bindings of attention.
#include <optional>

#include "module.h"

namespace dlcore {
namespace {

// (q, k, v, out, lse, (page table, pages) or None, scale, softcap).
void read_attention(const py::tuple& t, AttentionArguments& a) {
  const auto q = t[0].cast<py::tuple>(), k = t[1].cast<py::tuple>(), v = t[2].cast<py::tuple>();
  a.q = heads(q);
  a.k = heads(k);
  a.v = heads(v);
  a.out = heads(t[3].cast<py::tuple>());
  a.lse = at<float>(t[4].cast<Address>());
  const auto q_shape = q[2].cast<std::array<int64_t, 4>>(), k_shape = k[2].cast<std::array<int64_t, 4>>();
  a.batch = q_shape[0], a.rows = q_shape[1], a.heads = q_shape[2], a.head_dim = q_shape[3];
  a.keys = k_shape[1], a.kv_heads = k_shape[2];
  a.value_dim = v[2].cast<std::array<int64_t, 4>>()[3];
  if (!t[5].is_none()) {
    const auto pages = t[5].cast<std::pair<Address, int64_t>>();
    a.pages = {at<const int32_t>(pages.first), pages.second, a.keys};
    a.keys *= pages.second;
  }
  a.scale = t[6].cast<float>();
  a.softcap = t[7].cast<float>();
}

// (starts, stops, shared).
void read_bounds(const py::tuple& t, AttentionArguments& a) {
  a.starts = at<const int32_t>(t[0].cast<Address>());
  a.stops = at<const int32_t>(t[1].cast<Address>());
  a.shared_bounds = t[2].cast<bool>();
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", [](const py::tuple& parameters, const py::tuple& bounds, int threads) {
    AttentionArguments a;
    read_attention(parameters, a);
    read_bounds(bounds, a);
    run(kernels().attention, a, threads);
  });
  m.def("attention_decode",
        [](const py::tuple& parameters, const py::tuple& new_k, const py::tuple& new_v, Address lengths,
           int64_t num_commit, const std::optional<std::pair<Address, bool>>& causal, int64_t window,
           bool window_by_row, int threads) {
          AttentionDecodeArguments a;
          read_attention(parameters, a);
          a.new_k = heads(new_k);
          a.new_v = heads(new_v);
          a.lengths = at<const int32_t>(lengths);
          a.num_commit = num_commit;
          if (causal) a.causal = at<const bool>(causal->first), a.shared_causal = causal->second;
          a.window = window;
          a.window_by_row = window_by_row;
          run(attention_decode, a, threads);
        });
  m.def("attention_backward",
        [](const py::tuple& parameters, const py::tuple& bounds, const py::tuple& grad_out, Address grad_lse,
           const py::tuple& grads, int threads) {
          AttentionBackwardArguments a;
          read_attention(parameters, a);
          read_bounds(bounds, a);
          a.grad_out = heads(grad_out);
          a.grad_lse = at<const float>(grad_lse);
          a.grad_q = heads(grads[0]);
          a.grad_k = heads(grads[1]);
          a.grad_v = heads(grads[2]);
          run(kernels().attention_backward, a, threads);
        });
}

}  // namespace dlcore
