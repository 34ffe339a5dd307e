// The bindings of categorical.
#include "categorical.h"
#include "module.h"

namespace dlcore::cuda {
void bind_categorical(py::module_& m) {
  m.attr("SUMMARY_BYTES") = sizeof(Summary);
  m.def("scan_bytes", scan_bytes);
  m.def("scan", [](const py::tuple& logits, int64_t first_token, bool start, const py::tuple& parameters,
                   const py::object& target, const py::object& key, Address skip, Address cuts, Address ends,
                   Address state, Address workspace, Address stream) {
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
    scan(a, at<const int64_t>(ends), at<void>(workspace), stream_at(stream));
  });
  m.attr("SELECTION_BYTES") = sizeof(Selection);
  m.attr("CUT_BYTES") = sizeof(Cut);
  m.attr("BINS_BYTES") = sizeof(Bin) * kBins;
  m.attr("LEVELS") = kLevels;
  m.def("start_selections", [](Address state, int64_t rows, const py::object& top_k, const py::object& top_p,
                               Address within, Address selections, Address stream) {
    start_selections(at<Summary>(state), rows, per_row<int64_t>(top_k), per_row<float>(top_p),
                     at<Selection>(within), at<Selection>(selections), stream_at(stream));
  });
  m.def("histogram",
        [](const py::tuple& logits, int64_t first_token, int64_t vocab, const py::tuple& parameters,
           Address state, Address selections, int level, Address bins, Address stream) {
          HistogramArguments a;
          a.logits = view(logits);
          a.first_token = first_token;
          a.vocab = vocab;
          a.softmax = softmax(parameters);
          a.state = at<const Summary>(state);
          a.selections = at<const Selection>(selections);
          a.level = level;
          a.bins = at<Bin>(bins);
          histogram(a, stream_at(stream));
        });
  m.def(
      "narrow", [](Address bins, Address state, int64_t rows, int level, Address selections, Address stream) {
        narrow(at<Bin>(bins), at<Summary>(state), rows, level, at<Selection>(selections), stream_at(stream));
      });
  m.def("finish_selections",
        [](Address state, int64_t rows, const py::object& min_p, const py::object& temperature,
           Address selections, Address cuts, Address stream) {
          finish_selections(at<Summary>(state), rows, per_row<float>(min_p), per_row<float>(temperature),
                            at<Selection>(selections), at<Cut>(cuts), stream_at(stream));
        });
  m.def("find_ends", [](const py::tuple& logits, int64_t first_token, const py::tuple& parameters,
                        Address cuts, Address ends, Address stream) {
    EndsArguments a;
    a.logits = view(logits);
    a.first_token = first_token;
    a.softmax = softmax(parameters);
    a.cuts = at<Cut>(cuts);
    a.ends = at<int64_t>(ends);
    find_ends(a, stream_at(stream));
  });
  m.def("cut_rows",
        [](const py::tuple& logits, const py::tuple& parameters, Address state, const py::object& top_k,
           const py::object& top_p, const py::object& min_p, Address cuts, Address ends, Address stream) {
          CutArguments a;
          a.logits = view(logits);
          a.softmax = softmax(parameters);
          a.state = at<const Summary>(state);
          a.top_k = per_row<int64_t>(top_k);
          a.top_p = per_row<float>(top_p);
          a.min_p = per_row<float>(min_p);
          a.cuts = at<Cut>(cuts);
          a.ends = at<int64_t>(ends);
          cut_rows(a, stream_at(stream));
        });
  m.def("finish_stats", [](Address state, int64_t rows, Address argmax, Address numbers, Address stream) {
    finish_stats(at<Summary>(state), rows, at<int64_t>(argmax), at<float>(numbers), stream_at(stream));
  });
  m.def("finish_sample",
        [](Address state, Address drawn, int64_t rows, Address tokens, Address numbers, Address stream) {
          finish_sample(at<Summary>(state), at<Summary>(drawn), rows, at<int64_t>(tokens), at<float>(numbers),
                        stream_at(stream));
        });
  m.def("finish_summary", [](Address state, int64_t rows, Address tokens, Address numbers, Address stream) {
    finish_summary(at<Summary>(state), rows, at<int64_t>(tokens), at<double>(numbers), stream_at(stream));
  });
  m.def("finish_log_probs", [](Address state, const py::object& target, bool with_index, int64_t rows,
                               Address numbers, Address stream) {
    finish_log_probs(at<Summary>(state), per_row<int64_t>(target), with_index, rows, at<double>(numbers),
                     stream_at(stream));
  });
  m.def("plan_mixture", [](const py::tuple& arguments, int64_t rows, Address skip, Address stream) {
    plan_mixture(mixture(arguments, rows), at<uint8_t>(skip), stream_at(stream));
  });
  m.def("finish_mixture", [](const py::tuple& arguments, int64_t rows, Address state, Address skip,
                             Address tokens, Address stream) {
    finish_mixture(mixture(arguments, rows), at<Summary>(state), at<const uint8_t>(skip), at<int64_t>(tokens),
                   stream_at(stream));
  });
  m.def("log_probs_backward",
        [](const py::tuple& logits, int64_t first_token, const py::tuple& parameters, Address target,
           Address grad, Address numbers, const py::tuple& out, Address stream) {
          LogProbsBackwardArguments a;
          a.logits = view(logits);
          a.first_token = first_token;
          a.softmax = softmax(parameters);
          a.target = {at<const int64_t>(target), 1};
          a.grad = at<const double>(grad);
          a.numbers = at<const double>(numbers);
          a.out = view(out);
          log_probs_backward(a, stream_at(stream));
        });
  m.attr("KL_SUMMARY_BYTES") = sizeof(KLSummary);
  m.def("kl_bytes", kl_bytes);
  m.def("kl", [](const py::tuple& p, const py::tuple& q, const py::object& temperature, bool start,
                 Address state, Address workspace, Address stream) {
    KLArguments a;
    a.p = view(p);
    a.q = view(q);
    a.temperature = per_row<float>(temperature);
    a.state = at<KLSummary>(state);
    kl(a, start, at<void>(workspace), stream_at(stream));
  });
  m.def("finish_kl", [](Address state, int64_t rows, Address numbers, Address stream) {
    finish_kl(at<KLSummary>(state), rows, at<double>(numbers), stream_at(stream));
  });
  m.def("kl_backward", [](const py::tuple& p, const py::tuple& q, const py::object& temperature, Address grad,
                          Address numbers, const py::tuple& p_out, const py::tuple& q_out, Address stream) {
    KLBackwardArguments a;
    a.p = view(p);
    a.q = view(q);
    a.temperature = per_row<float>(temperature);
    a.grad = at<const double>(grad);
    a.numbers = at<const double>(numbers);
    a.p_out = view(p_out);
    a.q_out = view(q_out);
    kl_backward(a, stream_at(stream));
  });
}

}  // namespace dlcore::cuda
