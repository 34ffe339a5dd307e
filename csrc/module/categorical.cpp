// The bindings of categorical.
#include <algorithm>

#include "module.h"

namespace dlcore {
namespace {

void scan_rows(const py::tuple& logits, int64_t first_token, bool start, const py::tuple& parameters,
               const py::object& target, const py::object& key, Address skip, Address cuts, Address state,
               int threads) {
  ScanArguments a;
  a.logits = view(logits);
  a.first_token = first_token;
  a.start = start;
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

}  // namespace

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
  m.def("finish_summary", [](Address state, int64_t rows, Address tokens, Address numbers) {
    finish_summary(at<Summary>(state), rows, at<int64_t>(tokens), at<double>(numbers));
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
  m.def("finish_logsumexp", [](Address state, int64_t rows, double nothing, Address logsumexp) {
    finish_logsumexp(at<Summary>(state), rows, nothing, at<double>(logsumexp));
  });
  m.def("follow_largest", [](Address state, int64_t rows, bool start, Address references, Address factor) {
    return follow_largest(at<Summary>(state), rows, start, at<double>(references), at<float>(factor));
  });
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

}  // namespace dlcore
