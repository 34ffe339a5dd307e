// The library itself: version, errors, the choice of code, and the checks that families share.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>
#include <thread>

#include "capi.h"

namespace dlcore::capi {
namespace {

// Fewer elements than this are not worth waking another thread.
constexpr int64_t kSerial = 1 << 15;

thread_local char last_error[512] = "";

void tell(const char* function, const char* message) {
  std::snprintf(last_error, sizeof last_error, "%s: %s", function, message);
}

[[noreturn]] void refuse_capability(const char* name, const char* got) {
  refuse(DLCORE_UNSUPPORTED, name,
         " must be one of avx512, avx2, baseline, built and supported by this machine, got ", got);
}

const char* name_of(int32_t dtype) {
  const char* names[] = {"float32", "bfloat16", "float16", "float64"};
  return dtype >= 0 && dtype <= DLCORE_FLOAT64 ? names[dtype] : "an unknown dtype";
}

}  // namespace

dlcore_status status_of_exception(const char* function) noexcept {
  try {
    throw;
  } catch (const Refusal& refusal) {
    tell(function, refusal.message.c_str());
    return refusal.status;
  } catch (const std::bad_alloc&) {
    tell(function, "out of memory");
    return DLCORE_OUT_OF_MEMORY;
  } catch (const std::length_error&) {
    tell(function, "out of memory");
    return DLCORE_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    tell(function, error.what());
  } catch (...) {
    tell(function, "an unknown error");
  }
  return DLCORE_INTERNAL_ERROR;
}

void use_asked_capability() {
  static const char* const asked = std::getenv("DLCORE_CPU_CAPABILITY");
  static const bool to_be_had = !asked || !*asked || choose_kernels(asked);
  if (!to_be_had) refuse_capability("DLCORE_CPU_CAPABILITY", asked);
}

void at_least(const char* name, int64_t value, int64_t least, dlcore_status status) {
  if (value < least) refuse(status, name, " must be at least ", least, ", got ", value);
}

void one_of(const char* name, int32_t value, int32_t count) {
  if (value < 0 || value >= count)
    refuse(DLCORE_INVALID_VALUE, name, " must lie in [0, ", count - 1, "], got ", value);
}

void in_range(const char* name, double value, double low, double high) {
  if (!(value >= low && value <= high))
    refuse(DLCORE_INVALID_VALUE, name, " must lie in [", low, ", ", high, "], got ", value);
}

int64_t product(const char* name, std::initializer_list<int64_t> sizes) {
  int64_t all = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(all, size, &all) || all > std::numeric_limits<int64_t>::max() / 16)
      refuse(DLCORE_INVALID_SHAPE, name, " is too large for any memory");
  return all;
}

int threads_for(int32_t threads, int64_t elements) {
  at_least("threads", threads, 0, DLCORE_INVALID_VALUE);
  if (elements < kSerial) return 1;
  static const int all = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return threads == 0 ? all : threads;
}

View view(const char* name, const dlcore_matrix& m) {
  const auto check = [name](const char* member, int64_t value, int64_t least) {
    if (value < least)
      refuse(DLCORE_INVALID_SHAPE, name, member, " must be at least ", least, ", got ", value);
  };
  if (m.dtype < DLCORE_FLOAT32 || m.dtype > DLCORE_FLOAT16)
    refuse(DLCORE_INVALID_DTYPE, name,
           ".dtype must be DLCORE_FLOAT32, DLCORE_BFLOAT16 or DLCORE_FLOAT16, got ", m.dtype, " (",
           name_of(m.dtype), ")");
  check(".rows", m.rows, 0);
  check(".columns", m.columns, 1);
  const int64_t stride = m.row_stride == 0 ? m.columns : m.row_stride;
  check(".row_stride", stride, m.columns);
  product(name, {m.rows, stride});
  if (!m.data && m.rows > 0) refuse(DLCORE_NULL_POINTER, name, ".data must not be NULL");
  View v = result(const_cast<void*>(m.data), static_cast<DType>(m.dtype), m.rows, m.columns);
  v.lead_stride[0] = stride;
  return v;
}

View view(const char* name, const dlcore_matrix* matrix) {
  needed(name, matrix);
  return view(name, *matrix);
}

View view_like(const char* name, const dlcore_matrix* matrix, const View& like) {
  const View v = view(name, matrix);
  if (v.rows != like.rows || v.columns != like.columns)
    refuse(DLCORE_INVALID_SHAPE, name, " must be (", like.rows, ", ", like.columns, "), got (", v.rows, ", ",
           v.columns, ")");
  return v;
}

View result(void* out, DType dtype, int64_t rows, int64_t columns) {
  View v;
  v.data = static_cast<char*>(out);
  v.dtype = dtype;
  v.lead_dims = 1;
  v.lead_size[0] = v.rows = rows;
  v.lead_stride[0] = v.columns = columns;
  return v;
}

void token_ids(const char* name, const int64_t* ids, int64_t count, int64_t vocab, int64_t low) {
  if (!ids) return;
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < low || ids[i] >= vocab)
      refuse(DLCORE_INVALID_VALUE, name, " must lie in [", low, ", ", vocab, "), got ", ids[i]);
}

Keys keys(const dlcore_keys& k, int64_t rows) {
  if (k.stride != 0 && k.stride != 1)
    refuse(DLCORE_INVALID_SHAPE, "keys.stride must be 0 or 1, got ", k.stride);
  needed("keys.data", k.data, rows);
  static_assert(sizeof(dlcore_key) == 2 * sizeof(int64_t));
  return {reinterpret_cast<const int64_t*>(k.data), k.stride == 1};
}

}  // namespace dlcore::capi

using namespace dlcore;

#define DLCORE_TEXT(x) #x
#define DLCORE_NUMBER(x) DLCORE_TEXT(x)

const char* dlcore_version(void) {
  return DLCORE_NUMBER(DLCORE_VERSION_MAJOR) "." DLCORE_NUMBER(DLCORE_VERSION_MINOR) "." DLCORE_NUMBER(
      DLCORE_VERSION_PATCH);
}

const char* dlcore_last_error(void) { return capi::last_error; }

const char* dlcore_cpu_capability(void) {
  capi::guarded(__func__, [] {});
  return kernels().name;
}

dlcore_status dlcore_choose_cpu_capability(const char* name) {
  return capi::guarded(__func__, [name] {
    capi::needed("name", name);
    if (!choose_kernels(name)) capi::refuse_capability("name", name);
  });
}
