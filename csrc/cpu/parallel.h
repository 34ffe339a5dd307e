// Parallel loops in the OpenMP pool that the process already has (torch's), so that no second pool competes
// for the cores; plain threads where none is loaded.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dlcore {

using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);

// Calls function on disjoint ranges that cover [0, count), on up to `threads` threads.
void parallel_ranges(RangeFunction function, void* context, int64_t count, int threads);

// "libgomp", "libomp" ... as loaded, or "std::thread".
const char* parallel_runtime();

template <class Body>
void parallel_ranges(int64_t count, int threads, Body&& body) {
  parallel_ranges([](void* context, int64_t begin,
                     int64_t end) { (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end); },
                  &body, count, threads);
}

template <class Body>
void parallel_for(int64_t count, int threads, Body&& body) {
  parallel_ranges(count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

}  // namespace dlcore
