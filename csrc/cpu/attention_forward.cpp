// Attention over key intervals with an online softmax. Compiled once per ISA level.
#include "attention_stream.h"
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

  static int64_t floats(const AttentionArguments& a, int64_t width) {
    return width * (2 + KeyTile::columns(a.value_dim));
  }
  Accumulator(float* memory, int64_t width) : largest(memory), sum(memory + width), out(memory + 2 * width) {}

  void clear(const RowTile& rows) {
    std::fill(largest, largest + rows.width, kNothing);
    std::fill(sum, sum + rows.width, 0.0f);
    std::fill(out, out + KeyTile::columns(rows.a.value_dim) * rows.width, 0.0f);
  }

  // Takes in what another part of the keys gave.
  void merge(const Accumulator& other, const RowTile& rows) {
    float mine[kRowTile], theirs[kRowTile];
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

// What the heads that a thread works on share.
struct Buffers {
  float* natural;  // rows one after the other
  float* scores;   // (keys of a tile, lanes)
  float* factor;   // by lane

  static int64_t floats(const AttentionArguments& a) {
    return kRowTile * (std::max(KeyTile::columns(a.head_dim), KeyTile::columns(a.value_dim)) + kKeyTile + 1);
  }
  Buffers(const AttentionArguments& a, Scratch& memory)
      : natural(memory.take(floats(a) - kRowTile * (kKeyTile + 1))),
        scores(memory.take(kRowTile * kKeyTile)),
        factor(memory.take(kRowTile)) {}
};

// The row tiles of one head taken through their visits.
class Forward {
 public:
  static int64_t floats(const AttentionArguments& a) { return kRowTile * columns(a.head_dim); }
  Forward(const AttentionArguments& a, const Buffers& buffers, Scratch& memory)
      : a_(a), buffers_(buffers), q_(memory.take(floats(a))) {}

  void start(const RowTile& rows, Accumulator& state) {
    state.clear(rows);
    if (rows.visits->empty()) return;
    rows.read(a_.q, a_.head_dim, a_.softcap > 0 ? a_.scale : a_.scale * kLog2E, buffers_.natural);
    rows.across(buffers_.natural, a_.head_dim, q_);
  }

  template <class Beside>
  void visit(const RowTile& rows, const Visit& visit, const KeyTile& tile, Accumulator& state,
             const Beside& beside_keys, const Beside& beside_values) {
    const int64_t count = visit.end - visit.begin, v_columns = columns(a_.value_dim);
    const Operands scored{tile.k + visit.begin * tile.k_stride,
                          tile.k_stride,
                          q_,
                          rows.width,
                          buffers_.scores,
                          rows.width,
                          columns(a_.head_dim)};
    multiply<false>(scored, count, rows.sixteens, beside_keys);
    for (int64_t w = 0; w < rows.sixteens; ++w) soften(rows, visit, w, state);
    const Operands weighted{tile.v + visit.begin * tile.v_stride,
                            tile.v_stride,
                            buffers_.scores,
                            rows.width,
                            state.out,
                            rows.width,
                            count,
                            true,
                            buffers_.factor};
    if (visit.full || tile.finite)
      multiply<true>(weighted, v_columns, rows.sixteens, beside_values);
    else
      multiply_guarded<true, false>(weighted, v_columns, rows.sixteens);
  }

  void finish(const RowTile& rows, const Accumulator& state) {
    float* factor = buffers_.factor;
    std::fill(factor, factor + rows.width, 0.0f);
    for (int64_t l = 0; l < rows.lanes; ++l) {
      const bool empty = state.sum[l] == 0;
      factor[l] = empty ? 0 : 1 / state.sum[l];
      a_.lse[rows.lse_at(l)] = empty ? kNothing : (state.largest[l] + std::log2(state.sum[l])) * kLn2;
    }
    for (int64_t d = 0; d < columns(a_.value_dim); ++d)
      for (int64_t l = 0; l < rows.width; l += kLanes) {
        float* p = state.out + d * rows.width + l;
        store(p, load(p) * load(factor + l));
      }
    rows.write(state.out, a_.value_dim, buffers_.natural, a_.out);
  }

 private:
  static int64_t columns(int64_t dim) { return KeyTile::columns(dim); }

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
    float* scores = buffers_.scores + w * kLanes;
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
      e = select(less(d, kExponentFloor), 0.0f, e);
      store(scores + n * stride, e);
      sum = sum + e;
    }
    const Floats factor = exp2(max(kExponentFloor, before - base));
    store(buffers_.factor + w * kLanes, factor);
    store(state.largest + w * kLanes, top);
    store(state.sum + w * kLanes, fused(load(state.sum + w * kLanes), factor, sum));
  }

  const AttentionArguments& a_;
  Buffers buffers_;
  float* q_;
};

