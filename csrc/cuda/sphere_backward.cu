// The gradients of the sphere's maps.
#include "sphere_map.h"

namespace dlcore::cuda {

void sphere_map_backward(const SphereMapArguments& a, cudaStream_t stream) {
  using namespace sphere;
  switch (a.map) {
    case SphereMap::kNormalize:
      return map_rows<NormalizeBackward>(a, stream);
    case SphereMap::kProject:
      return map_rows<ProjectBackward>(a, stream);
    case SphereMap::kAngle:
      return map_rows<AngleBackward>(a, stream);
    case SphereMap::kSlerp:
      return map_rows<AlongBackward<SlerpWeights>>(a, stream);
    case SphereMap::kLog:
      return map_rows<AlongBackward<LogWeights>>(a, stream);
    case SphereMap::kExp:
      return map_rows<ExpBackward>(a, stream);
    case SphereMap::kRotate:
      return map_rows<RotateBackward>(a, stream);
    case SphereMap::kStep:
    case SphereMap::kRetract:
      return;  // forward alone
  }
}

}  // namespace dlcore::cuda
