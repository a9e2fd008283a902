"""Pictures of a registered pair, drawn with NumPy, for the log of a run.

A row per mid-plane (axial, coronal, sagittal); its panels are fixed, moving, warped,
their difference and the field.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from unireg_jax import png

_EDGE = 192  # least pixels of a panel's longer side
_GAP = 2  # pixels between panels
_GRID = 8  # voxels between two lines of the grid
_FULL = 10.0  # voxels of displacement that have the full colour
_FIXED, _MOVING = (64, 220, 90), (235, 80, 200)  # contours
_LINES = (235, 235, 235)
_GLOW = (230, 120, 30)


def draw_pair(planes: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
    """Draws one pair.

    Green contours are the fixed labels, magenta those of moving or warped. The last
    panel shows the moving image's grid, a line every 8 voxels, as the field bends it;
    the more orange, the longer the displacement, up to 10 voxels.

    Args:
        planes: from `step.mid_planes`, of one pair without the batch axis: fixed,
            moving, warped [n, m] in [-1, 1]; fixed_labels, moving_labels,
            warped_labels [n, m]; disp [n, m, 3] in voxels. Each for the planes across
            X, Y and Z.

    Returns:
        [H, W, 3] uint8; axial as seen from the feet, patient's left on the right.
    """
    rows = [_row({k: v[axis] for k, v in planes.items()}, axis) for axis in (2, 1, 0)]
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(r, ((0, _GAP), (0, width - r.shape[1]), (0, 0))) for r in rows]
    return np.concatenate(padded)[:-_GAP]


def encode_png(rgb: np.ndarray) -> bytes:
    """Encodes [H, W, 3] uint8 as a PNG file."""
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"rgb must be [H, W, 3] uint8, got {rgb.shape} {rgb.dtype}")
    return png.encode(rgb)


def _row(plane: Mapping[str, np.ndarray], axis: int) -> np.ndarray:
    """The five panels of one plane, side by side."""
    times = max(1, -(-_EDGE // max(plane["fixed"].shape)))
    grey = {k: _grey(plane[k], times, axis) for k in ("fixed", "moving", "warped")}
    edges = {
        k: _edges(_enlarge(_upright(plane[f"{k}_labels"], axis), times)) for k in grey
    }
    difference = np.abs(plane["fixed"] - plane["warped"]) - 1  # [0, 2] to [-1, 1]
    panels = [
        _paint(grey["fixed"], (edges["fixed"], _FIXED)),
        *(
            _paint(grey[k], (edges["fixed"], _FIXED), (edges[k], _MOVING))
            for k in ("moving", "warped")
        ),
        _grey(difference, times, axis),
        _field(plane["disp"], times, axis),
    ]
    spaced = [np.pad(p, ((0, 0), (0, _GAP), (0, 0))) for p in panels]
    return np.concatenate(spaced, axis=1)[:, :-_GAP]


def _upright(plane: np.ndarray, axis: int) -> np.ndarray:
    """First array axis to the right, second down; superior, of LPS+'s Z, is up."""
    plane = plane.swapaxes(0, 1)
    return plane if axis == 2 else plane[::-1]


def _enlarge(plane: np.ndarray, times: int) -> np.ndarray:
    return plane.repeat(times, axis=0).repeat(times, axis=1)


def _grey(plane: np.ndarray, times: int, axis: int) -> np.ndarray:
    """[-1, 1] from black to white; what is not finite is black."""
    level = np.nan_to_num(np.clip((plane + 1) * 127.5, 0, 255)).astype(np.uint8)
    return _enlarge(_upright(level, axis), times)[..., None].repeat(3, axis=2)


def _edges(labels: np.ndarray) -> np.ndarray:
    """True where the next pixel right or down has another number."""
    out = np.zeros(labels.shape, bool)
    out[:-1] |= labels[:-1] != labels[1:]
    out[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    return out


def _paint(panel: np.ndarray, *layers: tuple[np.ndarray, tuple]) -> np.ndarray:
    panel = panel.copy()
    for where, colour in layers:
        panel[where] = colour
    return panel


def _field(disp: np.ndarray, times: int, axis: int) -> np.ndarray:
    """The bent grid on a ground that glows with the displacement."""
    disp = np.nan_to_num(disp.astype(np.float32))
    sizes = [n * times for n in disp.shape[:2]]
    places = [(np.arange(n) + 0.5) / times - 0.5 for n in sizes]
    inside = [a for a in range(3) if a != axis]
    smooth = _interpolate(_interpolate(disp, places[0], 0), places[1], 1)
    length = np.sqrt((smooth**2).sum(-1, keepdims=True))
    ground = np.minimum(length / _FULL, 1) * np.array(_GLOW, np.float32)
    lines = np.zeros(sizes, np.int32)
    for i, component in enumerate(inside):
        start = places[i].reshape((-1, 1) if i == 0 else (1, -1))
        cell = np.floor((start + smooth[..., component]) / _GRID).astype(np.int32)
        lines = lines * 4096 + cell  # another number in every cell of the grid
    panel = _upright(ground.astype(np.uint8), axis)
    return _paint(panel, (_edges(_upright(lines, axis)), _LINES))


def _interpolate(values: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
    """Linear along one axis; beyond the ends, the end's value."""
    places = np.clip(places, 0, values.shape[axis] - 1)
    low = np.minimum(places.astype(int), max(values.shape[axis] - 2, 0))
    high = np.minimum(low + 1, values.shape[axis] - 1)
    shape = [1] * values.ndim
    shape[axis] = -1
    share = (places - low).reshape(shape).astype(np.float32)
    return values.take(low, axis) * (1 - share) + values.take(high, axis) * share
