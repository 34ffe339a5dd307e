// What the attention kernels are told: tensors of heads, key intervals, pages.
#pragma once

#include "../common/view.h"

namespace dlcore {

constexpr int64_t kMaxHeadDim = 512;

// (batch, rows, heads, columns) with contiguous columns; strides in elements.
struct Heads {
  char* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch_stride = 0, row_stride = 0, head_stride = 0;

  template <class T>
  T* at(int64_t batch, int64_t row, int64_t head) const {
    return reinterpret_cast<T*>(data) + batch * batch_stride + row * row_stride + head * head_stride;
  }
};

// Where the rows of a sequence lie if not one after the other: page ids (batch, pages), or null.
struct Pages {
  const int32_t* table = nullptr;
  int64_t pages = 0, page_size = 0;
};

struct AttentionArguments {
  int64_t batch = 0, rows = 0, keys = 0, heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  Heads q, k, v, out;
  float* lse = nullptr;  // (batch, heads, rows), nats
  // Row r of a sequence sees the keys [starts[2r + i], stops[2r + i]), i = 0, 1.
  const int32_t* starts = nullptr;
  const int32_t* stops = nullptr;
  bool shared_bounds = true;  // one set of intervals for all sequences
  Pages pages;
  float scale = 1, softcap = 0;
  int threads = 1;
};

struct AttentionBackwardArguments : AttentionArguments {
  Heads grad_out, grad_q, grad_k, grad_v;
  const float* grad_lse = nullptr;  // (batch, heads, rows)
};

// A step against a cache, whose keys and values are k and v: new rows are written at `lengths`, then
// attended.
struct AttentionDecodeArguments : AttentionArguments {
  Heads new_k, new_v;                // (batch, rows, kv_heads, columns)
  const int32_t* lengths = nullptr;  // (batch,), what is cached
  int64_t num_commit = 0;            // rows of the block before
  const bool* causal = nullptr;      // for each sequence, or for all, or null: none is
  bool shared_causal = true;
  int64_t window = 0;  // 0: none
  bool window_by_row = false;
};

void attention_decode(const AttentionDecodeArguments&);

}  // namespace dlcore