// Many rows: a piece of work is a head, or every `strands`-th row tile of it.
void run_many(const AttentionArguments& a, const AttentionPlan& plan) {
  const int64_t chunks = plan.head_chunks, tiles = plan.row_tiles, heads = a.batch * a.kv_heads * chunks;
  const int64_t strands =
      std::max<int64_t>(1, std::min(tiles, std::max<int64_t>(kPieces, 4 * a.threads) / heads));
  parallel_for(heads * strands, a.threads, [&](int64_t piece) {
    const int64_t head = piece / strands / chunks, chunk = piece / strands % chunks;
    const int64_t batch = head / a.kv_heads, kv_head = head % a.kv_heads;
    const int64_t floats = Accumulator::floats(a, kRowTile);
    Scratch& memory = scratch();
    memory.reset(Buffers::floats(a) + Forward::floats(a) + KeyTiles::floats(a) + floats);
    const Buffers buffers(a, memory);
    Forward forward(a, buffers, memory);
    KeyTiles keys(a, batch, kv_head, memory);
    float* state_memory = memory.take(floats);
    for (int64_t tile = piece % strands; tile < tiles; tile += strands) {
      const RowTile rows(a, plan, batch, kv_head, chunk, tile);
      Accumulator state(state_memory, rows.width);
      forward.start(rows, state);
      for (const Visit& visit : *rows.visits)
        forward.visit(rows, visit, keys[visit.tile], state, Nothing(), Nothing());
      forward.finish(rows, state);
    }
  });
}

// Few rows, so that reading the keys takes the time: heads that lie together are visited together, and where
// a sequence has few heads its keys are divided and the parts merged in order. How they are divided depends
// on the shape of one sequence and its cache alone, hence not on threads or on the batch.
class FewRows {
 public:
  FewRows(const AttentionArguments& a, const AttentionPlan& plan)
      : a_(a),
        plan_(plan),
        tiles_(plan.head_chunks * plan.row_tiles),
        parts_(std::clamp<int64_t>(kPieces / (a.kv_heads * tiles_), 1,
                                   std::max<int64_t>(1, a.keys / kKeyTile / kPartVisits))),
        abreast_(std::clamp<int64_t>(a.batch * a.kv_heads * tiles_ * parts_ / (2 * a.threads), 1,
                                     std::clamp<int64_t>(kTogether / row_bytes(a), 1, a.kv_heads))),
        groups_((a.kv_heads + abreast_ - 1) / abreast_),
        width_(round_up(std::min(a.rows, plan.queries_abreast) * plan.heads_abreast, kLanes)) {}

  void run() {
    const int64_t states = a_.batch * a_.kv_heads * tiles_ * parts_;
    shared_scratch().reset(states * state_floats());
    states_ = shared_scratch().take(states * state_floats());
    parallel_for(a_.batch * groups_ * tiles_ * parts_, a_.threads, [&](int64_t i) {
      const int64_t part = i % parts_, tile = i / parts_ % tiles_, group = i / parts_ / tiles_;
      visit(group / groups_, group % groups_ * abreast_, tile, part);
    });
    if (parts_ == 1) return;
    parallel_for(a_.batch * a_.kv_heads * tiles_, a_.threads,
                 [&](int64_t i) { finish(i / tiles_, i % tiles_); });
  }

