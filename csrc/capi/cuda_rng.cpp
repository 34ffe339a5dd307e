// Noise on CUDA devices.
#include "../cuda/rng.h"
#include "cuda.h"
#include "rng.h"

namespace dlcore::capi {
namespace {

void fill(Noise noise, const dlcore_key* keys, int64_t num_keys, int64_t count, int32_t dtype, void* out,
          void* stream) {
  if (check_noise(keys, num_keys, count, dtype, out))
    cuda::fill_noise(noise, &keys->seed, num_keys, count, dtype == DLCORE_FLOAT64, out, stream_of(stream));
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore;
using namespace dlcore::capi;

dlcore_status dlcore_cuda_rng_fold_in(dlcore_keys keys, dlcore_ints data, int64_t count, dlcore_key* out,
                                      void* stream) {
  return queued(__func__, [&] {
    const FoldIn a(keys, data, count, out);
    if (count > 0)
      cuda::fold_in(a.keys.data, a.key_stride(), a.data.data, a.data.stride, count, &out->seed,
                    stream_of(stream));
  });
}

dlcore_status dlcore_cuda_rng_uniform(const dlcore_key* keys, int64_t num_keys, int64_t count, int32_t dtype,
                                      void* out, void* stream) {
  return queued(__func__, [&] { fill(Noise::kUniform, keys, num_keys, count, dtype, out, stream); });
}

dlcore_status dlcore_cuda_rng_normal(const dlcore_key* keys, int64_t num_keys, int64_t count, int32_t dtype,
                                     void* out, void* stream) {
  return queued(__func__, [&] { fill(Noise::kNormal, keys, num_keys, count, dtype, out, stream); });
}

dlcore_status dlcore_cuda_rng_gumbel(const dlcore_key* keys, int64_t num_keys, int64_t count, int32_t dtype,
                                     void* out, void* stream) {
  return queued(__func__, [&] { fill(Noise::kGumbel, keys, num_keys, count, dtype, out, stream); });
}
