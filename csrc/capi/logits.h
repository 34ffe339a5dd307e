// Logits as the kernels take them: dense rows as they are, a linear head's tile by tile.
#pragma once

#include "capi.h"

namespace dlcore::capi {

// Rows, or columns, [first, first + count).
View rows_of(const View& v, int64_t first, int64_t count);
View columns_of(const View& v, int64_t first, int64_t count);

// How a product takes a factor.
enum class Order { kAsIs, kTransposed };

class Logits {
 public:
  Logits(const char* name, const dlcore_logits& logits, int32_t threads);

  int64_t rows() const { return values_.rows; }
  int64_t vocab() const { return dense() ? values_.columns : weight_.rows; }
  bool dense() const { return !weight_.data; }
  DType dtype() const { return values_.dtype; }
  // Of a head: (V, D), (rows, D) as floats, and whether it has a bias.
  const View& weight() const { return weight_; }
  View hidden() const {
    return result(const_cast<float*>(hidden_.data()), DType::kFloat32, rows(), values_.columns);
  }
  bool biased() const { return !bias_.empty(); }
  // So many tokens a tile of a head has.
  int64_t tile_width() const;

  // The threads for a pass over so many elements.
  int threads(int64_t elements) const { return threads_for(threads_, elements); }

  // out = [out +] a·b without gaps, a of floats, on their threads.
  void multiply(const View& a, Order a_order, const View& b, Order b_order, float* out, bool add) const;

  // Calls visit(first token, tile). A head's tile, softcapped, lasts until the next one.
  template <class Visit>
  void tiles(float softcap, Visit visit) const {
    cut(dense() ? vocab() : tile_width(), softcap, visit);
  }

  // The same, with dense logits cut as a head's are.
  template <class Visit>
  void pieces(float softcap, Visit visit) const {
    cut(tile_width(), softcap, visit);
  }

  // The same of two heads side by side: visit(first token, tile of p, tile of q).
  template <class Visit>
  static void pairs(const Logits& p, const Logits& q, Visit visit) {
    const int64_t width = p.dense() && q.dense() ? p.vocab() : p.tile_width();
    p.cut(width, 0, [&](int64_t first, const View& tile) { visit(first, tile, q.tile(first, width, 0)); });
  }

 private:
  template <class Visit>
  void cut(int64_t width, float softcap, Visit visit) const {
    if (rows() == 0) return;
    for (int64_t first = 0; first < vocab(); first += width) visit(first, tile(first, width, softcap));
  }

  View tile(int64_t first, int64_t width, float softcap) const;

  View values_, weight_;
  int32_t threads_;
  std::vector<float> hidden_, bias_;  // as floats
  mutable std::unique_ptr<float[]> tile_;
};

}  // namespace dlcore::capi
