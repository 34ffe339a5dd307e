// The bindings of guidance.
#include <optional>

#include "guidance.h"
#include "module.h"

namespace dlcore::cuda {

void bind_guidance(py::module_& m) {
  m.def("guided_step_bytes", guided_step_bytes);
  m.def("guided_step", [](const py::tuple& cond, const py::tuple& uncond, Address z,
                          const py::object& coefficients, const std::optional<int64_t>& exclude,
                          const py::object& key, Address tokens, Address workspace, Address stream) {
    GuidedStepArguments a;
    a.cond = view(cond);
    a.uncond = view(uncond);
    a.z = at<const int64_t>(z);
    a.coefficients = per_row<double>(coefficients);
    a.exclude = exclude.value_or(-1);
    a.keys = keys(key);
    a.tokens = at<int64_t>(tokens);
    guided_step(a, at<void>(workspace), stream_at(stream));
  });
}

}  // namespace dlcore::cuda
