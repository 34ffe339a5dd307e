// The sphere's maps: one pass adds up a row's sums, a second one, from the cache, combines its vectors.
// Compiled once per ISA level.
#include "../common/sphere_maps.h"
#include "kernels.h"
#include "parallel.h"
#include "vectors.h"

namespace dlcore::DLCORE_ISA {
namespace {

using namespace sphere;

// A row as a map sees it: the vectors, the gradient last.
template <class T>
struct Row : Entries<T, kMostVectors> {
  double t, grad_angle;
};

template <class Map, class T>
void map_row(const Row<T>& row, T* const* outputs, float* number) {
  Floats sums[kMostSums];
  for (int k = 0; k < Map::sums; ++k) sums[k] = broadcast(0.0f);
  const auto read = [&row](auto sixteen, Floats* v) {
    for (int k = 0; k < Map::vectors; ++k) v[k] = sixteen(row.vector[k]);
  };
  each_sixteen<T>(row.columns, [&](int64_t, auto sixteen, auto) {
    Floats v[kMostVectors];
    read(sixteen, v);
    Map::add(sums, v);
  });
  double totals[kMostSums];
  for (int k = 0; k < Map::sums; ++k) totals[k] = sum(sums[k]);
  const Combination made = Map::solve(totals, row);
  if (number) *number = static_cast<float>(made.number);
  if constexpr (Map::outputs > 0) {
    each_sixteen<T>(row.columns, [&](int64_t i, auto sixteen, auto store_sixteen) {
      Floats v[kMostVectors];
      read(sixteen, v);
      Map::rebase(v, totals, made);
      for (int o = 0; o < Map::outputs; ++o) {
        if (!outputs[o]) continue;
        Floats result = v[0] * made.coefficients[o][0];
        for (int k = 1; k < Map::vectors; ++k) result = fused(v[k], made.coefficients[o][k], result);
        if (o == 0 && made.at >= i && made.at < i + kLanes) {
          float lanes[kLanes];
          store(lanes, result);
          lanes[made.at - i] += static_cast<float>(made.spike);
          result = load(lanes);
        }
        store_sixteen(outputs[o], result);
      }
    });
  }
}

template <class Map>
void map_rows(const SphereMapArguments& a) {
  parallel_for(a.inputs[0].rows, a.threads, [&](int64_t r) {
    with_dtype(a.inputs[0].dtype, [&](auto type) {
      using T = decltype(type);
      Row<T> row{{{}, a.inputs[0].columns}, a.t ? a.t[r] : 0.0, a.grad_angle ? a.grad_angle[r] : 0.0};
      const int inputs = a.grad.data ? Map::vectors - 1 : Map::vectors;
      for (int k = 0; k < inputs; ++k) row.vector[k] = a.inputs[k].row<const T>(r);
      if (a.grad.data) row.vector[inputs] = a.grad.row<const T>(r);
      T* outputs[kSphereInputs];
      for (int o = 0; o < kSphereInputs; ++o)
        outputs[o] = a.outputs[o].data ? a.outputs[o].row<T>(r) : nullptr;
      map_row<Map>(row, outputs, a.number ? a.number + r : nullptr);
    });
  });
}

}  // namespace

void sphere_map(const SphereMapArguments& a) {
  switch (a.map) {
    case SphereMap::kNormalize:
      return a.backward ? map_rows<NormalizeBackward>(a) : map_rows<Normalize>(a);
    case SphereMap::kProject:
      return a.backward ? map_rows<ProjectBackward>(a) : map_rows<Project>(a);
    case SphereMap::kAngle:
      return a.backward ? map_rows<AngleBackward>(a) : map_rows<Angle>(a);
    case SphereMap::kSlerp:
      return a.backward ? map_rows<AlongBackward<SlerpWeights>>(a) : map_rows<Along<SlerpWeights>>(a);
    case SphereMap::kLog:
      return a.backward ? map_rows<AlongBackward<LogWeights>>(a) : map_rows<Along<LogWeights>>(a);
    case SphereMap::kExp:
      return a.backward ? map_rows<ExpBackward>(a) : map_rows<Exp>(a);
    case SphereMap::kRotate:
      return a.backward ? map_rows<RotateBackward>(a) : map_rows<Rotate>(a);
    case SphereMap::kStep:
      return map_rows<Step<true>>(a);
    case SphereMap::kRetract:
      return map_rows<Step<false>>(a);
  }
}

}  // namespace dlcore::DLCORE_ISA
