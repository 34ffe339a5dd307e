// A linear head's logits: hidden · weightᵀ + bias in float32.
#include "logits.h"

#include <algorithm>
#include <cstring>

namespace dlcore::capi {
namespace {

// A tile of logits stays in the cache: 2^20 floats.
constexpr int64_t kTile = 1 << 20;

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float widened(DType dtype, uint16_t half) {
  if (dtype == DType::kBFloat16) return float_of(static_cast<uint32_t>(half) << 16);
  const float magnitude = float_of((half & 0x7FFFu) << 13);
  // 2^112 moves the exponent's bias, and makes subnormals right; infinities and NaN want the top exponent.
  const float size =
      magnitude < 0x1p-96f ? magnitude * 0x1p112f : float_of((half & 0x7FFFu) << 13 | 0x7F800000u);
  return half & 0x8000u ? -size : size;
}

// `count` numbers as floats.
void widen(DType dtype, const char* from, int64_t count, float* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, sizeof half);
    to[i] = widened(dtype, half);
  }
}

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
  if (dense()) {
    View v = values_;
    v.data += first * size_of(v.dtype);
    v.columns = width;
    return v;
  }
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

}  // namespace dlcore::capi
