"""Parts that head and torso share: skin, fat, muscle, bone, spine."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_pipeline.phantoms import shapes
from data_pipeline.phantoms.canvas import Canvas


def paint_layers(canvas: Canvas, skin: np.ndarray, fat_mm, muscle_hu: float) -> None:
    """Skin, subcutaneous fat, and muscle with fat between its bundles.

    `skin` [X, Y, Z] is the signed distance to the surface, mm.
    """
    depth = -skin
    canvas.skin = skin + 2
    x, y, z = canvas.x, canvas.y, canvas.z
    grain = canvas.noise(x, y, z, 14.0)
    fat = np.float32(-104) + 7 * grain
    # Where the noise crosses zero there is a thin sheet: fat between muscle bundles.
    sheet = np.clip(1.6 - 7 * np.abs(canvas.noise(x, y, z / 3, 22.0, 11.0)), 0, 1)
    muscle = np.float32(muscle_hu) + 6 * grain - np.float32(95) * sheet
    inner = np.clip((depth - fat_mm) / canvas.edge + 0.5, 0, 1)
    hu = fat + inner * (muscle - fat)
    outer = np.clip((3 - depth) / canvas.edge + 0.5, 0, 1)
    hu += outer * (20 - hu) * np.float32(min(1.0, 3.0 / canvas.edge))
    body = np.clip(depth / canvas.edge + 0.5, 0, 1)
    canvas.hu += body * (hu - canvas.hu)


def bone(canvas: Canvas, rim_hu: float, marrow_hu: float, rim_mm: float = 2.5):
    """HU of a bone: dense rim, spongy inside."""
    rim_mm = max(rim_mm, 0.7 * float(canvas.edge))

    def value(x, y, z, d):
        rim = np.clip((d + rim_mm) / rim_mm + 0.5, 0, 1)
        spongy = marrow_hu + 45 * canvas.noise(x, y, z, 7.0, 5.0)
        return spongy + rim * (rim_hu - spongy)

    return value


class Column(NamedTuple):
    """A spine: where its bodies lie and how large they are, mm."""

    body_y: Callable  # z -> y of the vertebral bodies' centre
    radii: tuple[float, float]
    pitch: float
    canal_back: float  # from the body's centre to the canal's
    canal_radius: float
    spinous: float  # length of the spinous process
    low: float
    high: float


def paint_spine(
    canvas: Canvas, column: Column, label: str | None, cord: str | None
) -> None:
    """Vertebral bodies, discs, arches, processes, canal and cord."""
    rx, ry = column.radii
    reach = column.canal_back + column.canal_radius + column.spinous + 12
    centers = [float(column.body_y(np.float32(z))) for z in (column.low, column.high)]
    middle = float(column.body_y(np.float32((column.low + column.high) / 2)))
    low = (-3 * rx, min(*centers, middle) - ry - 25, column.low)
    high = (3 * rx, max(*centers, middle) + reach, column.high)

    def level(z):
        """mm from the middle of the vertebra at this height."""
        return (
            np.abs(z / column.pitch - np.floor(z / column.pitch) - 0.5) * column.pitch
        )

    def place(x, y, z):
        return y - column.body_y(z), level(z)

    def body(x, y, z):
        y, t = place(x, y, z)
        flare = 1 + 0.10 * (2 * t / column.pitch) ** 2
        return shapes.radial(x, y, rx * flare, ry * flare, 2.4)

    def disc_free(x, y, z):
        return level(z) - (0.5 * column.pitch - 0.11 * column.pitch)

    def ends(x, y, z):
        return np.maximum(column.low - z, z - column.high)

    def arch(x, y, z):
        y, t = place(x, y, z)
        y = y - column.canal_back
        ring = np.abs(np.sqrt(x * x + y * y) - (column.canal_radius + 3)) - 3
        ring = np.maximum(ring, t - 0.34 * column.pitch)
        side = np.maximum(np.abs(y + 6) - 5, np.abs(x) - 1.75 * rx)
        side = np.maximum(side, np.maximum(t - 5, column.canal_radius - np.abs(x)))
        slant = level(z + 0.35 * np.maximum(y - column.canal_radius, 0))
        back = np.maximum(np.abs(x) - 3.5, slant - 0.26 * column.pitch)
        start, stop = column.canal_radius, column.canal_radius + 5 + column.spinous
        back = np.maximum(back, np.maximum(start - y, y - stop))
        return np.minimum(np.minimum(ring, side), back)

    def canal(radius):
        def sdf(x, y, z):
            y, _ = place(x, y, z)
            y = y - column.canal_back
            return np.sqrt(x * x + y * y) - radius

        return sdf

    whole = shapes.Shape(body, np.array(low), np.array(high))
    canvas.paint(shapes.within(whole, ends), 95, label, texture=8)  # discs
    bodies = shapes.within(whole, disc_free, ends)
    canvas.paint(bodies, bone(canvas, 620, 210), label)
    arches = shapes.Shape(arch, np.array(low), np.array(high))
    canvas.paint(shapes.within(arches, ends), bone(canvas, 640, 330, 2.0), label)
    tunnel = shapes.Shape(canal(column.canal_radius), np.array(low), np.array(high))
    canvas.paint(shapes.within(tunnel, ends), 12)
    cord_shape = shapes.Shape(
        canal(0.62 * column.canal_radius), np.array(low), np.array(high)
    )
    canvas.paint(shapes.within(cord_shape, ends), 40, cord)
