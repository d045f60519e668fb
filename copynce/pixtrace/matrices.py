"""3x3 matrices as flat tuples of nine floats: composing a handful of them costs less than one NumPy call.

A matrix maps points ``(x, y, 1)`` from input to output; ``multiply(b, a)`` applies ``a`` first.
"""

from __future__ import annotations

Flat = tuple[float, float, float, float, float, float, float, float, float]


def multiply(p: Flat, q: Flat) -> Flat:
    """The matrix product ``p @ q``.

    >>> multiply(translation(2.0, 3.0), scaling(4.0, 5.0))
    (4.0, 0.0, 2.0, 0.0, 5.0, 3.0, 0.0, 0.0, 1.0)
    """
    a, b, c, d, e, f, g, h, i = p
    j, k, l, m, n, o, r, s, t = q  # noqa: E741 - nine letters for nine entries
    return (
        a * j + b * m + c * r,
        a * k + b * n + c * s,
        a * l + b * o + c * t,
        d * j + e * m + f * r,
        d * k + e * n + f * s,
        d * l + e * o + f * t,
        g * j + h * m + i * r,
        g * k + h * n + i * s,
        g * l + h * o + i * t,
    )


def translation(x: float, y: float) -> Flat:
    """Move points by ``(x, y)``."""
    return (1.0, 0.0, x, 0.0, 1.0, y, 0.0, 0.0, 1.0)


def scaling(x: float, y: float) -> Flat:
    """Scale points about the origin."""
    return (x, 0.0, 0.0, 0.0, y, 0.0, 0.0, 0.0, 1.0)


def rows(p: Flat) -> tuple[tuple[float, float, float], ...]:
    """The same matrix as three rows."""
    return p[0:3], p[3:6], p[6:9]


def flat(matrix: tuple[tuple[float, float, float], ...]) -> Flat:
    """Three rows as one tuple."""
    (a, b, c), (d, e, f), (g, h, i) = matrix
    return (a, b, c, d, e, f, g, h, i)
