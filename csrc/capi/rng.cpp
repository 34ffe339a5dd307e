// Noise on the host.
#include "rng.h"

namespace dlcore::capi {
namespace {

// One draw costs about as much as reading sixteen floats.
int used_threads(int32_t threads, int64_t num_keys, int64_t count) {
  return threads_for(threads, 16 * num_keys * count);
}

void fill_plain(Noise noise, const dlcore_key* keys, int64_t num_keys, int64_t count, int32_t dtype,
                void* out, int32_t threads) {
  const bool any = check_noise(keys, num_keys, count, dtype, out);
  const int used = used_threads(threads, num_keys, count);
  if (!any) return;
  if (dtype == DLCORE_FLOAT64)
    fill_noise(noise, &keys->seed, num_keys, count, static_cast<double*>(out), used);
  else
    fill_noise(noise, &keys->seed, num_keys, count, static_cast<float*>(out), used);
}

void fill_normal(const dlcore_key* keys, int64_t num_keys, int64_t count, int32_t dtype, void* out,
                 int32_t threads) {
  const bool any = check_noise(keys, num_keys, count, dtype, out);
  NormalArguments a;
  a.threads = used_threads(threads, num_keys, count);
  if (!any) return;
  a.keys = &keys->seed;
  a.key_count = num_keys;
  a.count = count;
  a.wide = dtype == DLCORE_FLOAT64;
  a.out = out;
  kernels().normal(a);
}

}  // namespace

bool check_noise(const dlcore_key* keys, int64_t num_keys, int64_t count, int32_t dtype, const void* out) {
  if (dtype != DLCORE_FLOAT32 && dtype != DLCORE_FLOAT64)
    refuse(DLCORE_INVALID_DTYPE, "dtype must be DLCORE_FLOAT32 or DLCORE_FLOAT64, got ", dtype);
  at_least("num_keys", num_keys, 0);
  at_least("count", count, 0);
  const int64_t numbers = product("out", {num_keys, count});
  needed("keys", keys, numbers);
  needed("out", out, numbers);
  return numbers > 0;
}

FoldIn::FoldIn(const dlcore_keys& from, const dlcore_ints& with, int64_t count, const dlcore_key* out) {
  at_least("count", count, 0);
  product("out", {count, 2});
  keys = capi::keys(from, count);
  needed("data.data", with.data, count);
  data = per_row("data", with);
  needed("out", out, count);
}

}  // namespace dlcore::capi

using namespace dlcore::capi;

dlcore_status dlcore_rng_fold_in(dlcore_keys keys, dlcore_ints data, int64_t count, dlcore_key* out) {
  return guarded(__func__, [&] {
    const FoldIn a(keys, data, count, out);
    if (count > 0)
      dlcore::fold_in_all(a.keys.data, a.key_stride(), a.data.data, a.data.stride, count, &out->seed);
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
  return guarded(__func__, [&] { fill_normal(keys, num_keys, count, dtype, out, threads); });
}
