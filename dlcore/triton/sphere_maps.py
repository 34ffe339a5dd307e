"""What the sphere's maps and their gradients make of a row.

Every result is a combination of the arguments x, y, z and of the gradient g, whose coefficients come from
their inner products: `measure` adds these up, at most eight, and `combine` does the rest. Both take tiles
(rows, columns) and numbers (rows, 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from dlcore.triton.functions import PI, over, sine_cosine, slerp_series

#: Vectors closer than this to a pair of antipodes have no direction of their own from one to the other.
ANTIPODAL = tl.constexpr(1e-5)


@triton.jit
def _dot(a, b):
    return tl.sum(a * b, 1, keep_dims=True)


@triton.jit
def measure(MAP: tl.constexpr, BACKWARD: tl.constexpr, x, y, z, g, zero):
    """A tile's part of the sums; those that a map has no use for are `zero`."""
    s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
    if MAP == "normalize":
        s0 = _dot(x, x)
        if BACKWARD:
            s1 = _dot(x, g)
    elif MAP == "project":
        s0, s1 = _dot(x, x), _dot(x, y)
        if BACKWARD:
            s2 = _dot(x, g)
    elif MAP == "exp_map":
        s0 = _dot(y, y)
        if BACKWARD:
            s1, s2 = _dot(g, x), _dot(g, y)
    elif MAP == "rotate":
        e = y + z
        s0, s1, s2, s3 = _dot(y, x), _dot(e, x), _dot(e, e), _dot(y, y)
        if BACKWARD:
            s4, s5 = _dot(g, z), _dot(g, e)
    else:
        minus, plus = y - x, y + x
        s0, s1, s2, s3, s4 = _dot(minus, minus), _dot(plus, plus), _dot(minus, x), _dot(plus, x), _dot(x, x)
        if BACKWARD and MAP != "angle":
            s5, s6, s7 = _dot(g, x), _dot(g, minus), _dot(g, plus)
    return s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit
def antipodal(MAP: tl.constexpr, s0, s1, s2, s3):
    """Whether the way from one point to another is any: then it goes through `perpendicular`."""
    if MAP == "rotate":
        return s2 < s3 * (4 * ANTIPODAL * ANTIPODAL)
    else:
        return s1 < s0 * (ANTIPODAL * ANTIPODAL)


@triton.jit
def perpendicular(entry, square):
    """A unit vector across x, as `along` x plus `spike` at the axis that x, of this square, is farthest from;
    `entry` is x's there. Where x is zero, that axis."""
    spike = tl.where(square > 0, 1.0 / tl.sqrt_rn(1.0 - over(entry * entry, square)), 1.0)
    return -over(entry, square) * spike, spike


@triton.jit
def _angle(near, far):
    """For |y - x|² and |y + x|²: whether the angle is acute, it or its supplement, whichever is smaller, and
    the angle's sine, cosine and ω / sin ω."""
    total, acute = near + far, near <= far
    half = over(tl.where(acute, near, far), total)
    sine = over(2.0 * tl.sqrt_rn(near) * tl.sqrt_rn(far), total)
    series = slerp_series(2.0 * half)
    stretch = tl.where(acute, series, over(1.0, sine) * PI - series)
    return acute, series * sine, sine, over(far - near, total), stretch


@triton.jit
def angle(near, far):
    """The angle in [0, π]."""
    acute, rest, _, _, _ = _angle(near, far)
    return tl.where(acute, rest, -rest + PI)


@triton.jit
def _turned(t, acute, rest):
    """sin and cos of the share t of an angle that is `rest` or π - rest."""
    sine, cosine = sine_cosine(t * rest * (1 / PI))
    sine_pi, cosine_pi = sine_cosine(t)
    s = tl.where(acute, sine, sine_pi * cosine - cosine_pi * sine)
    return s, tl.where(acute, cosine, cosine_pi * cosine + sine_pi * sine)


@triton.jit
def _weights(MAP: tl.constexpr, t, near, far):
    """slerp and log_map are a x + b (y across x): a, b, and the length of the way along its direction."""
    acute, rest, sine, _, stretch = _angle(near, far)
    omega = tl.where(acute, rest, -rest + PI)
    if MAP == "slerp":
        way, a = _turned(t, acute, rest)
        b = tl.where(omega < 1e-4, t * (1.0 + omega * omega * (1.0 - t * t) / 6.0), over(way, sine))
    else:
        way, a, b = omega, omega * 0.0, stretch
    return a, b, way


