// What the functions of noise check, for the host and for devices.
#pragma once

#include "../common/noise_wide.h"
#include "capi.h"

namespace dlcore::capi {

// What uniform, normal and gumbel take; false if there is nothing to fill.
bool check_noise(const dlcore_key* keys, int64_t num_keys, int64_t count, int32_t dtype, const void* out);

// What fold_in takes.
struct FoldIn {
  FoldIn(const dlcore_keys& keys, const dlcore_ints& data, int64_t count, const dlcore_key* out);

  Keys keys;
  PerRow<int64_t> data;
  int64_t key_stride() const { return keys.per_row ? 2 : 0; }
};

}  // namespace dlcore::capi
