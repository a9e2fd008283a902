"""Outlines of labels as paths of SVG: sharp at any size, and of few letters.

A path joins the middles of the edges of a label's pixels, which cuts the corners of
stairs, a quarter of a pixel within the label: of two that touch, both lines are seen.
"""

from collections.abc import Set

import numpy as np

UNITS = 4  # of a path's coordinates, per pixel
MOST_EDGES = 20_000  # of pixels, in one slice
# Name -> title, key that shows and hides it, how to read it. Drawn in this order.
LAYERS = {
    "fixed": ("Fixed labels", "f", "dashed: labels of the fixed scan"),
    "warped": ("Warped labels", "l", "solid: labels of the moving scan, warped"),
}
# Sides of a pixel, clockwise from the upper one: where the pixel beyond lies, and from
# which of the corners the side begins, in rows and columns.
_BEYOND = ((-1, 0), (0, 1), (1, 0), (0, -1))
_BEGINS = ((0, 0), (0, 1), (1, 1), (1, 0))
# From there to the point of the path, x and y in UNITS: half a side, a quarter inwards.
_POINT = np.array([(2, 1), (-1, 2), (-2, -1), (1, -2)])


def trace(labels: np.ndarray) -> dict[int, str] | None:
    """Follows the borders of all labels in a slice.

    Args:
        labels: [rows, columns] whole numbers, 0 background.

    Returns:
        Label -> path, the attribute `d`, in UNITS from the first pixel's outer corner,
        labels in their order. None if the slice has more than MOST_EDGES: noise has.
    """
    rows, columns = labels.shape
    stride, corners = columns + 1, (rows + 1) * (columns + 1)
    padded = np.pad(labels.astype(np.int64), 1)
    own = padded[1:-1, 1:-1]
    found = []  # a number for each side of a pixel: label, corner, direction
    for side, ((down, right), begins) in enumerate(zip(_BEYOND, _BEGINS, strict=True)):
        beyond = padded[1 + down :, 1 + right :][:rows, :columns]
        row, column = np.nonzero((own != 0) & (own != beyond))
        corner = (row + begins[0]) * stride + column + begins[1]
        found.append((own[row, column] * corners + corner) * 4 + side)
    edges = np.sort(np.concatenate(found)).tolist()
    if len(edges) > MOST_EDGES:
        return None
    known, done, paths = frozenset(edges), set(), {}
    for edge in edges:
        if edge not in done:
            loop = _loop(edge, known, stride)
            done.update(loop)
            label = edge // (4 * corners)
            path = _path(np.array(loop) % (4 * corners), stride)
            paths[label] = paths.get(label, "") + path
    return paths


def _loop(first: int, edges: Set[int], stride: int) -> list[int]:
    """The edges of one border, in their order."""
    steps = (4, 4 * stride, -4, -4 * stride)
    loop = [first]
    while True:
        side = loop[-1] % 4
        corner = loop[-1] - side + steps[side]
        # Clockwise first: pixels that share a corner alone have borders of their own.
        turns = (corner + (side + turn) % 4 for turn in (1, 0, 3))
        edge = next(edge for edge in turns if edge in edges)
        if edge == first:
            return loop
        loop.append(edge)


def _path(loop: np.ndarray, stride: int) -> str:
    """A closed path, with a point wherever its direction changes."""
    row, column = np.divmod(loop // 4, stride)
    points = UNITS * np.stack([column, row], axis=-1) + _POINT[loop % 4]
    x, y = (np.roll(points, -1, axis=0) - points).T
    turns = np.roll(x, 1) * y != np.roll(y, 1) * x
    points = points[turns]
    steps = np.diff(points, axis=0).ravel()
    (left, top), moves = points[0], " ".join(map(str, steps))
    return f"M{left} {top}l{moves}z".replace(" -", "-")
