// Maps of the unit sphere and their gradients. Every result is a combination of a row's vectors whose
// coefficients come from their inner products: `add` adds these up, from as many lanes of F as one likes;
// `solve` makes the coefficients of the sums, in double; `rebase` changes the vectors before they are
// combined.
#pragma once

#include "sphere.h"
#include "sphere_rows.h"

namespace dlcore::sphere {

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
  DLCORE_HD void set(int output, C... c) {
    int i = 0;
    ((coefficients[output][i++] = static_cast<float>(c)), ...);
  }
};

// Two unit vectors x and y: the smaller one of y - x and y + x, e = y - σx, keeps what their angle leaves,
// and y's part across x is e - share·x.
struct Pair {
  double near, far, square, e_x, sigma, angle, sine, cosine, inner, share;
  bool antipodal;

  // Sums |y - x|², |y + x|², <y - x, x>, <y + x, x>, |x|².
  DLCORE_HD explicit Pair(const double* s)
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

  template <class F>
  DLCORE_HD static void add(F* sums, const F* v) {
    const F minus = v[1] - v[0], plus = v[1] + v[0];
    sums[0] = fused(minus, minus, sums[0]);
    sums[1] = fused(plus, plus, sums[1]);
    sums[2] = fused(minus, v[0], sums[2]);
    sums[3] = fused(plus, v[0], sums[3]);
    sums[4] = fused(v[0], v[0], sums[4]);
  }
  template <class F>
  DLCORE_HD static void add_gradient(F* sums, const F* v) {
    sums[5] = fused(v[2], v[0], sums[5]);
    sums[6] = fused(v[2], v[1] - v[0], sums[6]);
    sums[7] = fused(v[2], v[1] + v[0], sums[7]);
  }
  // y becomes e.
  template <class F>
  DLCORE_HD static void rebase(F* v, const double* s) {
    v[1] = s[0] <= s[1] ? v[1] - v[0] : v[1] + v[0];
  }

  // angle / sine.
  DLCORE_HD double stretch() const { return angle < 1e-4 ? 1 + angle * angle / 6 : angle / sine; }
  // The angle's gradient in x is scale·(e + tilt·x), in y -scale·(cosine·e - |tilt|·x), for a scale < 0.
  DLCORE_HD double tilt() const { return sigma * 2 * over(sigma > 0 ? near : far, near + far); }
};

// a·x + b·(y across x), and a'/sine, b'/sine for the derivatives in the angle.
struct Weights {
  double a, b, a1, b1;
};

struct SlerpWeights {
  static constexpr bool logarithm = false;
  DLCORE_HD static Weights of(const Pair& p, double t) {
    const double w = p.angle, turned = t * w, square = w * w;
    const double b = w < 1e-4 ? t * (1 + square * (1 - t * t) / 6) : sine_of(turned) / p.sine;
    const double cubic = (1 - t * t) / 3, quintic = (7 - 10 * t * t + 3 * t * t * t * t) / 90;
    const double b1 =
        w < 5e-2 ? t * (cubic + quintic * square) * (1 + square / 6)
                 : (t * cosine_of(turned) * p.sine - sine_of(turned) * p.cosine) / (p.sine * p.sine * p.sine);
    return {cosine_of(turned), b, -t * b, b1};
  }
};

struct LogWeights {
  static constexpr bool logarithm = true;
  DLCORE_HD static Weights of(const Pair& p, double) {
    const double w = p.angle, square = w * w;
    const double b1 = w < 5e-2 ? (1.0 / 3 + square * 7 / 90) * (1 + square / 6)
                               : (p.sine - w * p.cosine) / (p.sine * p.sine * p.sine);
    return {0, p.stretch(), 0, b1};
  }
};

