// Noise.
#include "capi.h"

namespace dlcore::capi {
namespace {

// Checks what uniform, normal and gumbel share; calls fill(keys, wide, threads) if there is anything to fill.
template <class Fill>
void fill_with(const dlcore_key* keys, int64_t num_keys, int64_t count, int32_t dtype, void* out,
               int32_t threads, Fill fill) {
  if (dtype != DLCORE_FLOAT32 && dtype != DLCORE_FLOAT64)
    refuse(DLCORE_INVALID_DTYPE, "dtype must be DLCORE_FLOAT32 or DLCORE_FLOAT64, got ", dtype);
  at_least("num_keys", num_keys, 0);
  at_least("count", count, 0);
  const int64_t numbers = product("out", {num_keys, count});
  // One draw costs about as much as reading sixteen floats.
  const int used = threads_for(threads, 16 * numbers);
  if (numbers == 0) return;
  needed("keys", keys);
  needed("out", out);
  fill(&keys->seed, dtype == DLCORE_FLOAT64, used);
}

void fill_plain(Noise noise, const dlcore_key* keys, int64_t num_keys, int64_t count, int32_t dtype,
                void* out, int32_t threads) {
  fill_with(keys, num_keys, count, dtype, out, threads, [&](const int64_t* words, bool wide, int used) {
    if (wide)
      fill_noise(noise, words, num_keys, count, static_cast<double*>(out), used);
    else
      fill_noise(noise, words, num_keys, count, static_cast<float*>(out), used);
  });
}

}  // namespace
}  // namespace dlcore::capi

using namespace dlcore::capi;

dlcore_status dlcore_rng_fold_in(dlcore_keys keys, dlcore_ints data, int64_t count, dlcore_key* out) {
  return guarded(__func__, [&] {
    at_least("count", count, 0);
    product("out", {count, 2});
    const dlcore::Keys from = dlcore::capi::keys(keys, count);
    needed("data.data", data.data, count);
    const auto values = per_row("data", data);
    needed("out", out, count);
    if (count > 0)
      dlcore::fold_in_all(from.data, from.per_row ? 2 : 0, values.data, values.stride, count, &out->seed);
  });
}

dlcore_status dlcore_rng_uniform(const dlcore_key* keys, int64_t num_keys, int64_t count, int32_t dtype,
                                 void* out, int32_t threads) {
  return guarded(__func__,
                 [&] { fill_plain(dlcore::Noise::kUniform, keys, num_keys, count, dtype, out, threads); });
}

dlcore_status dlcore_rng_gumbel(const dlcore_key* keys, int64_t num_keys, int64_t count, int32_t dtype,
                                void* out, int32_t threads) {
  return guarded(__func__,
                 [&] { fill_plain(dlcore::Noise::kGumbel, keys, num_keys, count, dtype, out, threads); });
}

dlcore_status dlcore_rng_normal(const dlcore_key* keys, int64_t num_keys, int64_t count, int32_t dtype,
                                void* out, int32_t threads) {
  return guarded(__func__, [&] {
    fill_with(keys, num_keys, count, dtype, out, threads, [&](const int64_t* words, bool wide, int used) {
      dlcore::NormalArguments a;
      a.keys = words;
      a.key_count = num_keys;
      a.count = count;
      a.wide = wide;
      a.out = out;
      a.threads = used;
      dlcore::kernels().normal(a);
    });
  });
}
