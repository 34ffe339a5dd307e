// Attention over key intervals with an online softmax. Compiled once per ISA level.
#include "attention_tile.h"
#include "kernels.h"
#include "parallel.h"

namespace dlcore::DLCORE_ISA {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();
// Below so many pieces of work there may be threads without any, so rows or keys are divided further.
constexpr int64_t kPieces = 16;
// A part of the keys is worth merging from so many visits on.
constexpr int64_t kPartVisits = 8;

// A row tile's softmax so far: largest score in powers of two, sum, and output across the lanes.
struct Accumulator {
  float* largest;
  float* sum;
  float* out;

  static int64_t floats(const AttentionArguments& a) {
    return kRowTile * (2 + KeyTiles::columns(a.value_dim));
  }
  explicit Accumulator(float* memory) : largest(memory), sum(memory + kRowTile), out(memory + 2 * kRowTile) {}

  void clear(const RowTile& rows) {
    std::fill(largest, largest + kRowTile, kNothing);
    std::fill(sum, sum + kRowTile, 0.0f);
    std::fill(out, out + KeyTiles::columns(rows.a.value_dim) * rows.width, 0.0f);
  }

  // Takes in what another part of the keys gave.
  void merge(const Accumulator& other, const RowTile& rows) {
    alignas(64) float mine[kRowTile], theirs[kRowTile];
    for (int64_t l = 0; l < rows.width; ++l) {
      const float top = std::max(largest[l], other.largest[l]);
      mine[l] = largest[l] == kNothing ? 0 : std::exp2(largest[l] - top);
      theirs[l] = other.largest[l] == kNothing ? 0 : std::exp2(other.largest[l] - top);
      largest[l] = top;
      sum[l] = sum[l] * mine[l] + other.sum[l] * theirs[l];
    }
    for (int64_t d = 0; d < rows.a.value_dim; ++d)
      for (int64_t l = 0; l < rows.width; ++l) {
        const int64_t at = d * rows.width + l;
        out[at] = out[at] * mine[l] + other.out[at] * theirs[l];
      }
  }
};

// The rows of a tile taken through their visits.
class Forward {
 public:
  static int64_t floats(const AttentionArguments& a) {
    return KeyTiles::floats(a) + kRowTile * (2 * columns(a.head_dim) + columns(a.value_dim) + kKeyTile + 1);
  }
  Forward(const AttentionArguments& a, int64_t batch, int64_t kv_head, Scratch& memory)
      : a_(a), keys_(a, batch, kv_head, memory) {
    q_ = memory.take(kRowTile * columns(a.head_dim));
    natural_ = memory.take(kRowTile * std::max(columns(a.head_dim), columns(a.value_dim)));
    scores_ = memory.take(kKeyTile * kRowTile);
    factor_ = memory.take(kRowTile);
  }

  // What the visits [from, to) give.
  void run(const RowTile& rows, size_t from, size_t to, Accumulator& state) {
    state.clear(rows);
    if (from == to) return;
    rows.read(a_.q, a_.head_dim, a_.softcap > 0 ? a_.scale : a_.scale * kLog2E, natural_);
    rows.across(natural_, a_.head_dim, q_);
    for (size_t i = from; i < to; ++i) visit(rows, (*rows.visits)[i], state);
  }

  void finish(const RowTile& rows, const Accumulator& state) {
    for (int64_t l = 0; l < rows.lanes; ++l) {
      const bool empty = state.sum[l] == 0;
      factor_[l] = empty ? 0 : 1 / state.sum[l];
      a_.lse[rows.lse_at(l)] = empty ? kNothing : (state.largest[l] + std::log2(state.sum[l])) * kLn2;
    }
    for (int64_t d = 0; d < columns(a_.value_dim); ++d)
      for (int64_t l = 0; l < rows.width; l += kLanes) {
        float* p = state.out + d * rows.width + l;
        store(p, load(p) * load(factor_ + l));
      }
    rows.write(state.out, a_.value_dim, natural_, a_.out);
  }

 private:
  static int64_t columns(int64_t dim) { return KeyTiles::columns(dim); }

  void visit(const RowTile& rows, const Visit& visit, Accumulator& state) {
    const KeyTiles::Tile tile = keys_[visit.tile];
    const int64_t count = visit.end - visit.begin, k_columns = columns(a_.head_dim),
                  v_columns = columns(a_.value_dim);
    multiply<false>(
        {tile.k + visit.begin * k_columns, k_columns, q_, rows.width, scores_, rows.width, k_columns}, count,
        rows.sixteens);
    for (int64_t w = 0; w < rows.sixteens; ++w) soften(rows, visit, w, state);
    const Operands weighted{tile.v + visit.begin * v_columns,
                            v_columns,
                            scores_,
                            rows.width,
                            state.out,
                            rows.width,
                            count,
                            true,
                            factor_};
    if (visit.full || tile.finite)
      multiply<true>(weighted, v_columns, rows.sixteens);
    else
      multiply_guarded<true, false>(weighted, v_columns, rows.sixteens);
  }

  void soften(const RowTile& rows, const Visit& visit, int64_t w, Accumulator& state) {
    if (a_.softcap > 0)
      visit.full ? soften_as<true, true>(rows, visit, w, state)
                 : soften_as<true, false>(rows, visit, w, state);
    else
      visit.full ? soften_as<false, true>(rows, visit, w, state)
                 : soften_as<false, false>(rows, visit, w, state);
  }

