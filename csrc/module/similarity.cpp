// The bindings of similarity.
#include "module.h"

namespace dlcore {

void bind_similarity(py::module_& m) {
  m.def("row_cosine", [](const py::tuple& fresh, const py::tuple& cached, int64_t cached_rows,
                         Address positions, const py::object& pages, Address out, int threads) {
    CosineArguments a;
    a.fresh = heads(fresh);
    a.cached = heads(cached);
    const auto shape = fresh[2].cast<std::array<int64_t, 4>>();
    a.batch = shape[0], a.rows = shape[1], a.heads = shape[2], a.columns = shape[3];
    a.cached_rows = cached_rows;
    a.positions = at<const int64_t>(positions);
    if (!pages.is_none()) {
      const auto table = pages.cast<std::pair<Address, int64_t>>();
      const auto page_size = cached[2].cast<std::array<int64_t, 4>>()[1];
      a.pages = {at<const int32_t>(table.first), table.second, page_size};
    }
    a.out = at<float>(out);
    run(kernels().row_cosine, a, threads);
  });
}

}  // namespace dlcore