 private:
  // Bytes that a machine recognises as lying together.
  static constexpr int64_t kTogether = 1024;

  static int64_t row_bytes(const AttentionArguments& a) {
    return std::max(a.head_dim, a.value_dim) * (a.k.dtype == DType::kFloat32 ? 4 : 2);
  }
  int64_t state_floats() const { return round_up(Accumulator::floats(a_, width_), kLanes); }
  Accumulator state(int64_t head, int64_t tile, int64_t part, const RowTile& rows) const {
    return {states_ + ((head * tiles_ + tile) * parts_ + part) * state_floats(), rows.width};
  }
  RowTile row_tile(int64_t batch, int64_t kv_head, int64_t tile) const {
    return {a_, plan_, batch, kv_head, tile / plan_.row_tiles, tile % plan_.row_tiles};
  }

  void visit(int64_t batch, int64_t first_head, int64_t tile, int64_t part) {
    const int64_t heads = std::min(abreast_, a_.kv_heads - first_head);
    Scratch& memory = scratch();
    memory.reset(Buffers::floats(a_) + heads * Forward::floats(a_) + TileStream::floats(a_));
    const Buffers buffers(a_, memory);
    std::vector<RowTile> rows;
    std::vector<Forward> forwards;
    std::vector<Accumulator> states;
    rows.reserve(static_cast<size_t>(heads));
    forwards.reserve(static_cast<size_t>(heads));
    states.reserve(static_cast<size_t>(heads));
    for (int64_t h = 0; h < heads; ++h) {
      rows.push_back(row_tile(batch, first_head + h, tile));
      forwards.emplace_back(a_, buffers, memory);
      states.push_back(state(batch * a_.kv_heads + first_head + h, tile, part, rows.back()));
      forwards.back().start(rows.back(), states.back());
    }
    const std::vector<Visit>& visits = *rows[0].visits;
    const auto count = static_cast<int64_t>(visits.size());
    const int64_t begin = count * part / parts_, end = count * (part + 1) / parts_;
    TileStream stream(a_, batch, first_head, heads, rows[0].sixteens, visits.data() + begin, end - begin,
                      memory);
    stream.each([&](int64_t head, const Visit& visit, const KeyTile& tile, const auto& beside_keys,
                    const auto& beside_values) {
      const auto h = static_cast<size_t>(head);
      forwards[h].visit(rows[h], visit, tile, states[h], beside_keys, beside_values);
    });
    if (parts_ > 1) return;
    for (size_t h = 0; h < rows.size(); ++h) forwards[h].finish(rows[h], states[h]);
  }

  // Merges what the parts gave.
  void finish(int64_t head, int64_t tile) {
    const int64_t batch = head / a_.kv_heads, kv_head = head % a_.kv_heads;
    Scratch& memory = scratch();
    memory.reset(Buffers::floats(a_) + Forward::floats(a_));
    const Buffers buffers(a_, memory);
    const RowTile rows = row_tile(batch, kv_head, tile);
    Accumulator sum = state(head, tile, 0, rows);
    for (int64_t part = 1; part < parts_; ++part) sum.merge(state(head, tile, part, rows), rows);
    Forward(a_, buffers, memory).finish(rows, sum);
  }

  const AttentionArguments& a_;
  const AttentionPlan& plan_;
  int64_t tiles_, parts_, abreast_, groups_, width_;
  float* states_ = nullptr;
};

}  // namespace

void attention(const AttentionArguments& a) {
  if (a.batch * a.rows * a.heads == 0) return;
  const AttentionPlan plan = plan_attention(a);
  if (plan.row_tiles == 1 || a.kv_heads * plan.head_chunks * plan.row_tiles < kPieces)
    FewRows(a, plan).run();
  else
    run_many(a, plan);
}

}  // namespace dlcore::DLCORE_ISA
