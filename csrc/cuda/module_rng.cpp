// The bindings of rng.
#include "module.h"
#include "rng.h"

namespace dlcore::cuda {

void bind_rng(py::module_& m) {
  m.def("fill_noise", [](int noise, Address keys, int64_t key_count, int64_t count, bool wide, Address out,
                         Address stream) {
    fill_noise(static_cast<Noise>(noise), at<int64_t>(keys), key_count, count, wide, at<void>(out),
               stream_at(stream));
  });
  m.def("fold_in", [](Address keys, int64_t key_stride, Address data, int64_t data_stride, int64_t count,
                      Address out, Address stream) {
    fold_in(at<int64_t>(keys), key_stride, at<int64_t>(data), data_stride, count, at<int64_t>(out),
            stream_at(stream));
  });
}

}  // namespace dlcore::cuda
