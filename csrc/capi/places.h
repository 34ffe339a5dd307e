// Where a function of the API runs: one body serves the host and a device. A place says whose memory the
// arguments are, and runs what the body has made of them.
#pragma once

#include "capi.h"

namespace dlcore::capi {

class Host {
 public:
  static constexpr Memory memory = Memory::kHost;

  explicit Host(int32_t threads) : threads_(threads) {}

 protected:
  template <class Arguments>
  void run(void (*Kernels::*kernel)(const Arguments&), Arguments a, int64_t elements) const {
    a.threads = threads_for(threads_, elements);
    (kernels().*kernel)(a);
  }

 private:
  int32_t threads_;
};

}  // namespace dlcore::capi