  // Scores of sixteen rows to exp(score - largest), and the factor that scales what came before.
  template <bool capped, bool full>
  void soften_as(const RowTile& rows, const Visit& visit, int64_t w, Accumulator& state) {
    const int64_t count = visit.end - visit.begin, stride = rows.width;
    const int64_t first_key = visit.tile * kKeyTile + visit.begin;
    float* scores = scores_ + w * kLanes;
    const Floats before = load(state.largest + w * kLanes);
    Floats top = before;
    for (int64_t n = 0; n < count; ++n) {
      Floats s = load(scores + n * stride);
      if constexpr (capped) s = softcapped(s, a_.softcap) * kLog2E;
      if constexpr (!full) s = select(rows.sees(first_key + n, w), s, broadcast(kNothing));
      if constexpr (capped || !full) store(scores + n * stride, s);
      top = max(s, top);
    }
    const Floats base = select(equal(top, kNothing), 0.0f, top);
    Floats sum = broadcast(0.0f);
    for (int64_t n = 0; n < count; ++n) {
      const Floats d = load(scores + n * stride) - base;
      Floats e = exp2(max(kExponentFloor, d));
      if constexpr (!full) e = select(less(d, kExponentFloor), 0.0f, e);
      store(scores + n * stride, e);
      sum = sum + e;
    }
    const Floats factor = exp2(max(kExponentFloor, before - base));
    store(factor_ + w * kLanes, factor);
    store(state.largest + w * kLanes, top);
    store(state.sum + w * kLanes, fused(load(state.sum + w * kLanes), factor, sum));
  }

  const AttentionArguments& a_;
  KeyTiles keys_;
  float *q_, *natural_, *scores_, *factor_;
};

// How a call is cut into pieces that threads take; by shapes alone, so that sums don't depend on threads.
struct Division {
  int64_t tiles, chunks, kv_heads, heads;
  int64_t strands;  // a head's row tiles dealt out to so many pieces
  int64_t parts;    // the visits of a row tile divided so often

  Division(const AttentionArguments& a, const AttentionPlan& plan)
      : tiles(plan.row_tiles),
        chunks(plan.head_chunks),
        kv_heads(a.kv_heads),
        heads(a.batch * a.kv_heads * plan.head_chunks),
        strands(std::max<int64_t>(1, std::min(tiles, kPieces / heads))),
        parts(1) {
    size_t visits = 0;
    for (const auto& set : plan.visits)
      for (const auto& tile : set) visits = std::max(visits, tile.size());
    if (heads * tiles < kPieces)
      parts = std::max<int64_t>(
          1, std::min(kPieces / (heads * tiles), static_cast<int64_t>(visits) / kPartVisits));
  }
  int64_t batch(int64_t head) const { return head / chunks / kv_heads; }
  int64_t kv_head(int64_t head) const { return head / chunks % kv_heads; }
  int64_t chunk(int64_t head) const { return head % chunks; }
};

void run_whole(const AttentionArguments& a, const AttentionPlan& plan, const Division& cut) {
  parallel_for(cut.heads * cut.strands, a.threads, [&](int64_t piece) {
    const int64_t head = piece / cut.strands, batch = cut.batch(head), kv_head = cut.kv_head(head);
    Scratch& memory = scratch();
    memory.reset(Forward::floats(a) + Accumulator::floats(a));
    Forward forward(a, batch, kv_head, memory);
    Accumulator state(memory.take(Accumulator::floats(a)));
    for (int64_t tile = piece % cut.strands; tile < cut.tiles; tile += cut.strands) {
      const RowTile rows(a, plan, batch, kv_head, cut.chunk(head), tile);
      forward.run(rows, 0, rows.visits->size(), state);
      forward.finish(rows, state);
    }
  });
}

// Few rows and many keys: the keys are divided, and what the parts give is merged in their order.
void run_parts(const AttentionArguments& a, const AttentionPlan& plan, const Division& cut) {
  const int64_t floats = round_up(Accumulator::floats(a), kLanes), tiles = cut.heads * cut.tiles;
  std::vector<float> states(static_cast<size_t>(tiles * cut.parts * floats + kLanes));
  float* first = states.data() + kLanes - reinterpret_cast<uintptr_t>(states.data()) / sizeof(float) % kLanes;
  const auto with_tile = [&](int64_t i, auto body) {
    const int64_t head = i / cut.tiles, batch = cut.batch(head), kv_head = cut.kv_head(head);
    Scratch& memory = scratch();
    memory.reset(Forward::floats(a));
    Forward forward(a, batch, kv_head, memory);
    body(forward, RowTile(a, plan, batch, kv_head, cut.chunk(head), i % cut.tiles));
  };
  parallel_for(tiles * cut.parts, a.threads, [&](int64_t piece) {
    with_tile(piece / cut.parts, [&](Forward& forward, const RowTile& rows) {
      const auto visits = static_cast<int64_t>(rows.visits->size()), part = piece % cut.parts;
      Accumulator state(first + piece * floats);
      forward.run(rows, static_cast<size_t>(visits * part / cut.parts),
                  static_cast<size_t>(visits * (part + 1) / cut.parts), state);
    });
  });
  parallel_for(tiles, a.threads, [&](int64_t i) {
    with_tile(i, [&](Forward& forward, const RowTile& rows) {
      Accumulator state(first + i * cut.parts * floats);
      for (int64_t part = 1; part < cut.parts; ++part)
        state.merge(Accumulator(first + (i * cut.parts + part) * floats), rows);
      forward.finish(rows, state);
    });
  });
}

}  // namespace

void attention(const AttentionArguments& a) {
  if (a.batch * a.rows * a.heads == 0) return;
  const AttentionPlan plan = plan_attention(a);
  const Division cut(a, plan);
  cut.parts > 1 ? run_parts(a, plan, cut) : run_whole(a, plan, cut);
}

}  // namespace dlcore::DLCORE_ISA