// From x towards y: slerp and the logarithm.
template <class W>
struct Along {
  static constexpr int vectors = 2, outputs = 1, sums = 5;
  template <class F>
  DLCORE_HD static void add(F* s, const F* v) {
    Pair::add(s, v);
  }
  template <class F>
  DLCORE_HD static void rebase(F* v, const double* s, const Combination&) {
    Pair::rebase(v, s);
  }
  template <class R>
  DLCORE_HD static Combination solve(const double* s, const R& row) {
    Combination r;
    const Pair p(s);
    if (p.antipodal) {
      // Any direction is a shortest way.
      const Perpendicular h(row, 0, p.square);
      const double across = W::logarithm ? p.angle : sine_of(row.t * p.angle);
      r.set(0, (W::logarithm ? 0 : cosine_of(row.t * p.angle)) + across * h.along);
      r.at = h.at;
      r.spike = across * h.spike;
      return r;
    }
    const Weights w = W::of(p, row.t);
    r.set(0, w.a - w.b * p.share, w.b);
    return r;
  }
};

template <class W>
struct AlongBackward {
  static constexpr int vectors = 3, outputs = 2, sums = 8;
  template <class F>
  DLCORE_HD static void add(F* s, const F* v) {
    Pair::add(s, v);
    Pair::add_gradient(s, v);
  }
  template <class F>
  DLCORE_HD static void rebase(F* v, const double* s, const Combination&) {
    Pair::rebase(v, s);
  }
  template <class R>
  DLCORE_HD static Combination solve(const double* s, const R& row) {
    Combination r;
    const Pair p(s);
    const double g_x = s[5], turned = row.t * p.angle;
    if (p.antipodal) {
      // The direction taken there is held fixed.
      const Perpendicular h(row, 0, p.square);
      const double g_h = h.along * g_x + h.spike * row.entry(2, h.at);
      r.set(0, 0, 0, W::logarithm ? 0 : cosine_of(turned));
      r.number = p.angle * (cosine_of(turned) * g_h - sine_of(turned) * g_x);
      return r;
    }
    const Weights w = W::of(p, row.t);
    const double g_across = (p.sigma > 0 ? s[6] : s[7]) - p.share * g_x;
    const double pull = over(4 * (w.a1 * g_x + w.b1 * g_across), p.near + p.far), tilt = p.tilt();
    const double part = w.b * over(g_x, p.square), inner = over(p.inner, p.square);
    r.set(0, -part * (p.sigma - 2 * inner) - pull * tilt, -part - pull, w.a - w.b * inner);
    r.set(1, -part - pull * std::fabs(tilt), pull * p.cosine, w.b);
    r.number = p.stretch() * cosine_of(turned) * g_across - p.angle * sine_of(turned) * g_x;
    return r;
  }
};

struct Angle {
  static constexpr int vectors = 2, outputs = 0, sums = 5;
  template <class F>
  DLCORE_HD static void add(F* s, const F* v) {
    Pair::add(s, v);
  }
  template <class F>
  DLCORE_HD static void rebase(F*, const double*, const Combination&) {}
  template <class R>
  DLCORE_HD static Combination solve(const double* s, const R&) {
    Combination r;
    r.number = Pair(s).angle;
    return r;
  }
};

