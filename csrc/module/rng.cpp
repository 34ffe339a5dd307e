// The bindings of rng.
#include "../cpu/rng.h"

#include <vector>

#include "module.h"

namespace dlcore {

void bind_rng(py::module_& m) {
  m.def("fill_noise",
        [](int noise, Address keys, int64_t key_count, int64_t count, bool wide, Address out, int threads) {
          py::gil_scoped_release release;
          const auto kind = static_cast<Noise>(noise);
          if (wide)
            fill_noise(kind, at<int64_t>(keys), key_count, count, at<double>(out), threads);
          else
            fill_noise(kind, at<int64_t>(keys), key_count, count, at<float>(out), threads);
        });
  m.def("fill_normal",
        [](Address keys, int64_t key_count, int64_t count, bool wide, Address out, int threads) {
          NormalArguments a;
          a.keys = at<const int64_t>(keys);
          a.key_count = key_count;
          a.count = count;
          a.wide = wide;
          a.out = at<void>(out);
          run(kernels().normal, a, threads);
        });
  m.def("fold_in",
        [](Address keys, int64_t key_stride, Address data, int64_t data_stride, int64_t count, Address out) {
          fold_in_all(at<int64_t>(keys), key_stride, at<int64_t>(data), data_stride, count, at<int64_t>(out));
        });
  m.def("philox", [](std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
    const Block b = philox({{c[0], c[1], c[2], c[3]}}, k[0], k[1]);
    return std::array<uint32_t, 4>{b.word[0], b.word[1], b.word[2], b.word[3]};
  });
  m.def("gumbel_of_bits", [](const std::vector<uint32_t>& high, const std::vector<uint32_t>& low) {
    if (high.size() != low.size() || high.size() % 16 != 0)
      throw py::value_error("gumbel_of_bits: as many high words as low ones, a multiple of 16");
    std::vector<float> out(high.size());
    kernels().gumbel(high.data(), low.data(), static_cast<int64_t>(high.size()), out.data());
    return out;
  });
}

}  // namespace dlcore
