// The sphere's maps.
#include "sphere_map.h"

namespace dlcore::cuda {

void sphere_map_backward(const SphereMapArguments&, cudaStream_t);

void sphere_map(const SphereMapArguments& a, cudaStream_t stream) {
  using namespace sphere;
  if (a.backward) return sphere_map_backward(a, stream);
  switch (a.map) {
    case SphereMap::kNormalize:
      return map_rows<Normalize>(a, stream);
    case SphereMap::kProject:
      return map_rows<Project>(a, stream);
    case SphereMap::kAngle:
      return map_rows<Angle>(a, stream);
    case SphereMap::kSlerp:
      return map_rows<Along<SlerpWeights>>(a, stream);
    case SphereMap::kLog:
      return map_rows<Along<LogWeights>>(a, stream);
    case SphereMap::kExp:
      return map_rows<Exp>(a, stream);
    case SphereMap::kRotate:
      return map_rows<Rotate>(a, stream);
    case SphereMap::kStep:
      return map_rows<Step<true>>(a, stream);
    case SphereMap::kRetract:
      return map_rows<Step<false>>(a, stream);
  }
}

}  // namespace dlcore::cuda
