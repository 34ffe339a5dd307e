// dlcore._C: the CPU kernels for Python. Tensors come as (address, dtype, shape, stride) tuples or as
// addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/rng.h"

namespace py = pybind11;
using namespace dlcore;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (address, dtype, shape, stride) of a tensor whose last dimension is contiguous.
View view(const py::tuple& t) {
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

// (address, stride), or None.
template <class T>
PerRow<T> per_row(const py::object& o) {
  if (o.is_none()) return {};
  const auto t = o.cast<std::pair<Address, int64_t>>();
  return {at<const T>(t.first), t.second};
}

// (address, per_row), or None.
Keys keys(const py::object& o) {
  if (o.is_none()) return {};
  const auto t = o.cast<std::pair<Address, bool>>();
  return {at<const int64_t>(t.first), t.second};
}

// (index, shift, temperature, softcap, exclude).
Softmax softmax(const py::tuple& t) {
  Softmax s;
  s.index = per_row<int64_t>(t[0]);
  s.shift = per_row<float>(t[1]);
  s.temperature = per_row<float>(t[2]);
  s.softcap = t[3].is_none() ? 0 : t[3].cast<float>();
  s.exclude = t[4].is_none() ? -1 : t[4].cast<int64_t>();
  return s;
}

// (vocab, z, coefficients, prior, exclude, temperature, key).
MixtureArguments mixture(const py::tuple& t, int64_t rows) {
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

// (address, dtype, shape, stride) of a (batch, rows, heads, columns) tensor with contiguous columns.
Heads heads(const py::tuple& t) {
  const auto stride = t[3].cast<std::array<int64_t, 4>>();
  return {at<char>(t[0].cast<Address>()), static_cast<DType>(t[1].cast<int>()), stride[0], stride[1],
          stride[2]};
}

// (q, k, v, out, lse, (starts, shared), stops, (page table, pages) or None, scale, softcap).
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
  const auto starts = t[5].cast<std::pair<Address, bool>>();
  a.starts = at<const int32_t>(starts.first);
  a.shared_bounds = starts.second;
  a.stops = at<const int32_t>(t[6].cast<Address>());
  if (!t[7].is_none()) {
    const auto pages = t[7].cast<std::pair<Address, int64_t>>();
    a.pages = {at<const int32_t>(pages.first), pages.second, a.keys};
    a.keys *= pages.second;
  }
  a.scale = t[8].cast<float>();
  a.softcap = t[9].cast<float>();
}

// Runs a kernel without the GIL.
template <class Arguments>
void run(void (*kernel)(const Arguments&), Arguments arguments, int threads) {
  arguments.threads = threads;
  py::gil_scoped_release release;
  kernel(arguments);
}

void scan_rows(const py::tuple& logits, int64_t first_token, const py::tuple& parameters,
               const py::object& target, const py::object& key, Address skip, Address cuts, Address state,
               int threads) {
  ScanArguments a;
  a.logits = view(logits);
  a.first_token = first_token;
  a.softmax = softmax(parameters);
  a.target = per_row<int64_t>(target);
  a.keys = keys(key);
  a.skip = at<const uint8_t>(skip);
  a.cuts = at<Cut>(cuts);
  a.state = at<Summary>(state);
  run(kernels().scan, a, threads);
}

void softmax_rows(const py::tuple& logits, int64_t first_token, const py::tuple& parameters,
                  Address logsumexp, const py::tuple& out, int threads) {
  SoftmaxTileArguments a;
  a.logits = view(logits);
  a.first_token = first_token;
  a.softmax = softmax(parameters);
  a.logsumexp = at<const double>(logsumexp);
  a.out = view(out);
  run(kernels().softmax_tile, a, threads);
}

void count_digits(const py::tuple& logits, int64_t first_token, int64_t vocab, const py::tuple& parameters,
                  Address state, Address selections, int level, Address bins, int threads) {
  HistogramArguments a;
  a.logits = view(logits);
  a.first_token = first_token;
  a.vocab = vocab;
  a.softmax = softmax(parameters);
  a.state = at<const Summary>(state);
  a.selections = at<const Selection>(selections);
  a.level = level;
  a.bins = at<Bin>(bins);
  run(kernels().histogram, a, threads);
}

void log_probs_gradient(const py::tuple& logits, int64_t first_token, const py::tuple& parameters,
                        const py::object& target, Address grad, Address numbers, const py::tuple& out,
                        int threads) {
  LogProbsBackwardArguments a;
  a.logits = view(logits);
  a.first_token = first_token;
  a.softmax = softmax(parameters);
  a.target = per_row<int64_t>(target);
  a.grad = at<const double>(grad);
  a.numbers = at<const double>(numbers);
  a.out = view(out);
  run(kernels().log_probs_backward, a, threads);
}

void scan_kl(const py::tuple& p, const py::tuple& q, const py::object& temperature, Address state,
             int threads) {
  KLArguments a;
  a.p = view(p);
  a.q = view(q);
  a.temperature = per_row<float>(temperature);
  a.state = at<KLSummary>(state);
  run(kernels().kl, a, threads);
}

void kl_gradient(const py::tuple& p, const py::tuple& q, const py::object& temperature, Address grad,
                 Address numbers, const py::tuple& p_out, const py::tuple& q_out, int threads) {
  KLBackwardArguments a;
  a.p = view(p);
  a.q = view(q);
  a.temperature = per_row<float>(temperature);
  a.grad = at<const double>(grad);
  a.numbers = at<const double>(numbers);
  a.p_out = view(p_out);
  a.q_out = view(q_out);
  run(kernels().kl_backward, a, threads);
}

void sum_nelbo(const py::tuple& logits, int64_t first_token, int64_t vocab, const py::tuple& parameters,
               const py::object& alpha, const py::object& target, Address saved, int threads) {
  NelboArguments a;
  a.scan = !target.is_none();
  a.target = per_row<int64_t>(target);
  a.logits = view(logits);
  a.first_token = first_token;
  a.vocab = vocab;
  a.softmax = softmax(parameters);
  a.alpha = per_row<double>(alpha);
  a.saved = at<double>(saved);
  run(kernels().nelbo, a, threads);
}

void nelbo_gradient(const py::tuple& logits, int64_t first_token, int64_t vocab, const py::tuple& parameters,
                    Address z, Address x, const py::object& alpha, const py::object& dalpha, Address grad,
                    Address saved, const py::tuple& out, int threads) {
  NelboBackwardArguments a;
  a.logits = view(logits);
  a.first_token = first_token;
  a.vocab = vocab;
  a.softmax = softmax(parameters);
  a.z = at<const int64_t>(z);
  a.x = at<const int64_t>(x);
  a.alpha = per_row<double>(alpha);
  a.dalpha = per_row<double>(dalpha);
  a.grad = at<const float>(grad);
  a.saved = at<const double>(saved);
  a.out = view(out);
  run(kernels().nelbo_backward, a, threads);
}

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

void bind_categorical(py::module_& m) {
  m.attr("SUMMARY_BYTES") = sizeof(Summary);
  m.attr("KL_SUMMARY_BYTES") = sizeof(KLSummary);
  m.attr("SELECTION_BYTES") = sizeof(Selection);
  m.attr("CUT_BYTES") = sizeof(Cut);
  m.attr("BINS_BYTES") = sizeof(Bin) * kBins;
  m.attr("LEVELS") = kLevels;

  m.def("clear_kl",
        [](Address state, int64_t rows) { std::fill_n(at<KLSummary>(state), rows, KLSummary{}); });
  m.def("scan", scan_rows);
  m.def("finish_stats", [](Address state, int64_t rows, Address argmax, Address numbers) {
    finish_stats(at<Summary>(state), rows, at<int64_t>(argmax), at<float>(numbers));
  });
  m.def("finish_sample", [](Address state, Address drawn, int64_t rows, Address tokens, Address numbers) {
    finish_sample(at<Summary>(state), at<Summary>(drawn), rows, at<int64_t>(tokens), at<float>(numbers));
  });
  m.def("plan_mixture", [](const py::tuple& arguments, int64_t rows, Address skip) {
    plan_mixture(mixture(arguments, rows), at<uint8_t>(skip));
  });
  m.def("finish_mixture", [](const py::tuple& arguments, int64_t rows, Address state, Address skip,
                             Address tokens) {
    finish_mixture(mixture(arguments, rows), at<Summary>(state), at<uint8_t>(skip), at<int64_t>(tokens));
  });
  m.def("histogram", count_digits);
  m.def("start_selections", [](Address state, int64_t rows, const py::object& top_k, const py::object& top_p,
                               Address within, Address selections) {
    start_selections(at<Summary>(state), rows, per_row<int64_t>(top_k), per_row<float>(top_p),
                     at<Selection>(within), at<Selection>(selections));
  });
  m.def("narrow", [](Address bins, int64_t rows, int level, Address selections) {
    narrow(at<Bin>(bins), rows, level, at<Selection>(selections));
  });
  m.def("finish_selections", [](Address state, int64_t rows, const py::object& min_p,
                                const py::object& temperature, Address selections, Address cuts) {
    finish_selections(at<Summary>(state), rows, per_row<float>(min_p), per_row<float>(temperature),
                      at<Selection>(selections), at<Cut>(cuts));
  });
  m.def("finish_logsumexp", [](Address state, int64_t rows, Address logsumexp) {
    finish_logsumexp(at<Summary>(state), rows, at<double>(logsumexp));
  });
  m.def("follow_largest", [](Address state, int64_t rows, bool start, Address references, Address factor) {
    return follow_largest(at<Summary>(state), rows, start, at<double>(references), at<float>(factor));
  });
  m.def("matmul", multiply);
  m.def("softmax_tile", softmax_rows);
  m.def("finish_log_probs", [](Address state, const py::object& target, bool with_index, int64_t rows,
                               Address numbers) {
    finish_log_probs(at<Summary>(state), per_row<int64_t>(target), with_index, rows, at<double>(numbers));
  });
  m.def("log_probs_backward", log_probs_gradient);
  m.def("kl", scan_kl);
  m.def("finish_kl", [](Address state, int64_t rows, Address numbers) {
    finish_kl(at<KLSummary>(state), rows, at<double>(numbers));
  });
  m.def("kl_backward", kl_gradient);
}

void bind_uniform(py::module_& m) {
  m.def("start_nelbo", [](Address state, int64_t rows, Address saved) {
    for (int64_t r = 0; r < rows; ++r) start_nelbo(at<Summary>(state)[r], r, rows, at<double>(saved));
  });
  m.def("nelbo", sum_nelbo);
  m.def("finish_nelbo", [](Address saved, int64_t rows, int64_t vocab, Address z, Address x,
                           const py::object& alpha, const py::object& dalpha, Address loss) {
    finish_nelbo(at<double>(saved), rows, vocab, at<int64_t>(z), at<int64_t>(x), per_row<double>(alpha),
                 per_row<double>(dalpha), at<float>(loss));
  });
  m.def("nelbo_backward", nelbo_gradient);
}

void bind_rng(py::module_& m) {
  m.def("fill_noise",
        [](int noise, Address keys, int64_t key_count, int64_t count, bool wide, Address out, int threads) {
          py::gil_scoped_release release;
          const auto kind = static_cast<Noise>(noise);
          if (wide)
            fill_noise(kind, at<int64_t>(keys), key_count, count, at<double>(out), threads);
          else
            fill_noise(kind, at<int64_t>(keys), key_count, count, at<float>(out), threads);
        });
  m.def("fold_in",
        [](Address keys, int64_t key_stride, Address data, int64_t data_stride, int64_t count, Address out) {
          fold_in_all(at<int64_t>(keys), key_stride, at<int64_t>(data), data_stride, count, at<int64_t>(out));
        });
  m.def("philox", [](std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
    const Block b = philox({{c[0], c[1], c[2], c[3]}}, k[0], k[1]);
    return std::array<uint32_t, 4>{b.word[0], b.word[1], b.word[2], b.word[3]};
  });
  m.def("gumbel_of_bits", [](const std::vector<uint32_t>& high, const std::vector<uint32_t>& low) {
    if (high.size() != low.size() || high.size() % 16 != 0)
      throw py::value_error("gumbel_of_bits: as many high words as low ones, a multiple of 16");
    std::vector<float> out(high.size());
    kernels().gumbel(high.data(), low.data(), static_cast<int64_t>(high.size()), out.data());
    return out;
  });
}

void bind_attention(py::module_& m) {
  m.def("attention", [](const py::tuple& parameters, int threads) {
    AttentionArguments a;
    read_attention(parameters, a);
    run(kernels().attention, a, threads);
  });
  m.def("attention_backward", [](const py::tuple& parameters, const py::tuple& grad_out, Address grad_lse,
                                 const py::tuple& grads, int threads) {
    AttentionBackwardArguments a;
    read_attention(parameters, a);
    a.grad_out = heads(grad_out);
    a.grad_lse = at<const float>(grad_lse);
    a.grad_q = heads(grads[0]);
    a.grad_k = heads(grads[1]);
    a.grad_v = heads(grads[2]);
    run(kernels().attention_backward, a, threads);
  });
}

// Reads memory as fast as the machine allows: the ceiling that benchmarks compare with.
float read_floats(Address data, int64_t count, int threads) {
  py::gil_scoped_release release;
  return kernels().read(at<const float>(data), count, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "dlcore's CPU kernels.";
  bind_attention(m);
  bind_categorical(m);
  bind_uniform(m);
  bind_rng(m);
  m.def("read", read_floats);
  m.def("capability", [] { return std::string(kernels().name); });
  m.def("choose_capability", [](const std::string& name) { return choose_kernels(name.c_str()); });
  m.def("parallel_runtime", [] { return std::string(parallel_runtime()); });
}
