// Gradients of attention over key intervals, with the scores computed anew from lse. Compiled once per ISA
// level.
#include "attention_tile.h"
#include "kernels.h"
#include "parallel.h"

namespace dlcore::DLCORE_ISA {
namespace {

// Below so many heads of a sequence the row tiles of one are dealt out to several pieces of work.
constexpr int64_t kHeads = 4;

// The row tiles of one head, or every `strands`-th of them.
class Backward {
 public:
  static int64_t floats(const AttentionBackwardArguments& a) {
    return KeyTiles::floats(a) + kRowTile * (4 * columns(a.head_dim) + 2 * columns(a.value_dim) +
                                             columns(std::max(a.head_dim, a.value_dim)) + 2 * kKeyTile + 2);
  }
  Backward(const AttentionBackwardArguments& a, int64_t batch, int64_t kv_head, Scratch& memory)
      : a_(a),
        keys_(a, batch, kv_head, memory),
        k_columns_(columns(a.head_dim)),
        v_columns_(columns(a.value_dim)) {
    q_ = memory.take(kRowTile * k_columns_);
    q_across_ = memory.take(kRowTile * k_columns_);
    grad_q_ = memory.take(kRowTile * k_columns_);
    grad_ = memory.take(kRowTile * v_columns_);
    grad_across_ = memory.take(kRowTile * v_columns_);
    natural_ = memory.take(kRowTile * std::max(k_columns_, v_columns_));
    probs_ = memory.take(kKeyTile * kRowTile);
    slopes_ = memory.take(kKeyTile * kRowTile);
    delta_ = memory.take(kRowTile);
    lse_ = memory.take(kRowTile);
  }

  // Adds to the head's grad_k (keys, columns) and grad_v, and writes the rows' grad_q.
  void run(const RowTile& rows, float* grad_k, float* grad_v) {
    const bool finite = read(rows);
    std::fill(grad_q_, grad_q_ + k_columns_ * rows.width, 0.0f);
    for (const Visit& visit : *rows.visits) take(rows, visit, finite, grad_k, grad_v);
    for (int64_t i = 0; i < k_columns_ * rows.width; i += kLanes)
      store(grad_q_ + i, load(grad_q_ + i) * a_.scale);
    rows.write(grad_q_, a_.head_dim, natural_, a_.grad_q);
  }

 private:
  static int64_t columns(int64_t dim) { return KeyTile::columns(dim); }

  // q·scale, the output's gradient, and per row lse and Σ grad·out - grad_lse.
  bool read(const RowTile& rows) {
    rows.read(a_.out, a_.value_dim, 1.0f, natural_);
    bool finite = rows.read(a_.q, a_.head_dim, a_.scale, q_);
    finite &= rows.read(a_.grad_out, a_.value_dim, 1.0f, grad_);
    rows.across(q_, a_.head_dim, q_across_);
    rows.across(grad_, a_.value_dim, grad_across_);
    std::fill(delta_, delta_ + kRowTile, 0.0f);
    std::fill(lse_, lse_ + kRowTile, 0.0f);
    for (int64_t l = 0; l < rows.lanes; ++l) {
      Floats dot = broadcast(0.0f);
      for (int64_t d = 0; d < v_columns_; d += kLanes)
        dot = fused(load(grad_ + l * v_columns_ + d), load(natural_ + l * v_columns_ + d), dot);
      delta_[l] = sum(dot) - a_.grad_lse[rows.lse_at(l)];
      lse_[l] = a_.lse[rows.lse_at(l)] * kLog2E;
    }
    return finite;
  }

  void take(const RowTile& rows, const Visit& visit, bool finite, float* grad_k, float* grad_v) {
    const KeyTile& tile = keys_[visit.tile];
    const int64_t count = visit.end - visit.begin, first = visit.tile * kKeyTile + visit.begin;
    const float* k = tile.k + visit.begin * k_columns_;
    const float* v = tile.v + visit.begin * v_columns_;
    const int64_t width = rows.width;
    multiply<false>({k, k_columns_, q_across_, width, probs_, width, k_columns_}, count, rows.sixteens);
    multiply<false>({v, v_columns_, grad_across_, width, slopes_, width, v_columns_}, count, rows.sixteens);
    for (int64_t w = 0; w < rows.sixteens; ++w) differentiate(rows, visit, w);

    const Operands to_v{probs_,     width, grad_, v_columns_, grad_v + first * v_columns_,
                        v_columns_, width, true};
    const Operands to_k{slopes_, width, q_, k_columns_, grad_k + first * k_columns_, k_columns_, width, true};
    const Operands to_q{k, k_columns_, slopes_, width, grad_q_, width, count, true};
    if (visit.full || finite) {
      multiply<false>(to_v, count, v_columns_ / kLanes);
      multiply<false>(to_k, count, k_columns_ / kLanes);
    } else {
      multiply_guarded<false, true>(to_v, count, v_columns_ / kLanes);
      multiply_guarded<false, true>(to_k, count, k_columns_ / kLanes);
    }
    if (visit.full || tile.finite)
      multiply<true>(to_q, k_columns_, rows.sixteens);
    else
      multiply_guarded<true, false>(to_q, k_columns_, rows.sixteens);
  }

