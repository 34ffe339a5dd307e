// Bitstream diffusion: x = bit + σ·noise, bits of two values `low` and `high`.
#pragma once

#include "view.h"

namespace dlcore {

// A row is worked on in spans of so many columns, so that few long rows keep many threads busy.
constexpr int64_t kBitSpan = 4096;

DLCORE_HD inline int64_t bit_spans(int64_t columns) { return (columns + kBitSpan - 1) / kBitSpan; }

// Several float32 parameters `apart` from each other, each shared by all elements, by a row's, or one of its
// own.
struct BitParameters {
  const float* data = nullptr;
  int64_t apart = 0, row = 0, column = 0;
};

struct BitCoding {
  float low = 0, high = 1, clip = 0;
};

// residual + clamp(slope·(x - centre), ±clip), or its sigmoid.
struct BitLogitsArguments {
  View x, residual;  // residual.data: null for none
  BitParameters slope;
  BitCoding coding;
  bool sigmoid = false;
  float* out = nullptr;
  int threads = 1;
};

// probs = sigmoid(logits), m = low + (high - low)·probs, next = ratio·x + (1 - ratio)·m + spread·normal.
struct BitStepArguments {
  View x, residual;
  BitParameters parameters;  // slope, ratio, spread
  BitCoding coding;
  Keys keys;  // none: no noise
  float* next = nullptr;
  float* probs = nullptr;
  int threads = 1;
};

// x + spread·normal.
struct BitPerturbArguments {
  View x;
  BitParameters spread;
  Keys keys;
  float* out = nullptr;
  int threads = 1;
};

// Squared error of m or cross-entropy of probs, summed over every span: (rows, spans).
struct BitLossArguments {
  View residual, x, bits;
  BitParameters slope;
  BitCoding coding;
  bool squared = true;
  double* sums = nullptr;
  int threads = 1;
};

struct BitLossBackwardArguments {
  BitLossArguments loss;
  const float* grad = nullptr;  // (rows), of the sum over the row
  View residual_grad, x_grad;   // x_grad.data: null for none
  int threads = 1;
};

// tokens (count) -> (count, width).
struct BitEncodeArguments {
  const int64_t* tokens = nullptr;
  int64_t count = 0;
  int width = 0;
  bool msb = true, gray = false;
  float low = 0, high = 1;
  float* out = nullptr;
  int threads = 1;
};

// (..., width) -> tokens; a bit is set above `threshold`. -1 where a bit is NaN.
struct BitDecodeArguments {
  View x;
  bool msb = true, gray = false;
  float threshold = 0;
  int64_t vocab = 0;  // codes wrap around at it; 0: none do
  int64_t* tokens = nullptr;
  int threads = 1;
};

}  // namespace dlcore
