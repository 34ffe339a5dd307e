// A linear head's logits: hidden · weightᵀ + bias in float32.
#include "logits.h"

#include <algorithm>

#include "halves.h"

namespace dlcore::capi {
namespace {

// A tile of logits stays in the cache: 2^20 floats.
constexpr int64_t kTile = 1 << 20;

}  // namespace

Logits::Logits(const char* name, const dlcore_logits& logits, int32_t threads) : threads_(threads) {
  threads_for(threads, 0);
  values_ = view((std::string(name) + ".values").c_str(), logits.values);
  if (!logits.weight.data && logits.weight.rows == 0) {
    if (logits.bias) refuse(DLCORE_INVALID_VALUE, name, ".bias needs a weight");
    return;
  }
  weight_ = view((std::string(name) + ".weight").c_str(), logits.weight);
  if (weight_.rows < 1)
    refuse(DLCORE_INVALID_SHAPE, name, ".weight.rows must be at least 1, got ", weight_.rows);
  if (weight_.dtype != values_.dtype)
    refuse(DLCORE_INVALID_DTYPE, name, ".weight.dtype must be that of the values, ", logits.values.dtype,
           ", got ", logits.weight.dtype);
  if (weight_.columns != values_.columns)
    refuse(DLCORE_INVALID_SHAPE, name, ".weight.columns must be those of the values, ", values_.columns,
           ", got ", weight_.columns);
  product(name, {rows(), vocab()});
  hidden_.resize(static_cast<size_t>(rows() * values_.columns));
  for (int64_t r = 0; r < rows(); ++r)
    widen(values_.dtype, values_.data + r * values_.lead_stride[0] * size_of(values_.dtype), values_.columns,
          hidden_.data() + r * values_.columns);
  if (logits.bias) {
    bias_.resize(static_cast<size_t>(vocab()));
    widen(values_.dtype, static_cast<const char*>(logits.bias), vocab(), bias_.data());
  }
  tile_ = room<float>(rows() * std::min(tile_width(), vocab()));
}

int64_t Logits::tile_width() const {
  return std::max(kGroup, kTile / std::max<int64_t>(rows(), 1) / kGroup * kGroup);
}

View Logits::tile(int64_t first, int64_t width, float softcap) const {
  width = std::min(width, vocab() - first);
  if (dense()) return columns_of(values_, first, width);
  const View out = result(tile_.get(), DType::kFloat32, rows(), width);
  MatmulArguments m;
  m.a = hidden_.data();
  m.a_stride = m.depth = values_.columns;
  m.b = weight_.data + first * weight_.lead_stride[0] * size_of(weight_.dtype);
  m.b_dtype = weight_.dtype;
  m.b_stride = weight_.lead_stride[0];
  m.b_by_column = true;
  m.bias = bias_.empty() ? nullptr : bias_.data() + first;
  m.out = tile_.get();
  m.out_stride = m.columns = width;
  m.rows = rows();
  m.softcap = softcap;
  m.threads = threads(rows() * m.depth / 16 * width);
  kernels().matmul(m);
  return out;
}

View rows_of(const View& v, int64_t first, int64_t count) {
  View r = v;
  r.data += first * v.lead_stride[0] * size_of(v.dtype);
  r.rows = r.lead_size[0] = count;
  return r;
}

View columns_of(const View& v, int64_t first, int64_t count) {
  View r = v;
  r.data += first * size_of(v.dtype);
  r.columns = count;
  return r;
}

void Logits::multiply(const View& a, Order a_order, const View& b, Order b_order, float* out,
                      bool add) const {
  MatmulArguments m;
  m.a = a.row<const float>(0);
  m.a_stride = a.lead_stride[0];
  m.a_by_column = a_order == Order::kTransposed;
  m.rows = m.a_by_column ? a.columns : a.rows;
  m.depth = m.a_by_column ? a.rows : a.columns;
  m.b = b.data;
  m.b_dtype = b.dtype;
  m.b_stride = b.lead_stride[0];
  m.b_by_column = b_order == Order::kTransposed;
  m.out = out;
  m.out_stride = m.columns = m.b_by_column ? b.rows : b.columns;
  m.add = add;
  m.threads = threads(m.rows * m.depth / 16 * m.columns);
  kernels().matmul(m);
}

}  // namespace dlcore::capi