  void differentiate(const RowTile& rows, const Visit& visit, int64_t w) {
    if (a_.softcap > 0)
      visit.full ? differentiate_as<true, true>(rows, visit, w)
                 : differentiate_as<true, false>(rows, visit, w);
    else
      visit.full ? differentiate_as<false, true>(rows, visit, w)
                 : differentiate_as<false, false>(rows, visit, w);
  }

  // Scores and grad·v of sixteen rows to probabilities and the gradient of the scores.
  template <bool capped, bool full>
  void differentiate_as(const RowTile& rows, const Visit& visit, int64_t w) {
    const int64_t count = visit.end - visit.begin, first_key = visit.tile * kKeyTile + visit.begin;
    const Floats lse = 0.0f - load(lse_ + w * kLanes), delta = load(delta_ + w * kLanes);
    for (int64_t n = 0; n < count; ++n) {
      float* p = probs_ + n * rows.width + w * kLanes;
      float* slope = slopes_ + n * rows.width + w * kLanes;
      Floats s = load(p), chain = broadcast(1.0f);
      if constexpr (capped) {
        s = softcapped(s, a_.softcap);
        const Floats t = s * (1.0f / a_.softcap);
        chain = 1.0f - t * t;
      }
      const Floats d = fused(s, kLog2E, lse);
      Floats e = exp2(max(kExponentFloor, d));
      Floats g = e * (load(slope) - delta);
      if constexpr (capped) g = g * chain;
      if constexpr (!full) {
        const Mask seen = rows.sees(first_key + n, w);
        e = select(seen, e, 0.0f);
        g = select(seen, g, 0.0f);
      }
      store(p, e);
      store(slope, g);
    }
  }

  const AttentionBackwardArguments& a_;
  KeyTiles keys_;
  int64_t k_columns_, v_columns_;
  float *q_, *q_across_, *grad_q_, *grad_, *grad_across_, *natural_, *probs_, *slopes_, *delta_, *lse_;
};

// Sums of `strands` buffers, each (keys, columns) and `stride` floats after the last, into one head's
// gradient.
template <class T>
void write_sum(const float* parts, int64_t strands, int64_t stride, int64_t columns, int64_t keys,
               int64_t dim, const Heads& to, int64_t batch, int64_t head) {
  alignas(64) float row[kMaxHeadDim];
  for (int64_t key = 0; key < keys; ++key) {
    const float* p = parts + key * columns;
    for (int64_t d = 0; d < columns; d += kLanes) {
      Floats x = load(p + d);
      for (int64_t s = 1; s < strands; ++s) x = x + load(p + s * stride + d);
      store(row + d, x);
    }
    RowTile::write_row(to.at<T>(batch, key, head), dim, row);
  }
}

struct HeadGradients {
  const AttentionBackwardArguments& a;
  int64_t k_columns = KeyTile::columns(a.head_dim), v_columns = KeyTile::columns(a.value_dim);
  int64_t floats = a.keys * (k_columns + v_columns);

  // grad_k (keys, columns), then grad_v; `strands` of them side by side.
  void write(const float* parts, int64_t strands, int64_t batch, int64_t head) const {
    with_dtype(a.k.dtype, [&](auto type) {
      using T = decltype(type);
      write_sum<T>(parts, strands, floats, k_columns, a.keys, a.head_dim, a.grad_k, batch, head);
      write_sum<T>(parts + a.keys * k_columns, strands, floats, v_columns, a.keys, a.value_dim, a.grad_v,
                   batch, head);
    });
  }
};

}  // namespace

void attention_backward(const AttentionBackwardArguments& a) {
  if (a.batch * a.kv_heads == 0) return;
  const AttentionPlan plan = plan_attention(a);
  const HeadGradients gradients{a};
  const int64_t heads = a.batch * a.kv_heads, tiles = plan.head_chunks * plan.row_tiles;
  const int64_t strands = std::max<int64_t>(1, std::min(tiles, kHeads / a.kv_heads));
  std::vector<float> shared(strands > 1 ? static_cast<size_t>(heads * strands * gradients.floats) : 0);
  parallel_for(heads * strands, a.threads, [&](int64_t piece) {
    const int64_t head = piece / strands, batch = head / a.kv_heads, kv_head = head % a.kv_heads;
    Scratch& memory = scratch();
    memory.reset(Backward::floats(a) + (strands > 1 ? 0 : gradients.floats));
    float* sums = strands > 1 ? shared.data() + piece * gradients.floats : memory.take(gradients.floats);
    std::fill(sums, sums + gradients.floats, 0.0f);
    Backward backward(a, batch, kv_head, memory);
    for (int64_t i = piece % strands; i < tiles; i += strands)
      backward.run(RowTile(a, plan, batch, kv_head, i / plan.row_tiles, i % plan.row_tiles), sums,
                   sums + a.keys * gradients.k_columns);
    if (strands == 1) gradients.write(sums, 1, batch, kv_head);
  });
  if (strands > 1)
    parallel_for(heads, a.threads, [&](int64_t head) {
      gradients.write(shared.data() + head * strands * gradients.floats, strands, head / a.kv_heads,
                      head % a.kv_heads);
    });
}

}  // namespace dlcore::DLCORE_ISA
