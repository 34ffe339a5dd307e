// The categorical family on the CPU: from scanned rows to results (the same code on every ISA level).
#pragma once

#include "../common/categorical.h"

namespace dlcore {

// numbers (6, rows): logsumexp, argmax_logprob, margin, entropy, index_logprob, runner_up_logprob.
void finish_stats(const Summary* state, int64_t rows, int64_t* argmax, float* numbers);

// tokens (2, rows): drawn, argmax; numbers (7, rows): those of finish_stats and the draw's log-probability.
// `drawn` is the state of the scan that drew, `state` that of the whole row.
void finish_sample(const Summary* state, const Summary* drawn, int64_t rows, int64_t* tokens, float* numbers);

// What merges with other parts of the vocabulary, as csrc/common/categorical_finish.h has it: tokens (2,
// rows), numbers (8, rows).
void finish_summary(const Summary* state, int64_t rows, int64_t* tokens, double* numbers);

// numbers (3, rows): log p[target], log p[index], logsumexp; 0 where target < 0.
void finish_log_probs(const Summary* state, PerRow<int64_t> target, bool with_index, int64_t rows,
                      double* numbers);

// references (2, rows): the largest logit so far or -inf, and the same with 0 for -inf, which exp is taken
// relative to. `factor` scales what was summed before; false if it is 1 for all rows.
bool follow_largest(const Summary* state, int64_t rows, bool start, double* references, float* factor);

// `nothing`: that of a row with nothing but -inf.
void finish_logsumexp(const Summary* state, int64_t rows, double nothing, double* logsumexp);

// numbers (3, rows): KL, and the two logsumexps; NaN and -inf where one of the rows has nothing but -inf.
void finish_kl(const KLSummary* state, int64_t rows, double* numbers);

// Marks rows whose outcome does not depend on their logits.
void plan_mixture(const MixtureArguments&, uint8_t* skip);
void finish_mixture(const MixtureArguments&, const Summary* state, const uint8_t* skip, int64_t* tokens);

// Truncation: a selection is narrowed level by level; what it found is a cut.
void start_selections(const Summary* state, int64_t rows, PerRow<int64_t> top_k, PerRow<float> top_p,
                      const Selection* within, Selection* selections);
void narrow(const Bin* bins, int64_t rows, int level, Selection* selections);
void finish_selections(const Summary* state, int64_t rows, PerRow<float> min_p, PerRow<float> temperature,
                       const Selection* selections, Cut* cuts);

}  // namespace dlcore
