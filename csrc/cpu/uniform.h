// The uniform-state NELBO on the CPU.
#pragma once

#include "categorical.h"

namespace dlcore {

struct NelboArguments {
  bool scan = false;       // whole rows: scan each for the first three of `saved` while the cache holds it
  PerRow<int64_t> target;  // x, for the scan
  View logits;
  int64_t first_token = 0, vocab = 0;
  Softmax softmax;  // index: z, shift: from a denoiser to leave-one-out
  PerRow<double> alpha;
  double* saved = nullptr;  // (5, rows): logsumexp, log p(z), log p(x), Σ log1p(c p), Σ c p / (1 + c p)
  int threads = 1;
};

struct NelboBackwardArguments {
  View logits;
  int64_t first_token = 0, vocab = 0;
  Softmax softmax;
  const int64_t* z = nullptr;
  const int64_t* x = nullptr;
  PerRow<double> alpha, dalpha;
  const float* grad = nullptr;  // (rows)
  const double* saved = nullptr;
  View out;
  int threads = 1;
};

// A token's part in the NELBO; c = Vα / (1 - α), w = -α' / (Vα).
struct NelboRow {
  double alpha, c, w;
  NelboRow(double alpha, double dalpha, int64_t vocab)
      : alpha(alpha),
        c(static_cast<double>(vocab) * alpha / (1 - alpha)),
        w(-dalpha / (static_cast<double>(vocab) * alpha)) {}
};

// The first three of a row's saved numbers, from its scan.
inline void start_nelbo(const Summary& s, int64_t r, int64_t rows, double* saved) {
  const double lse = s.logsumexp();
  saved[r] = lse;
  saved[rows + r] = s.index_logit - lse;
  saved[2 * rows + r] = s.target_logit - lse;
}

// loss (rows), nats.
void finish_nelbo(const double* saved, int64_t rows, int64_t vocab, const int64_t* z, const int64_t* x,
                  PerRow<double> alpha, PerRow<double> dalpha, float* loss);

}  // namespace dlcore
