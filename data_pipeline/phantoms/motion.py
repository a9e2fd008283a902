"""How subjects differ and how they move: fields as functions of position, mm."""

from collections.abc import Callable

import numpy as np

from data_pipeline.phantoms import shapes


def individual(rng: np.random.Generator, x, y, z) -> tuple[np.ndarray, ...]:
    """Body size, posture and build: scale, shift and a smooth warp of some mm."""
    scale = 1 + 0.05 * shapes.normal(rng, 3)
    shift = np.array([2.0, 3.0, 6.0]) * shapes.normal(rng, 3)
    tilt = 0.03 * shapes.normal(rng, 3)
    point = [
        (c - np.float32(t)) / np.float32(s)
        for c, s, t in zip((x, y, z), scale, shift, strict=True)
    ]
    out = [
        point[0] + np.float32(tilt[0]) * point[2],
        point[1] + np.float32(tilt[1]) * point[2],
        point[2] - np.float32(tilt[2]) * point[0],
    ]
    for _ in range(3):
        wave = rng.uniform(0.012, 0.026, 3) * rng.choice([-1, 1], 3)
        phase, size = rng.uniform(0, 2 * np.pi), 3.0 * shapes.normal(rng, 3)
        angle = sum(np.float32(w) * c for w, c in zip(wave, point, strict=True))
        ripple = np.sin(angle + np.float32(phase))
        out = [o + np.float32(s) * ripple for o, s in zip(out, size, strict=True)]
    return tuple(out)


def breathing(rng: np.random.Generator, *, deep: bool, center_z_mm: float) -> Callable:
    """Breathing between two scans: (x, y, z) -> (dx, dy, dz), all mm.

    Largest at the diaphragm, gone at the lung's apex, spine and wall; the slope along z
    stays below 0.3, so that the map folds nowhere.
    """
    reach = (25.0 if deep else 11.0) * (1 + 0.15 * shapes.normal(rng))
    size = (1.2 if deep else 1.0) * shapes.normal(rng, (3, 3))
    wave = rng.uniform(0.01, 0.03, (3, 3)) * rng.choice([-1, 1], (3, 3))
    phase = rng.uniform(0, 2 * np.pi, 3)

    def field(x, y, z):
        u = (z + np.float32(center_z_mm + 25)) / np.float32(85)
        rise = np.exp(-u * u)
        wall = np.exp(-((x / 118) ** 4) - ((y + 22) / 66) ** 4).astype(np.float32)
        dz = np.float32(-reach) * rise * wall
        # The chest also gets thinner from front to back when breathing out.
        dy = np.float32(reach / 12) * rise * (1 + np.tanh(-y / np.float32(60)))
        moved = [np.zeros_like(x), -dy, dz]
        for i in range(3):
            angle = sum(
                np.float32(w) * c for w, c in zip(wave[i], (x, y, z), strict=True)
            )
            ripple = np.sin(angle + np.float32(phase[i]))
            moved = [
                m + np.float32(s) * ripple for m, s in zip(moved, size[i], strict=True)
            ]
        return moved

    return field


def waves(rng: np.random.Generator) -> Callable:
    """A random field without folds: (x, y, z) -> (dx, dy, dz), all mm.

    Five sine waves of 150 to 300 mm; `synthetic.deformed_pair` says why none folds.
    """
    ways, axes = rng.standard_normal((2, 5, 3))
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    turn = 2 * np.pi / rng.uniform(150, 300, 5)  # per mm
    steep = rng.uniform(0.5, 1.5, 5)
    size = 0.5 * steep / steep.sum() / turn  # mm; sizes times turns add up to 0.5
    phase = rng.uniform(0, 2 * np.pi, 5)

    def field(x, y, z):
        moved = [np.zeros_like(x)] * 3
        for k in range(5):
            a, b, c = np.float32(turn[k] * axes[k])
            ripple = np.sin(a * x + b * y + c * z + np.float32(phase[k]))
            moved = [
                m + np.float32(size[k] * way) * ripple
                for m, way in zip(moved, ways[k], strict=True)
            ]
        return moved

    return field


def invert(field: Callable, x, y, z) -> list[np.ndarray]:
    """The way back: v(p) = -field(p + v(p)), by fixed point iteration.

    Args:
        field: (x, y, z) -> (dx, dy, dz), mm, of slope below 1.
        x, y, z: [X, Y, Z] float32, mm.

    Returns:
        Three components, mm, to 0.001 mm.

    Raises:
        ValueError: it does not settle: the field is too steep.
    """
    back = [np.zeros_like(x)] * 3
    for _ in range(60):
        moved = field(*(p + v for p, v in zip((x, y, z), back, strict=True)))
        change = max(
            float(np.abs(m + v).max()) for m, v in zip(moved, back, strict=True)
        )
        back = [-m for m in moved]
        if change < 1e-3:
            return back
    raise ValueError(f"field must have slopes below 1; still {change:.3f} mm off")