@triton.jit
def _slopes(MAP: tl.constexpr, t, a, b, way, omega, sine, cosine):
    """a'/sine and b'/sine, the derivatives in the angle."""
    square, cube = omega * omega, sine * sine * sine
    if MAP == "slerp":
        a1, t2 = -t * b, t * t
        series = t * ((1.0 - t2) / 3.0 + square * (7.0 - 10.0 * t2 + 3.0 * t2 * t2) / 90.0)
        b1 = over(t * a * sine - way * cosine, cube)
    else:
        a1, series = a, 1 / 3 + square * (7 / 90)
        b1 = over(sine - omega * cosine, cube)
    return a1, tl.where(omega < 5e-2, series * (1.0 + square / 6.0), b1)


@triton.jit
def _along(MAP: tl.constexpr, x, y, t, at, entry, column, near, far, minus_x, plus_x, square):
    """slerp and log_map. The smaller one of y - x and y + x keeps what their angle leaves."""
    a, b, way = _weights(MAP, t, near, far)
    acute, any_way = near <= far, antipodal(MAP, near, far, near, near)
    share = over(tl.where(acute, minus_x, plus_x), square)
    along, spike = perpendicular(entry, square)
    e = tl.where(acute, y - x, y + x)
    result = x * tl.where(any_way, a + way * along, a - b * share) + e * tl.where(any_way, 0.0, b)
    return result + tl.where(any_way & (column == at), way * spike, 0.0)


@triton.jit
def _along_backward(
    MAP: tl.constexpr, x, y, g, t, entry, g_at, near, far, minus_x, plus_x, square, g_x, g_minus, g_plus
):
    """Its gradients in x, y and t. An antipode's direction is held fixed."""
    a, b, way = _weights(MAP, t, near, far)
    acute, rest, sine, cosine, stretch = _angle(near, far)
    omega, total = tl.where(acute, rest, -rest + PI), near + far
    a1, b1 = _slopes(MAP, t, a, b, way, omega, sine, cosine)
    share = over(tl.where(acute, minus_x, plus_x), square)
    g_across = tl.where(acute, g_minus, g_plus) - share * g_x
    pull = over(4.0 * (a1 * g_x + b1 * g_across), total)
    tilt = 2.0 * over(tl.where(acute, near, far), total)
    part, inner = b * over(g_x, square), over((far - near) / 4.0, square)
    sign = tl.where(acute, 1.0, -1.0)
    any_way = antipodal(MAP, near, far, near, near)
    x_in_x = tl.where(any_way, 0.0, -part * (sign - 2.0 * inner) - pull * sign * tilt)
    e_in_x = tl.where(any_way, 0.0, -part - pull)
    g_in_x = tl.where(any_way, a, a - b * inner)
    x_in_y = tl.where(any_way, 0.0, -part - pull * tilt)
    e_in_y = tl.where(any_way, 0.0, pull * cosine)
    g_in_y = tl.where(any_way, 0.0, b)
    e = tl.where(acute, y - x, y + x)
    along, spike = perpendicular(entry, square)
    g_way = tl.where(any_way, omega * (along * g_x + spike * g_at), stretch * g_across)
    return (
        x * x_in_x + e * e_in_x + g * g_in_x,
        x * x_in_y + e * e_in_y + g * g_in_y,
        a * g_way - omega * way * g_x,
    )


@triton.jit
def _angle_backward(x, y, grad, near, far):
    """The angle's gradients in x and y; none at antipodes and where the points meet."""
    acute, _, _, cosine, _ = _angle(near, far)
    scale = over(2.0 * grad, tl.sqrt_rn(near) * tl.sqrt_rn(far))
    scale = tl.where(antipodal("angle", near, far, near, near), 0.0, scale)
    tilt = 2.0 * over(tl.where(acute, near, far), near + far)
    e = tl.where(acute, y - x, y + x)
    in_x = x * (-scale * tl.where(acute, tilt, -tilt)) - e * scale
    return in_x, x * (-scale * tilt) + e * (scale * cosine)


@triton.jit
def sinc_cosine(n):
    """sin(n) / n and cos(n)."""
    sine, cosine = sine_cosine(n * (1 / PI))
    return tl.where(n < 1e-4, 1.0 - n * n / 6.0, over(sine, n)), cosine