struct AngleBackward {
  static constexpr int vectors = 2, outputs = 2, sums = 5;
  template <class F>
  DLCORE_HD static void add(F* s, const F* v) {
    Pair::add(s, v);
  }
  template <class F>
  DLCORE_HD static void rebase(F* v, const double* s, const Combination&) {
    Pair::rebase(v, s);
  }
  template <class R>
  DLCORE_HD static Combination solve(const double* s, const R& row) {
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
  template <class F>
  DLCORE_HD static void add(F* s, const F* v) {
    s[0] = fused(v[1], v[1], s[0]);
  }
  template <class F>
  DLCORE_HD static void rebase(F*, const double*, const Combination&) {}
  DLCORE_HD static double sinc(double n) { return n < 1e-4 ? 1 - n * n / 6 : sine_of(n) / n; }
  template <class R>
  DLCORE_HD static Combination solve(const double* s, const R&) {
    Combination r;
    const double n = std::sqrt(s[0]);
    r.set(0, cosine_of(n), sinc(n));
    return r;
  }
};

struct ExpBackward {
  static constexpr int vectors = 3, outputs = 2, sums = 3;
  template <class F>
  DLCORE_HD static void add(F* s, const F* v) {
    Exp::add(s, v);
    s[1] = fused(v[2], v[0], s[1]);
    s[2] = fused(v[2], v[1], s[2]);
  }
  template <class F>
  DLCORE_HD static void rebase(F*, const double*, const Combination&) {}
  template <class R>
  DLCORE_HD static Combination solve(const double* s, const R&) {
    Combination r;
    const double n = std::sqrt(s[0]), sinc = Exp::sinc(n);
    const double slope = n < 1e-1 ? s[0] / 30 - 1.0 / 3 : (cosine_of(n) - sinc) / s[0];
    r.set(0, 0, 0, cosine_of(n));
    r.set(1, 0, slope * s[2] - sinc * s[1], sinc);
    return r;
  }
};

// x moved by t·v, along the great circle or straight on, and back to length 1.
template <bool exponential>
struct Step {
  static constexpr int vectors = 2, outputs = 1, sums = 3;
  template <class F>
  DLCORE_HD static void add(F* s, const F* v) {
    s[0] = fused(v[1], v[1], s[0]);
    s[1] = fused(v[0], v[1], s[1]);
    s[2] = fused(v[0], v[0], s[2]);
  }
  // x becomes what is to be of length 1, and v counts no more.
  template <class F>
  DLCORE_HD static void rebase(F* v, const double*, const Combination& r) {
    const float* c = r.coefficients[0];
    v[0] = fused(v[1], c[3], v[0] * c[2]) * r.factor;
  }
  // |a·x + b·v|² from the entries.
  template <class R>
  DLCORE_HD static double square(const R& row, double a, double b) {
    return row.sum([&](int64_t i) {
      const double entry = a * row.entry(0, i) + b * row.entry(1, i);
      return entry * entry;
    });
  }
  template <class R>
  DLCORE_HD static Combination solve(const double* s, const R& row) {
    const double v_square = holds(s[0]) ? s[0] : square(row, 0, 1),
                 n = std::fabs(row.t) * std::sqrt(v_square);
    const float a = exponential ? static_cast<float>(cosine_of(n)) : 1;
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

struct Project {
  static constexpr int vectors = 2, outputs = 1, sums = 2;
  template <class F>
  DLCORE_HD static void add(F* s, const F* v) {
    s[0] = fused(v[0], v[0], s[0]);
    s[1] = fused(v[0], v[1], s[1]);
  }
  template <class F>
  DLCORE_HD static void rebase(F* v, const double*, const Combination& r) {
    v[0] = v[0] * r.factor;
  }
  // <x, v>/<x, x> for vector k of the row and x times its factor: anew where a float did not hold |x|².
  template <class R>
  DLCORE_HD static double share(const double* s, const R& row, const Sized& x, int k) {
    if (holds(s[0])) return over(s[k], x.square);
    const double exact = row.sum([&](int64_t i) {
      return static_cast<double>(row.entry(0, i)) * x.factor * static_cast<double>(row.entry(k, i));
    });
    return over(exact, x.square);
  }
  template <class R>
  DLCORE_HD static Combination solve(const double* s, const R& row) {
    Combination r;
    const Sized x(s[0], row, 0);
    r.factor = x.factor;
    r.set(0, -share(s, row, x, 1), 1);
    return r;
  }
};

struct ProjectBackward {
  static constexpr int vectors = 3, outputs = 2, sums = 3;
  template <class F>
  DLCORE_HD static void add(F* s, const F* v) {
    Project::add(s, v);
    s[2] = fused(v[0], v[2], s[2]);
  }
  template <class F>
  DLCORE_HD static void rebase(F* v, const double* s, const Combination& r) {
    Project::rebase(v, s, r);
  }
  template <class R>
  DLCORE_HD static Combination solve(const double* s, const R& row) {
    Combination r;
    const Sized x(s[0], row, 0);
    const double along = Project::share(s, row, x, 1), pull = Project::share(s, row, x, 2);
    r.factor = x.factor;
    r.set(0, 2 * along * pull * x.factor, -pull * x.factor, -along * x.factor);
    r.set(1, -pull, 0, 1);
    return r;
  }
};

struct Normalize {
  static constexpr int vectors = 1, outputs = 1, sums = 1;
  template <class F>
  DLCORE_HD static void add(F* s, const F* v) {
    s[0] = fused(v[0], v[0], s[0]);
  }
  template <class F>
  DLCORE_HD static void rebase(F* v, const double*, const Combination& r) {
    v[0] = v[0] * r.factor;
  }
  template <class R>
  DLCORE_HD static Combination solve(const double* s, const R& row) {
    Combination r;
    const Sized x(s[0], row, 0);
    r.factor = x.factor;
    r.set(0, over(1, std::sqrt(x.square)));
    return r;
  }
};

struct NormalizeBackward {
  static constexpr int vectors = 2, outputs = 1, sums = 2;
  template <class F>
  DLCORE_HD static void add(F* s, const F* v) {
    s[0] = fused(v[0], v[0], s[0]);
    s[1] = fused(v[0], v[1], s[1]);
  }
  // x becomes a unit vector first: the coefficient of a short or long one may be no float.
  template <class F>
  DLCORE_HD static void rebase(F* v, const double*, const Combination& r) {
    v[0] = v[0] * r.factor * r.coefficients[0][2];
  }
  template <class R>
  DLCORE_HD static Combination solve(const double* s, const R& row) {
    Combination r;
    const Sized x(s[0], row, 0);
    const double scale = over(1, std::sqrt(x.square)), inner = s[1] * x.factor * scale;
    r.factor = x.factor;
    r.set(0, -inner * scale * x.factor, scale * x.factor, scale);
    return r;
  }
};

// x + 2<s, x>·t - 2<e, x>/|e|²·e for e = s + t; s becomes e.
struct Rotate {
  static constexpr int vectors = 3, outputs = 1, sums = 4;
  template <class F>
  DLCORE_HD static void add(F* s, const F* v) {
    const F e = v[1] + v[2];
    s[0] = fused(v[1], v[0], s[0]);
    s[1] = fused(e, v[0], s[1]);
    s[2] = fused(e, e, s[2]);
    s[3] = fused(v[1], v[1], s[3]);
  }
  template <class F>
  DLCORE_HD static void rebase(F* v, const double*, const Combination&) {
    v[1] = v[1] + v[2];
  }
  DLCORE_HD static bool antipodal(const double* s) { return s[2] < 4 * kAntipodal * kAntipodal * s[3]; }
  template <class R>
  DLCORE_HD static Combination solve(const double* s, const R& row) {
    Combination r;
    r.set(0, 1, -2 * over(s[1], s[2]), 2 * s[0]);
    if (!antipodal(s)) return r;
    // A half turn in a plane of our choice; s = e - t.
    const Perpendicular h(row, 1, s[3]);
    const double h_x = h.along * s[0] + h.spike * row.entry(0, h.at);
    r.set(0, 1, -2 * h_x * h.along, 2 * s[0] + 2 * h_x * h.along);
    r.at = h.at;
    r.spike = -2 * h_x * h.spike;
    return r;
  }
};

struct RotateBackward {
  static constexpr int vectors = 4, outputs = 3, sums = 6;
  template <class F>
  DLCORE_HD static void add(F* s, const F* v) {
    Rotate::add(s, v);
    s[4] = fused(v[3], v[2], s[4]);
    s[5] = fused(v[3], v[1] + v[2], s[5]);
  }
  template <class F>
  DLCORE_HD static void rebase(F* v, const double* s, const Combination& r) {
    Rotate::rebase(v, s, r);
  }
  template <class R>
  DLCORE_HD static Combination solve(const double* s, const R& row) {
    Combination r;
    const double s_x = s[0], g_t = s[4];
    if (Rotate::antipodal(s)) {
      const Perpendicular h(row, 1, s[3]);
      const double g_s = s[5] - g_t, g_h = h.along * g_s + h.spike * row.entry(3, h.at);
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

}  // namespace dlcore::sphere
