// Maps of the unit sphere and their gradients. Every result is a combination of the arguments whose
// coefficients come from their inner products: one pass adds these up, a second one, from the cache,
// combines. Compiled once per ISA level.
#include "../common/sphere.h"

#include <cmath>

#include "kernels.h"
#include "parallel.h"
#include "vectors.h"

namespace dlcore::DLCORE_ISA {
namespace {

// Vectors closer than this to a pair of antipodes have no direction of their own from one to the other.
constexpr double kAntipodal = 1e-5;
constexpr int kMostVectors = 4, kMostSums = 8;

// What a map makes of a row's sums: coefficients[output][vector], a number, and one entry of the first output
// that gets a term of its own. The first vector counts times `factor` where a map rebases it.
struct Combination {
  float coefficients[kSphereInputs][kMostVectors] = {};
  double number = 0;
  int64_t at = -1;
  double spike = 0;
  float factor = 1;

  template <class... C>
  void set(int output, C... c) {
    int i = 0;
    ((coefficients[output][i++] = static_cast<float>(c)), ...);
  }
};

// A row as a map sees it: the vectors, the gradient last.
template <class T>
struct Row {
  const T* vector[kMostVectors];
  int64_t columns;
  double t, grad_angle;
};

// Two unit vectors x and y: the smaller one of y - x and y + x, e = y - σx, keeps what their angle leaves,
// and y's part across x is e - share·x.
struct Pair {
  double near, far, square, e_x, sigma, angle, sine, cosine, inner, share;
  bool antipodal;

  // Sums |y - x|², |y + x|², <y - x, x>, <y + x, x>, |x|².
  explicit Pair(const double* s)
      : near(s[0]),
        far(s[1]),
        square(s[4]),
        e_x(near <= far ? s[2] : s[3]),
        sigma(near <= far ? 1 : -1),
        angle(2 * std::atan2(std::sqrt(near), std::sqrt(far))),
        sine(over(2 * std::sqrt(near * far), near + far)),
        cosine(over(far - near, near + far)),
        inner((far - near) / 4),
        share(over(e_x, square)),
        antipodal(far < kAntipodal * kAntipodal * near) {}

  static void add(Floats* sums, const Floats* v) {
    const Floats minus = v[1] - v[0], plus = v[1] + v[0];
    sums[0] = fused(minus, minus, sums[0]);
    sums[1] = fused(plus, plus, sums[1]);
    sums[2] = fused(minus, v[0], sums[2]);
    sums[3] = fused(plus, v[0], sums[3]);
    sums[4] = fused(v[0], v[0], sums[4]);
  }
  static void add_gradient(Floats* sums, const Floats* v) {
    sums[5] = fused(v[2], v[0], sums[5]);
    sums[6] = fused(v[2], v[1] - v[0], sums[6]);
    sums[7] = fused(v[2], v[1] + v[0], sums[7]);
  }
  // y becomes e.
  static void rebase(Floats* v, const double* s) { v[1] = s[0] <= s[1] ? v[1] - v[0] : v[1] + v[0]; }

  // angle / sine.
  double stretch() const { return angle < 1e-4 ? 1 + angle * angle / 6 : angle / sine; }
  // The angle's gradient in x is scale·(e + tilt·x), in y -scale·(cosine·e - |tilt|·x), for a scale < 0.
  double tilt() const { return sigma * 2 * over(sigma > 0 ? near : far, near + far); }
};

// a·x + b·(y across x), and a'/sine, b'/sine for the derivatives in the angle.
struct Weights {
  double a, b, a1, b1;
};

Weights slerp_weights(const Pair& p, double t) {
  const double w = p.angle, turned = t * w, square = w * w;
  const double b = w < 1e-4 ? t * (1 + square * (1 - t * t) / 6) : std::sin(turned) / p.sine;
  const double cubic = (1 - t * t) / 3, quintic = (7 - 10 * t * t + 3 * t * t * t * t) / 90;
  const double b1 =
      w < 5e-2 ? t * (cubic + quintic * square) * (1 + square / 6)
               : (t * std::cos(turned) * p.sine - std::sin(turned) * p.cosine) / (p.sine * p.sine * p.sine);
  return {std::cos(turned), b, -t * b, b1};
}

Weights log_weights(const Pair& p, double) {
  const double w = p.angle, square = w * w;
  const double b1 = w < 5e-2 ? (1.0 / 3 + square * 7 / 90) * (1 + square / 6)
                             : (p.sine - w * p.cosine) / (p.sine * p.sine * p.sine);
  return {0, p.stretch(), 0, b1};
}

using WeightsOf = Weights (*)(const Pair&, double);

// From x towards y: slerp and the logarithm.
template <WeightsOf weights>
struct Along {
  static constexpr int vectors = 2, outputs = 1, sums = 5;
  static void add(Floats* s, const Floats* v) { Pair::add(s, v); }
  static void rebase(Floats* v, const double* s, const Combination&) { Pair::rebase(v, s); }