@triton.jit
def _exp_backward(x, y, g, square, g_x, g_y):
    sinc, cosine = sinc_cosine(tl.sqrt_rn(square))
    slope = tl.where(square < 1e-2, square / 30.0 - 1 / 3, over(cosine - sinc, square))
    return g * cosine, y * (slope * g_y - sinc * g_x) + g * sinc


@triton.jit
def _rotate(x, y, z, at, entry, x_at, column, y_x, e_x, e_e, y_y):
    """x + 2<y, x> z - 2<e, x>/|e|² e for e = y + z; at antipodes e is `perpendicular` to y, = e - z."""
    half_turn = antipodal("rotate", y_x, e_x, e_e, y_y)
    along, spike = perpendicular(entry, y_y)
    h_x = along * y_x + spike * x_at
    e_part = tl.where(half_turn, -2.0 * h_x * along, -2.0 * over(e_x, e_e))
    z_part = 2.0 * y_x + tl.where(half_turn, 2.0 * h_x * along, 0.0)
    result = x + (y + z) * e_part + z * z_part
    return result - tl.where(half_turn & (column == at), 2.0 * h_x * spike, 0.0)


@triton.jit
def _rotate_backward(x, y, z, g, at, entry, g_at, column, y_x, e_x, e_e, y_y, g_z, g_e):
    half_turn = antipodal("rotate", y_x, e_x, e_e, y_y)
    along, spike = perpendicular(entry, y_y)
    g_h = along * (g_e - g_z) + spike * g_at
    e_x, g_e = 2.0 * over(e_x, e_e), 2.0 * over(g_e, e_e)
    e_in_x = 2.0 * g_z - tl.where(half_turn, 2.0 * g_h * along, g_e)
    z_in_x = tl.where(half_turn, -e_in_x, -2.0 * g_z)
    x_in_y = tl.where(half_turn, 2.0 * g_z, 2.0 * g_z - g_e)
    x_in_z = tl.where(half_turn, 0.0, -g_e)
    e_in_both = tl.where(half_turn, 0.0, e_x * g_e)
    g_in_y = tl.where(half_turn, 0.0, -e_x)
    g_in_z = 2.0 * y_x + g_in_y
    e = y + z
    in_x = e * e_in_x + z * z_in_x + g
    in_x -= tl.where(half_turn & (column == at), 2.0 * g_h * spike, 0.0)
    return in_x, x * x_in_y + e * e_in_both + g * g_in_y, x * x_in_z + e * e_in_both + g * g_in_z


@triton.jit
def combine(
    MAP: tl.constexpr, BACKWARD: tl.constexpr, x, y, z, g, t, factor, at, entry, other, column,
    s0, s1, s2, s3, s4, s5, s6, s7,
):  # fmt: skip
    """The result, or the gradients in x, y, z and t; those that a map has not are its arguments."""
    if MAP == "normalize":
        scale = over(1.0, tl.sqrt_rn(s0))
        x = (g - x * scale * (s1 * scale)) * scale * factor if BACKWARD else x * scale
    elif MAP == "project":
        share = over(s1, s0)
        if BACKWARD:
            pull = over(s2, s0)
            x, y = (x * (2.0 * share * pull) - y * pull - g * share) * factor, g - x * pull
        else:
            x = y - x * share
    elif MAP == "exp_map":
        if BACKWARD:
            x, y = _exp_backward(x, y, g, s0, s1, s2)
        else:
            sinc, cosine = sinc_cosine(tl.sqrt_rn(s0))
            x = x * cosine + y * sinc
    elif MAP == "rotate":
        if BACKWARD:
            x, y, z = _rotate_backward(x, y, z, g, at, entry, other, column, s0, s1, s2, s3, s4, s5)
        else:
            x = _rotate(x, y, z, at, entry, other, column, s0, s1, s2, s3)
    elif MAP == "angle":
        if BACKWARD:
            x, y = _angle_backward(x, y, t, s0, s1)
        else:
            t = angle(s0, s1)
    elif BACKWARD:
        x, y, t = _along_backward(MAP, x, y, g, t, entry, other, s0, s1, s2, s3, s4, s5, s6, s7)
    else:
        x = _along(MAP, x, y, t, at, entry, column, s0, s1, s2, s3, s4)
    return x, y, z, t
