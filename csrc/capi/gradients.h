// The gradient of a dlcore_logits, collected from gradients of its tiles of logits.
#pragma once

#include "logits.h"

namespace dlcore::capi {

class Gradient {
 public:
  Gradient(const char* name, const Logits& logits, const dlcore_logits_grad* out);

  // Where the gradient of the tile of so many tokens from `first` on is to be written.
  View tile(int64_t first, int64_t tokens) const;
  // Takes in what was written there.
  void add(int64_t first, const View& gradient);
  // Once all tiles are in.
  void finish() const;

 private:
  const Logits& logits_;
  dlcore_logits_grad out_;
  // Of a head, as floats.
  std::vector<float> hidden_;
  std::unique_ptr<float[]> tile_, weight_;
};

}  // namespace dlcore::capi
