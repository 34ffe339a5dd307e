// What the families of the C API share: errors as statuses, and arguments checked into the kernels' own.
#pragma once

#include <algorithm>
#include <limits>
#include <locale>
#include <memory>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "../cpu/kernels.h"
#include "../include/dlcore/dlcore.h"

namespace dlcore::capi {

// An argument that is not taken: "name must be ..., got ...".
struct Refusal {
  dlcore_status status;
  std::string message;
};

template <class... Parts>
[[noreturn]] void refuse(dlcore_status status, const Parts&... parts) {
  std::ostringstream message;
  message.imbue(std::locale::classic());
  message.precision(9);
  (message << ... << parts);
  throw Refusal{status, message.str()};
}

// The status of the exception in flight; its message becomes this thread's last error.
dlcore_status status_of_exception(const char* function) noexcept;

// Chooses the code that DLCORE_CPU_CAPABILITY names, on the first call.
void use_asked_capability();

// Runs the body of a function of the API; what it throws becomes its status.
template <class Body>
dlcore_status guarded(const char* function, Body body) noexcept {
  try {
    use_asked_capability();
    body();
    return DLCORE_OK;
  } catch (...) {
    return status_of_exception(function);
  }
}

// --- Checks ---

// Where arguments lie: what a device has, the host cannot check by value.
enum class Memory { kHost, kDevice };

constexpr double kLargest = std::numeric_limits<float>::max();
constexpr double kSmallest = std::numeric_limits<float>::min();
constexpr double kMost = std::numeric_limits<double>::max();

template <class T>
void needed(const char* name, const T* p, int64_t count = 1) {
  if (!p && count > 0) refuse(DLCORE_NULL_POINTER, name, " must not be NULL");
}

template <class T>
const T& pointed(const char* name, const T* p) {
  needed(name, p);
  return *p;
}

void at_least(const char* name, int64_t value, int64_t least, dlcore_status status = DLCORE_INVALID_SHAPE);
void one_of(const char* name, int32_t value, int32_t count);
void in_range(const char* name, double value, double low, double high);

// Sizes whose product is no int64, or no memory's size in bytes, are refused. Returns it.
int64_t product(const char* name, std::initializer_list<int64_t> sizes);

// How many threads to use for a call that reads so many elements.
int threads_for(int32_t threads, int64_t elements);

// (rows, columns) of float32, bfloat16 or float16.
View view(const char* name, const dlcore_matrix& matrix);
View view(const char* name, const dlcore_matrix* matrix);
// The same, with the rows and columns of another.
View view_like(const char* name, const dlcore_matrix* matrix, const View& like);
// A result without gaps.
View result(void* out, DType dtype, int64_t rows, int64_t columns);

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A parameter per row; none if its data is null.
template <class Numbers>
auto per_row(const char* name, const Numbers& numbers) {
  if (numbers.data && numbers.stride < 0)
    refuse(DLCORE_INVALID_SHAPE, name, ".stride must be at least 0, got ", numbers.stride);
  return PerRow<std::remove_const_t<std::remove_pointer_t<decltype(numbers.data)>>>{numbers.data,
                                                                                    numbers.stride};
}

// How many different values a parameter has.
template <class T>
int64_t values(const PerRow<T>& numbers, int64_t rows) {
  return !numbers ? 0 : numbers.stride == 0 ? std::min<int64_t>(rows, 1) : rows;
}

// The same with every value in [low, high]; NaN never is.
template <class Numbers>
auto per_row(const char* name, const Numbers& numbers, int64_t rows, double low, double high,
             Memory memory = Memory::kHost) {
  const auto checked = per_row(name, numbers);
  if (memory == Memory::kDevice) return checked;
  for (int64_t r = 0; r < values(checked, rows); ++r)
    in_range(name, static_cast<double>(checked[r]), low, high);
  return checked;
}

template <class Numbers>
auto needed_per_row(const char* name, const Numbers& numbers, int64_t rows, double low, double high,
                    Memory memory = Memory::kHost) {
  needed(name, numbers.data, rows);
  return per_row(name, numbers, rows, low, high, memory);
}

// Token ids (count) in [low, vocab); null if they may be.
void token_ids(const char* name, const int64_t* ids, int64_t count, int64_t vocab, int64_t low = 0);

Keys keys(const dlcore_keys& keys, int64_t rows);

// Room for results of a kernel that are not kept; their values are not set.
template <class T>
std::unique_ptr<T[]> room(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);
}

}  // namespace dlcore::capi
