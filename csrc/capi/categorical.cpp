// Statistics and draws of softmax.
#include "categorical.h"

#include <algorithm>
#include <cmath>

namespace dlcore::capi {
namespace {

// One optional id; -1: none.
int64_t optional_id(const char* name, const int64_t* id, int64_t vocab) {
  token_ids(name, id, 1, vocab);
  return id ? *id : -1;
}

// Per row the last entry that a truncated draw keeps, by a radix search over the logits' ordered bits.
std::vector<Selection> select(const Rows& a, const Summaries& state, PerRow<int64_t> top_k,
                              PerRow<float> top_p, const Selection* within) {
  const int64_t rows = a.rows();
  std::vector<Selection> selections(static_cast<size_t>(rows));
  start_selections(state.data(), rows, top_k, top_p, within, selections.data());
  for (int level = 0; level < kLevels; ++level) {
    std::vector<Bin> bins(static_cast<size_t>(rows * kBins));
    HistogramArguments h;
    h.vocab = a.logits.vocab();
    h.softmax = a.softmax_tiles;
    h.state = state.data();
    h.selections = selections.data();
    h.level = level;
    h.bins = bins.data();
    a.logits.tiles(a.softcap, [&](int64_t first, const View& tile) {
      h.logits = tile;
      h.first_token = first;
      h.threads = a.logits.threads(rows * tile.columns);
      kernels().histogram(h);
    });
    narrow(bins.data(), rows, level, selections.data());
  }
  return selections;
}

// top_p counts within what top_k keeps.
std::vector<Cut> cuts_of(const Rows& a, const Summaries& state, PerRow<int64_t> top_k, PerRow<float> top_p,
                         PerRow<float> min_p) {
  std::vector<Selection> selections;
  if (top_k) selections = select(a, state, top_k, {}, nullptr);
  if (top_p) selections = select(a, state, top_k, top_p, selections.empty() ? nullptr : selections.data());
  std::vector<Cut> cuts(static_cast<size_t>(a.rows()));
  finish_selections(state.data(), a.rows(), min_p, a.softmax.temperature,
                    selections.empty() ? nullptr : selections.data(), cuts.data());
  return cuts;
}

// Results that may not be wanted: the caller's, or room of its own.
template <class T>
class Optional {
 public:
  Optional(T* wanted, int64_t count)
      : own_(wanted ? nullptr : room<T>(count)), data_(wanted ? wanted : own_.get()) {}
  T* data() const { return data_; }

