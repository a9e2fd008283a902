"""What phantoms are painted on: HU and organ codes at given points."""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from data_pipeline.phantoms import shapes

AIR_HU = -1000


class Noise:
    """Band-limited periodic noise of unit variance, a function of position."""

    def __init__(self, rng: np.random.Generator, size: int = 48):
        white = rng.standard_normal((size,) * 3).astype(np.float32)
        lattice = ndimage.gaussian_filter(white, 1.5, mode="wrap")
        self._lattice = lattice / lattice.std()

    def __call__(self, x, y, z, scale_mm: float, shift: float = 0.0) -> np.ndarray:
        """Values with a correlation length of about `scale_mm`."""
        step = np.float32(3.0 / scale_mm)
        coords = np.stack([x * step + shift, y * step - shift, z * step + 2 * shift])
        # Wrapped by hand: modes that wrap at every neighbour are slower.
        return ndimage.map_coordinates(
            self._lattice, coords, order=1, mode="grid-wrap", output=np.float32
        )


class Canvas:
    """HU and organ codes on a warped grid; paint covers what lies below."""

    noise: Noise
    skin: np.ndarray  # [X, Y, Z] mm, negative in the body: nothing is painted outside

    def __init__(self, x, y, z, spacing):
        self.x, self.y, self.z = x, y, z
        self.hu = np.full(x.shape, AIR_HU, np.float32)
        self.labels = np.zeros(x.shape, np.uint8)
        self.names: dict[str, int] = {}
        # An edge takes one voxel, as partial volume does.
        self.edge = np.float32(np.mean(spacing))
        self._range = [
            (c.min(rest), c.max(rest))
            for c, rest in ((x, (1, 2)), (y, (0, 2)), (z, (0, 1)))
        ]

    def box(self, low, high, margin: float = 0.0) -> tuple[slice, ...] | None:
        """Index box of the voxels that may lie between low and high (mm)."""
        slices = []
        for (smallest, largest), a, b in zip(self._range, low, high, strict=True):
            hit = np.flatnonzero((largest >= a - margin) & (smallest <= b + margin))
            if not len(hit):
                return None
            slices.append(slice(int(hit[0]), int(hit[-1]) + 1))
        return tuple(slices)

    def paint(
        self,
        shape: shapes.Shape,
        value: float | Callable,
        label: str | None = None,
        *,
        bump: float = 0.0,
        bump_scale: float = 40.0,
        texture: float = 0.0,
        texture_scale: float = 9.0,
        limit: np.ndarray | None = None,
        keep: bool = False,
    ) -> None:
        """Covers a shape with a value in HU, or value(x, y, z, distance).

        `bump` mm of smooth noise moves the surface, `texture` HU of noise fills it,
        `limit` [X, Y, Z] is a signed distance (mm) whose inside holds the shape too,
        `keep` leaves the labels alone: a detail inside an organ.
        """
        box = self.box(shape.low, shape.high, self.edge + 3 * bump)
        if box is None or (keep and shape.thickness < 0.1 * self.edge):
            return
        x, y, z = self.x[box], self.y[box], self.z[box]
        d = shape.sdf(x, y, z)
        if bump:
            near = np.abs(d) < self.edge + 3 * bump
            at = (x[near], y[near], z[near])
            d[near] += np.float32(bump) * self.noise(*at, bump_scale, shape.low[0])
        if limit is not None:
            d = np.maximum(d, limit[box])
        d = np.maximum(d, self.skin[box])
        cover = np.clip(np.float32(0.5) - d / self.edge, 0, 1)
        if not keep:
            self.labels[box][cover > 0.5] = self.code(label)
        pale = np.float32(min(1.0, shape.thickness / self.edge))
        cover *= pale
        hit = cover > 0
        at = (x[hit], y[hit], z[hit])
        hu = value(*at, d[hit]) if callable(value) else np.float32(value)
        if texture:
            hu = hu + np.float32(texture) * self.noise(*at, texture_scale)
        old = self.hu[box][hit]
        self.hu[box][hit] = old + cover[hit] * (hu - old)

    def code(self, label: str | None) -> int:
        """The organ's code in `labels`; 0 for no organ."""
        return 0 if label is None else self.names.setdefault(label, len(self.names) + 1)
