// The categorical arguments of the C API as the kernels take them.
#pragma once

#include "logits.h"

namespace dlcore::capi {

// Positive, with a float32 inverse; or 0 where that means the argmax.
PerRow<float> temperature_of(const dlcore_floats& temperature, int64_t rows, bool greedy);

// Which ids are taken: those of the logits, or of a whole vocabulary of which these are a part.
enum class Ids { kHere, kAnywhere };

// Softmax's parameters, checked; `greedy`: temperature 0 is taken.
Softmax softmax_of(const dlcore_categorical& a, int64_t rows, int64_t vocab, bool greedy, Memory memory,
                   Ids ids = Ids::kHere);

// What is wanted of a part of a vocabulary, here of so many tokens.
ScanArguments scan_of(const dlcore_part& part, int64_t rows, int64_t vocab);

MixtureArguments mixture_of(const dlcore_mixture& how, const Softmax& softmax, int64_t rows, int64_t vocab,
                            Memory memory);

// What every function takes of a dlcore_categorical, checked; `greedy`: temperature 0 is taken.
struct Rows {
  Rows(const dlcore_categorical* a, bool greedy, Ids ids = Ids::kHere);

  int64_t rows() const { return logits.rows(); }

  // One read of the logits into summaries (rows); `scan` says what is wanted beside, and their first token.
  void scan(ScanArguments scan) const;
  // Of one tile.
  void scan(ScanArguments scan, int64_t first, const View& tile) const;

  Logits logits;
  Softmax softmax;        // of logits as they are
  Softmax softmax_tiles;  // of `tiles`: a head's come softcapped
  float softcap;          // of a head's tiles

 private:
  Rows(const dlcore_categorical& a, bool greedy, Ids ids);
};

// A draw's results: argmax and numbers may not be wanted.
void write_draw(const Summary* state, const Summary* drawn, int64_t rows, int64_t* tokens, int64_t* argmax,
                float* numbers);

// Kept summaries of rows that are scanned.
using Summaries = std::vector<Summary>;

}  // namespace dlcore::capi