 private:
  std::unique_ptr<T[]> own_;
  T* data_;
};

void sample(const Rows& a, const dlcore_sampling& how, int64_t* tokens, int64_t* argmax, float* numbers) {
  const int64_t rows = a.rows();
  const auto top_k = per_row("top_k", how.top_k, rows, 1, 0x1p63);
  const auto top_p = per_row("top_p", how.top_p, rows, 0, 1);
  const auto min_p = per_row("min_p", how.min_p, rows, 0, 1);
  ScanArguments draw;
  draw.keys = keys(how.keys, rows);
  needed("tokens", tokens, rows);
  Summaries state(static_cast<size_t>(rows)), drawn;
  draw.state = state.data();
  std::vector<Cut> cuts;
  if (top_k || top_p || min_p) {
    ScanArguments whole;
    whole.state = state.data();
    a.scan(whole);
    cuts = cuts_of(a, state, top_k, top_p, min_p);
    draw.cuts = cuts.data();
    drawn.resize(state.size());
    draw.state = drawn.data();
  }
  a.scan(draw);
  write_draw(state.data(), draw.state, rows, tokens, argmax, numbers);
}

void sample_mixture(const Rows& a, const dlcore_mixture& how, int64_t* tokens) {
  const int64_t rows = a.rows();
  const MixtureArguments m = mixture_of(how, a.softmax, rows, a.logits.vocab(), Memory::kHost);
  needed("tokens", tokens, rows);
  const auto skip = room<uint8_t>(rows);
  plan_mixture(m, skip.get());
  Summaries state(static_cast<size_t>(rows));
  ScanArguments draw;
  draw.keys = m.keys;
  draw.skip = skip.get();
  draw.state = state.data();
  a.scan(draw);
  finish_mixture(m, state.data(), skip.get(), tokens);
}

}  // namespace

PerRow<float> temperature_of(const dlcore_floats& temperature, int64_t rows, bool greedy) {
  const auto checked = per_row("temperature", temperature);
  for (int64_t r = 0; r < values(checked, rows); ++r)
    if (!(greedy && checked[r] == 0)) in_range("temperature", checked[r], kSmallest, kLargest);
  return checked;
}

Softmax softmax_of(const dlcore_categorical& a, int64_t rows, int64_t vocab, bool greedy, Memory memory,
                   Ids ids) {
  if (ids == Ids::kAnywhere) vocab = std::numeric_limits<int64_t>::max();
  const bool readable = memory == Memory::kHost;
  Softmax s;
  if (readable) token_ids("index", a.index, rows, vocab);
  s.index = {a.index, 1};
  s.shift = per_row("shift", a.shift);
  if (s.shift && !a.index)
    refuse(DLCORE_INVALID_VALUE, "shift needs index, the token whose logit it is added to");
  s.temperature =
      readable ? temperature_of(a.temperature, rows, greedy) : per_row("temperature", a.temperature);
  if (a.softcap != 0) in_range("softcap", a.softcap, kSmallest, kLargest);
  s.softcap = a.softcap;
  s.exclude = optional_id("exclude", a.exclude, vocab);
  if (a.exclude && vocab == 1) refuse(DLCORE_INVALID_VALUE, "exclude leaves no token in a vocabulary of 1");
  return s;
}

ScanArguments scan_of(const dlcore_part& part, int64_t rows, int64_t vocab) {
  const int64_t first = part.first, most = std::numeric_limits<int64_t>::max() - vocab;
  if (first < 0 || first > most || (first % kGroup != 0 && first / kGroup != (first + vocab - 1) / kGroup))
    refuse(DLCORE_INVALID_VALUE, "first must be a multiple of ", kGroup,
           ", or all tokens lie in one group of as many, got ", first, " and ", vocab, " tokens");
  ScanArguments a;
  a.first_token = first;
  if (part.target) a.target = {part.target, 1};
  a.skip = part.skip;
  if (part.keys.data) a.keys = keys(part.keys, rows);
  return a;
}

MixtureArguments mixture_of(const dlcore_mixture& how, const Softmax& softmax, int64_t rows, int64_t vocab,
                            Memory memory) {
  needed("index", softmax.index.data, rows);
  needed("coefficients", how.coefficients.data, rows);
  MixtureArguments m;
  m.rows = rows;
  m.vocab = vocab;
  m.z = softmax.index.data;
  m.coefficients = per_row("coefficients", how.coefficients);
  if (m.coefficients.stride != 0 && m.coefficients.stride < 6)
    refuse(DLCORE_INVALID_SHAPE, "coefficients.stride must be 0 or at least 6, got ", m.coefficients.stride);
  if (memory == Memory::kHost)
    for (int64_t r = 0; r < values(m.coefficients, rows); ++r)
      for (int i = 0; i < 6; ++i) in_range("coefficients", (&m.coefficients[r])[i], -kMost, kMost);
  m.prior = optional_id("prior", how.prior, vocab);
  m.exclude = softmax.exclude;
  m.temperature = softmax.temperature;
  m.keys = keys(how.keys, rows);
  return m;
}

Rows::Rows(const dlcore_categorical* a, bool greedy, Ids ids) : Rows(pointed("softmax", a), greedy, ids) {}

Rows::Rows(const dlcore_categorical& a, bool greedy, Ids ids)
    : logits("logits", a.logits, a.threads),
      softmax(softmax_of(a, rows(), logits.vocab(), greedy, Memory::kHost, ids)),
      softmax_tiles(softmax),
      softcap(a.softcap) {
  if (!logits.dense()) softmax_tiles.softcap = 0;
}

void Rows::scan(ScanArguments scan) const {
  logits.tiles(softcap, [&](int64_t first, const View& tile) { this->scan(scan, first, tile); });
}

void Rows::scan(ScanArguments scan, int64_t first, const View& tile) const {
  scan.softmax = softmax_tiles;
  scan.logits = tile;
  scan.first_token += first;
  scan.start = first == 0;
  scan.threads = logits.threads(rows() * tile.columns);
  kernels().scan(scan);
}

void write_draw(const Summary* state, const Summary* drawn, int64_t rows, int64_t* tokens, int64_t* argmax,
                float* numbers) {
  const Optional<float> stats(numbers, DLCORE_NUM_SAMPLE_STATS * rows);
  const auto both = room<int64_t>(2 * rows);
  finish_sample(state, drawn, rows, both.get(), stats.data());
  std::copy_n(both.get(), rows, tokens);
  if (argmax) std::copy_n(both.get() + rows, rows, argmax);
}

}  // namespace dlcore::capi

using namespace dlcore::capi;

dlcore_status dlcore_categorical_stats(const dlcore_categorical* softmax, int64_t* argmax, float* numbers) {
  return guarded(__func__, [&] {
    const Rows a(softmax, false);
    needed("argmax", argmax, a.rows());
    needed("numbers", numbers, a.rows());
    Summaries state(static_cast<size_t>(a.rows()));
    dlcore::ScanArguments read;
    read.state = state.data();
    a.scan(read);
    dlcore::finish_stats(state.data(), a.rows(), argmax, numbers);
  });
}

dlcore_status dlcore_categorical_summary(const dlcore_categorical* softmax, const dlcore_part* part,
                                         int64_t* tokens, double* numbers) {
  return guarded(__func__, [&] {
    const Rows a(softmax, true, Ids::kAnywhere);
    dlcore::ScanArguments read = scan_of(pointed("part", part), a.rows(), a.logits.vocab());
    needed("tokens", tokens, a.rows());
    needed("numbers", numbers, a.rows());
    Summaries state(static_cast<size_t>(a.rows()));
    read.state = state.data();
    a.scan(read);
    dlcore::finish_summary(state.data(), a.rows(), tokens, numbers);
  });
}

dlcore_status dlcore_categorical_sample(const dlcore_categorical* softmax, const dlcore_sampling* how,
                                        int64_t* tokens, int64_t* argmax, float* numbers) {
  return guarded(__func__, [&] {
    const Rows a(softmax, true);
    sample(a, pointed("how", how), tokens, argmax, numbers);
  });
}

dlcore_status dlcore_categorical_sample_mixture(const dlcore_categorical* softmax, const dlcore_mixture* how,
                                                int64_t* tokens) {
  return guarded(__func__, [&] {
    const Rows a(softmax, true);
    sample_mixture(a, pointed("how", how), tokens);
  });
}
