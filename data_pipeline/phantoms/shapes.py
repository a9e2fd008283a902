"""Signed distances of simple shapes, mm, negative inside; draws of their sizes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage


def normal(rng: np.random.Generator, size: int | None = None) -> np.ndarray:
    """Normal numbers cut at 2, so that no subject is a monster."""
    return np.clip(rng.standard_normal(size), -2, 2)


class Draw:
    """Draws of one subject: a point near another, radii about the usual ones."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def place(self, *center: float, sd: float = 2.0) -> np.ndarray:
        return np.asarray(center) + sd * normal(self.rng, 3)

    def size(self, *radii: float, rel: float = 0.08) -> np.ndarray:
        return np.asarray(radii) * (1 + rel * normal(self.rng, len(radii)))


Sdf = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Shape(NamedTuple):
    """A signed distance and a box that holds its inside, mm."""

    sdf: Sdf
    low: np.ndarray
    high: np.ndarray
    thickness: float = np.inf  # mm; what is thinner than a voxel pales


def ellipsoid(
    center: Sequence[float], radii: Sequence[float], yaw: float = 0.0
) -> Shape:
    """Ellipsoid turned by `yaw` radians about z."""
    center, radii = np.asarray(center, np.float32), np.asarray(radii, np.float32)
    cos, sin = np.float32(np.cos(yaw)), np.float32(np.sin(yaw))

    def sdf(x, y, z):
        x, y, z = x - center[0], y - center[1], z - center[2]
        u, v = (cos * x + sin * y) / radii[0], (cos * y - sin * x) / radii[1]
        w = z / radii[2]
        k0 = np.sqrt(u * u + v * v + w * w) + np.float32(1e-6)
        u, v, w = u / radii[0], v / radii[1], w / radii[2]
        k1 = np.sqrt(u * u + v * v + w * w) + np.float32(1e-6)
        return k0 * (k0 - 1) / k1

    reach = radii.copy()
    if yaw:
        reach[0] = np.hypot(radii[0] * cos, radii[1] * sin)
        reach[1] = np.hypot(radii[0] * sin, radii[1] * cos)
    return Shape(sdf, center - reach, center + reach, 2 * float(radii.min()))


def tube(
    points: Sequence[Sequence[float]],
    radii: float | Sequence[float],
    flat: Sequence[float] = (1, 1, 1),
) -> Shape:
    """Chain of capsules; `flat` stretches its cross-section along each axis."""
    flat = np.asarray(flat, np.float32)
    points = np.asarray(points, np.float32)
    radii = np.broadcast_to(np.asarray(radii, np.float32), (len(points),))

    def sdf(x, y, z):
        best = None
        position = (x / flat[0], y / flat[1], z / flat[2])
        for i in range(len(points) - 1):
            a, b = points[i] / flat, points[i + 1] / flat
            ab = b - a
            length = np.float32(max(ab @ ab, 1e-6))
            pa = [p - c for p, c in zip(position, a, strict=True)]
            t = (pa[0] * ab[0] + pa[1] * ab[1] + pa[2] * ab[2]) / length
            t = np.clip(t, 0, 1)
            rest = [p - t * c for p, c in zip(pa, ab, strict=True)]
            d = np.sqrt(rest[0] ** 2 + rest[1] ** 2 + rest[2] ** 2)
            d -= radii[i] + t * (radii[i + 1] - radii[i])
            best = d if best is None else np.minimum(best, d)
        return best

    reach = radii[:, None] * flat
    low, high = (points - reach).min(0), (points + reach).max(0)
    return Shape(sdf, low, high, 2 * float(radii.max()))


def box(low: Sequence[float], high: Sequence[float]) -> Shape:
    """Everything between two corners, to be cut by a limit."""

    def sdf(x, y, z):
        return np.full(x.shape, -1e3, np.float32)

    return Shape(sdf, np.asarray(low, np.float32), np.asarray(high, np.float32))


def union(*shapes: Shape, blend: float = 0.0) -> Shape:
    """Union, rounded over `blend` mm."""

    def sdf(x, y, z):
        best = shapes[0].sdf(x, y, z)
        for shape in shapes[1:]:
            other = shape.sdf(x, y, z)
            best = smooth_min(best, other, blend)
        return best

    low = np.min([s.low for s in shapes], 0) - blend / 4
    return Shape(sdf, low, np.max([s.high for s in shapes], 0) + blend / 4)


def within(shape: Shape, *limits: Sdf) -> Shape:
    """The part of a shape that is also inside all the limits."""

    def sdf(x, y, z):
        best = shape.sdf(x, y, z)
        for limit in limits:
            best = np.maximum(best, limit(x, y, z))
        return best

    return Shape(sdf, shape.low, shape.high)


def smooth_min(a: np.ndarray, b: np.ndarray, blend: float) -> np.ndarray:
    if not blend:
        return np.minimum(a, b)
    h = np.maximum(blend - np.abs(a - b), 0) / np.float32(blend)
    return np.minimum(a, b) - h * h * np.float32(blend / 4)


def radial(x: np.ndarray, y: np.ndarray, rx, ry, power: float = 2.0) -> np.ndarray:
    """Distance along the ray from the axis to a superellipse, mm."""
    u, v = np.abs(x / rx), np.abs(y / ry)
    if power == 2.0:
        k = np.sqrt(u * u + v * v)
    else:
        k = (u**power + v**power) ** np.float32(1 / power)
    k = np.maximum(k, np.float32(1e-3))
    return np.sqrt(x * x + y * y) * (1 - 1 / k) - np.float32(1e-3)


def profile(z: np.ndarray, knots: Sequence[float], values: Sequence[float]):
    """Piecewise linear function of z, smoothed at the knots."""
    fine = np.linspace(knots[0], knots[-1], 256)
    smooth = ndimage.gaussian_filter1d(np.interp(fine, knots, values), 4)
    return np.interp(z, fine, smooth).astype(np.float32)


def mirror(points: Sequence[Sequence[float]], side: int) -> list[tuple[float, ...]]:
    """Points given for the left (x > 0), put on the side wanted (-1 right)."""
    return [(side * p[0], *p[1:]) for p in points]