  template <class T>
  static Combination solve(const double* s, const Row<T>& row) {
    Combination r;
    const Pair p(s);
    if (p.antipodal) {
      // Any direction is a shortest way.
      const Perpendicular h(row.vector[0], row.columns, p.square);
      const bool log = weights == log_weights;
      const double across = log ? p.angle : std::sin(row.t * p.angle);
      r.set(0, (log ? 0 : std::cos(row.t * p.angle)) + across * h.along);
      r.at = h.at;
      r.spike = across * h.spike;
      return r;
    }
    const Weights w = weights(p, row.t);
    r.set(0, w.a - w.b * p.share, w.b);
    return r;
  }
};

template <WeightsOf weights>
struct AlongBackward {
  static constexpr int vectors = 3, outputs = 2, sums = 8;
  static void add(Floats* s, const Floats* v) {
    Pair::add(s, v);
    Pair::add_gradient(s, v);
  }
  static void rebase(Floats* v, const double* s, const Combination&) { Pair::rebase(v, s); }

  template <class T>
  static Combination solve(const double* s, const Row<T>& row) {
    Combination r;
    const Pair p(s);
    const double g_x = s[5], turned = row.t * p.angle;
    const bool log = weights == log_weights;
    if (p.antipodal) {
      // The direction taken there is held fixed.
      const Perpendicular h(row.vector[0], row.columns, p.square);
      const double g_h = h.along * g_x + h.spike * scalar(row.vector[2][h.at]);
      r.set(0, 0, 0, log ? 0 : std::cos(turned));
      r.number = p.angle * (std::cos(turned) * g_h - std::sin(turned) * g_x);
      return r;
    }
    const Weights w = weights(p, row.t);
    const double g_across = (p.sigma > 0 ? s[6] : s[7]) - p.share * g_x;
    const double pull = over(4 * (w.a1 * g_x + w.b1 * g_across), p.near + p.far), tilt = p.tilt();
    const double part = w.b * over(g_x, p.square), inner = over(p.inner, p.square);
    r.set(0, -part * (p.sigma - 2 * inner) - pull * tilt, -part - pull, w.a - w.b * inner);
    r.set(1, -part - pull * std::fabs(tilt), pull * p.cosine, w.b);
    r.number = p.stretch() * std::cos(turned) * g_across - p.angle * std::sin(turned) * g_x;
    return r;
  }
};

struct Angle {
  static constexpr int vectors = 2, outputs = 0, sums = 5;
  static void add(Floats* s, const Floats* v) { Pair::add(s, v); }
  static void rebase(Floats*, const double*, const Combination&) {}
  template <class T>
  static Combination solve(const double* s, const Row<T>&) {
    Combination r;
    r.number = Pair(s).angle;
    return r;
  }
};

struct AngleBackward {
  static constexpr int vectors = 2, outputs = 2, sums = 5;
  static void add(Floats* s, const Floats* v) { Pair::add(s, v); }
  static void rebase(Floats* v, const double* s, const Combination&) { Pair::rebase(v, s); }
  template <class T>
  static Combination solve(const double* s, const Row<T>& row) {
    Combination r;
    const Pair p(s);
    if (p.antipodal) return r;
    const double scale = over(2 * row.grad_angle, std::sqrt(p.near * p.far)), tilt = p.tilt();
    r.set(0, -scale * tilt, -scale);
    r.set(1, -scale * std::fabs(tilt), scale * p.cosine);
    return r;
  }
};

struct Exp {
  static constexpr int vectors = 2, outputs = 1, sums = 1;
  static void add(Floats* s, const Floats* v) { s[0] = fused(v[1], v[1], s[0]); }
  static void rebase(Floats*, const double*, const Combination&) {}
  static double sinc(double n) { return n < 1e-4 ? 1 - n * n / 6 : std::sin(n) / n; }
  template <class T>
  static Combination solve(const double* s, const Row<T>&) {
    Combination r;
    const double n = std::sqrt(s[0]);
    r.set(0, std::cos(n), sinc(n));
    return r;
  }
};

struct ExpBackward {
  static constexpr int vectors = 3, outputs = 2, sums = 3;
  static void add(Floats* s, const Floats* v) {
    Exp::add(s, v);
    s[1] = fused(v[2], v[0], s[1]);
    s[2] = fused(v[2], v[1], s[2]);
  }
  static void rebase(Floats*, const double*, const Combination&) {}
  template <class T>
  static Combination solve(const double* s, const Row<T>&) {
    Combination r;
    const double n = std::sqrt(s[0]), sinc = Exp::sinc(n);
    const double slope = n < 1e-1 ? s[0] / 30 - 1.0 / 3 : (std::cos(n) - sinc) / s[0];
    r.set(0, 0, 0, std::cos(n));
    r.set(1, 0, slope * s[2] - sinc * s[1], sinc);
    return r;
  }
};

// x moved by t·v, along the great circle or straight on, and back to length 1.
template <bool exponential>
struct Step {
  static constexpr int vectors = 2, outputs = 1, sums = 3;
  static void add(Floats* s, const Floats* v) {
    s[0] = fused(v[1], v[1], s[0]);
    s[1] = fused(v[0], v[1], s[1]);
    s[2] = fused(v[0], v[0], s[2]);
  }
  // x becomes what is to be of length 1, and v counts no more.
  static void rebase(Floats* v, const double*, const Combination& r) {
    const float* c = r.coefficients[0];
    v[0] = fused(v[1], c[3], v[0] * c[2]) * r.factor;
  }
  // |a·x + b·v|² from the entries.
  template <class T>
  static double square(const Row<T>& row, double a, double b) {
    double total = 0;
    for (int64_t i = 0; i < row.columns; ++i) {
      const double entry = a * scalar(row.vector[0][i]) + b * scalar(row.vector[1][i]);
      total += entry * entry;
    }
    return total;
  }
  template <class T>
  static Combination solve(const double* s, const Row<T>& row) {
    const double v_square = holds(s[0]) ? s[0] : square(row, 0, 1),
                 n = std::fabs(row.t) * std::sqrt(v_square);
    const float a = exponential ? static_cast<float>(std::cos(n)) : 1;
    const auto b = static_cast<float>(row.t * (exponential ? Exp::sinc(n) : 1));
    const double whole = s[2] * a * a + v_square * b * b, mixed = 2 * s[1] * a * b;
    // Sums in float do not say how little is left of two vectors that cancel, or of very short ones.
    const bool exact = holds(s[0]) && holds(s[2]) && mixed > -0.9 * whole;
    const double scale = over(1, std::sqrt(exact ? whole + mixed : square(row, a, b)));
    Combination r;
    r.factor = std::ldexp(1.0f, scale > 0 ? std::clamp(std::ilogb(scale), -100, 100) : 0);
    r.set(0, scale / r.factor, 0, a, b);
    return r;
  }
};

// <x, v> for the row's vector v and x times its factor: anew where a float did not hold |x|².
template <class T>
double product(double sum, double square_in_float, const Sized& x, const T* a, const T* b, int64_t columns) {
  if (holds(square_in_float)) return sum;
  double exact = 0;
  for (int64_t i = 0; i < columns; ++i)
    exact += static_cast<double>(scalar(a[i])) * x.factor * static_cast<double>(scalar(b[i]));
  return exact;
}

struct Project {
  static constexpr int vectors = 2, outputs = 1, sums = 2;
  static void add(Floats* s, const Floats* v) {
    s[0] = fused(v[0], v[0], s[0]);
    s[1] = fused(v[0], v[1], s[1]);
  }
  static void rebase(Floats* v, const double*, const Combination& r) { v[0] = v[0] * r.factor; }
  // <x, v>/<x, x> for vector k of the row.
  template <class T>
  static double share(const double* s, const Row<T>& row, const Sized& x, int k) {
    return over(product(s[k], s[0], x, row.vector[0], row.vector[k], row.columns), x.square);
  }
  template <class T>
  static Combination solve(const double* s, const Row<T>& row) {
    Combination r;
    const Sized x(s[0], row.vector[0], row.columns);
    r.factor = x.factor;
    r.set(0, -share(s, row, x, 1), 1);
    return r;
  }
};

struct ProjectBackward {
  static constexpr int vectors = 3, outputs = 2, sums = 3;
  static void add(Floats* s, const Floats* v) {
    Project::add(s, v);
    s[2] = fused(v[0], v[2], s[2]);
  }
  static void rebase(Floats* v, const double* s, const Combination& r) { Project::rebase(v, s, r); }
  template <class T>
  static Combination solve(const double* s, const Row<T>& row) {
    Combination r;
    const Sized x(s[0], row.vector[0], row.columns);
    const double along = Project::share(s, row, x, 1), pull = Project::share(s, row, x, 2);
    r.factor = x.factor;
    r.set(0, 2 * along * pull * x.factor, -pull * x.factor, -along * x.factor);
    r.set(1, -pull, 0, 1);
    return r;
  }
};

struct Normalize {
  static constexpr int vectors = 1, outputs = 1, sums = 1;
  static void add(Floats* s, const Floats* v) { s[0] = fused(v[0], v[0], s[0]); }
  static void rebase(Floats* v, const double*, const Combination& r) { v[0] = v[0] * r.factor; }
  template <class T>
  static Combination solve(const double* s, const Row<T>& row) {
    Combination r;
    const Sized x(s[0], row.vector[0], row.columns);
    r.factor = x.factor;
    r.set(0, over(1, std::sqrt(x.square)));
    return r;
  }
};

struct NormalizeBackward {
  static constexpr int vectors = 2, outputs = 1, sums = 2;
  static void add(Floats* s, const Floats* v) {
    s[0] = fused(v[0], v[0], s[0]);
    s[1] = fused(v[0], v[1], s[1]);
  }
  // x becomes a unit vector first: the coefficient of a short or long one may be no float.
  static void rebase(Floats* v, const double*, const Combination& r) {
    v[0] = v[0] * r.factor * r.coefficients[0][2];
  }
  template <class T>
  static Combination solve(const double* s, const Row<T>& row) {
    Combination r;
    const Sized x(s[0], row.vector[0], row.columns);
    const double scale = over(1, std::sqrt(x.square)), inner = s[1] * x.factor * scale;
    r.factor = x.factor;
    r.set(0, -inner * scale * x.factor, scale * x.factor, scale);
    return r;
  }
};

// x + 2<s, x>·t - 2<e, x>/|e|²·e for e = s + t; s becomes e.
struct Rotate {
  static constexpr int vectors = 3, outputs = 1, sums = 4;
  static void add(Floats* s, const Floats* v) {
    const Floats e = v[1] + v[2];
    s[0] = fused(v[1], v[0], s[0]);
    s[1] = fused(e, v[0], s[1]);
    s[2] = fused(e, e, s[2]);
    s[3] = fused(v[1], v[1], s[3]);
  }
  static void rebase(Floats* v, const double*, const Combination&) { v[1] = v[1] + v[2]; }
  static bool antipodal(const double* s) { return s[2] < 4 * kAntipodal * kAntipodal * s[3]; }
  template <class T>
  static Combination solve(const double* s, const Row<T>& row) {
    Combination r;
    r.set(0, 1, -2 * over(s[1], s[2]), 2 * s[0]);
    if (!antipodal(s)) return r;
    // A half turn in a plane of our choice; s = e - t.
    const Perpendicular h(row.vector[1], row.columns, s[3]);
    const double h_x = h.along * s[0] + h.spike * scalar(row.vector[0][h.at]);
    r.set(0, 1, -2 * h_x * h.along, 2 * s[0] + 2 * h_x * h.along);
    r.at = h.at;
    r.spike = -2 * h_x * h.spike;
    return r;
  }
};

struct RotateBackward {
  static constexpr int vectors = 4, outputs = 3, sums = 6;
  static void add(Floats* s, const Floats* v) {
    Rotate::add(s, v);
    s[4] = fused(v[3], v[2], s[4]);
    s[5] = fused(v[3], v[1] + v[2], s[5]);
  }
  static void rebase(Floats* v, const double* s, const Combination& r) { Rotate::rebase(v, s, r); }
  template <class T>
  static Combination solve(const double* s, const Row<T>& row) {
    Combination r;
    const double s_x = s[0], g_t = s[4];
    if (Rotate::antipodal(s)) {
      const Perpendicular h(row.vector[1], row.columns, s[3]);
      const double g_s = s[5] - g_t, g_h = h.along * g_s + h.spike * scalar(row.vector[3][h.at]);
      const double along = 2 * g_t - 2 * g_h * h.along;
      r.set(0, 0, along, -along, 1);
      r.at = h.at;
      r.spike = -2 * g_h * h.spike;
      r.set(1, 2 * g_t);
      r.set(2, 0, 0, 0, 2 * s_x);
      return r;
    }
    const double e_x = 2 * over(s[1], s[2]), g_e = 2 * over(s[5], s[2]);
    r.set(0, 0, 2 * g_t - g_e, -2 * g_t, 1);
    r.set(1, 2 * g_t - g_e, e_x * g_e, 0, -e_x);
    r.set(2, -g_e, e_x * g_e, 0, 2 * s_x - e_x);
    return r;
  }
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
      Row<T> row{{}, a.inputs[0].columns, a.t ? a.t[r] : 0.0, a.grad_angle ? a.grad_angle[r] : 0.0};
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
      return a.backward ? map_rows<AlongBackward<slerp_weights>>(a) : map_rows<Along<slerp_weights>>(a);
    case SphereMap::kLog:
      return a.backward ? map_rows<AlongBackward<log_weights>>(a) : map_rows<Along<log_weights>>(a);
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
