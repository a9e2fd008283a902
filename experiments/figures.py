"""Pictures of a registration: slices, checkerboard, field."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from unireg_jax.imaging import preprocess
from unireg_jax.imaging.nifti import Volume

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402

AIR_HU = -1000
WINDOW = (-400.0, 400.0)  # HU shown from black to white
_PLANES = ("sagittal", "coronal", "axial")


def prealigned(moving: Volume, fixed: Volume, affine: np.ndarray) -> np.ndarray:
    """Moving scan on the fixed grid through the affine alone, air beyond it."""
    grid = preprocess.Grid(fixed.data.shape, fixed.vox2world)
    return preprocess.resample(moving, grid, fill=AIR_HU, matrix=affine)


def save_registration(
    path: Path | str,
    fixed: np.ndarray,
    moving: np.ndarray,
    warped: np.ndarray,
    disp_mm: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    title: str = "",
    labels: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """Draws fixed, moving, warped, checkerboard and field in three planes.

    Args:
        path: PNG file.
        fixed: [X, Y, Z] HU, LPS+ axes.
        moving: [X, Y, Z] HU, resampled to the fixed grid before registration.
        warped: [X, Y, Z] HU, after registration.
        disp_mm: [X, Y, Z, 3] LPS mm, of what the network added.
        spacing_mm: (x, y, z).
        title: line above.
        labels: fixed and warped label maps [X, Y, Z], drawn as outlines: fixed green
            on every picture, warped red on `warped`.
    """
    middle = [n // 2 for n in fixed.shape]
    if labels is not None and labels[0].any():
        middle = [int(np.median(i)) for i in np.nonzero(labels[0])]
    figure, axes = plt.subplots(3, 5, figsize=(15, 9.5))
    length = np.linalg.norm(disp_mm, axis=-1)
    for row, plane in enumerate(_PLANES):

        def cut(volume, row=row):
            return np.take(volume, middle[row], axis=row)

        first, second = [a for a in range(3) if a != row]
        aspect = spacing_mm[second] / spacing_mm[first]
        pictures = {
            "fixed": cut(fixed),
            "moving": cut(moving),
            "warped": cut(warped),
            "checkerboard": _checkerboard(cut(fixed), cut(warped)),
        }
        for column, (name, picture) in enumerate(pictures.items()):
            axis = axes[row, column]
            _show(axis, picture, aspect, row)
            axis.set_title(f"{name}, {plane}", fontsize=9)
            if labels is not None:
                _outline(axis, cut(labels[0]), "lime")
                if name == "warped":
                    _outline(axis, cut(labels[1]), "red")
        axis = axes[row, 4]
        _show(axis, cut(fixed), aspect, row)
        _draw_grid(axis, cut(disp_mm), (first, second), spacing_mm)
        axis.set_title(f"field, max {length.max():.1f} mm", fontsize=9)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def save_cuts(
    path: Path | str,
    cuts: Sequence[tuple[str, np.ndarray]],
    *,
    columns: int,
    window: tuple[float, float] = WINDOW,
) -> None:
    """Draws cuts, each with a cross at its middle sample, or between its middle two.

    Args:
        path: PNG file.
        cuts: title and [A, Z] HU each, of equal steps along both, Z up; row by row.
        columns: of the picture.
        window: HU from black to white.
    """
    rows = -(-len(cuts) // columns)
    size = (2.6 * columns, 2.8 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, cut) in zip(axes.flat, cuts, strict=False):
        _show(axis, cut, aspect=1, row=1, window=window)
        middle = [(n - 1) / 2 for n in cut.shape]
        axis.plot(*middle, "+", color="orange", markersize=16)
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _show(axis, picture: np.ndarray, aspect: float, row: int, window=WINDOW) -> None:
    """Superior up in sagittal and coronal planes, anterior up in axial ones."""
    origin = "upper" if row == 2 else "lower"
    axis.imshow(
        picture.T,
        origin=origin,
        cmap="gray",
        vmin=window[0],
        vmax=window[1],
        aspect=aspect,
    )
    axis.set_axis_off()


def _checkerboard(a: np.ndarray, b: np.ndarray, *, squares: int = 8) -> np.ndarray:
    x, y = np.indices(a.shape)
    edge = max(1, max(a.shape) // squares)
    return np.where((x // edge + y // edge) % 2 == 0, a, b)


def _outline(axis, labels: np.ndarray, color: str) -> None:
    for label in np.unique(labels):
        if label and (labels == label).sum() > 3:
            axis.contour((labels == label).T, [0.5], colors=color, linewidths=0.7)


def _draw_grid(axis, disp_mm: np.ndarray, plane, spacing_mm, *, lines: int = 24):
    """The grid x + u(x), as the moving image is read."""
    x, y = np.indices(disp_mm.shape[:2]).astype(float)
    x = x + disp_mm[..., plane[0]] / spacing_mm[plane[0]]
    y = y + disp_mm[..., plane[1]] / spacing_mm[plane[1]]
    step = max(1, max(disp_mm.shape[:2]) // lines)
    for i in range(0, x.shape[0], step):
        axis.plot(x[i], y[i], color="cyan", linewidth=0.5)
    for j in range(0, x.shape[1], step):
        axis.plot(x[:, j], y[:, j], color="cyan", linewidth=0.5)


def save_curves(
    path: Path | str,
    panels: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]],
    *,
    marks: Sequence[int] = (),
) -> None:
    """Draws named curves over steps, one panel beside the other.

    Args:
        path: PNG to write.
        panels: what goes up -> name of a curve -> (steps, values).
        marks: steps to draw a line at.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6 * len(panels), 4), squeeze=False
    )
    for axis, (up, curves) in zip(axes[0], panels.items(), strict=True):
        for name, (steps, values) in curves.items():
            marker = "o" if len(steps) < 20 else None
            axis.plot(steps, values, label=name, marker=marker)
        for step in marks:
            axis.axvline(step, color="grey", linestyle=":")
        axis.set_xlabel("step")
        axis.set_ylabel(up)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


class Setting(NamedTuple):
    """One value of a setting, and what was measured with it.

    Attributes:
        text: the value.
        default: whether it is the default, then drawn larger.
        measured: name with unit -> number.
    """

    text: str
    default: bool
    measured: Mapping[str, float]


def save_settings(
    path: Path | str,
    lines: Mapping[str, Sequence[Setting]],
    *,
    across: Sequence[str],
    up: Sequence[str],
) -> None:
    """Draws measures against each other: a column for each of `across`, a row of `up`.

    Args:
        path: PNG file.
        lines: name of a setting -> its values.
        across: names of measures; one of seconds has a logarithmic axis.
        up: names of measures.
    """
    size = (4.5 * len(across), 3.4 * len(up))
    figure, axes = plt.subplots(len(up), len(across), figsize=size, squeeze=False)
    for row, y in zip(axes, up, strict=True):
        for axis, x in zip(row, across, strict=True):
            for name, settings in lines.items():
                xs, ys = ([s.measured[key] for s in settings] for key in (x, y))
                (drawn,) = axis.plot(xs, ys, marker=".", label=name)
                for setting, *at in zip(settings, xs, ys, strict=True):
                    axis.annotate(
                        setting.text,
                        at,
                        textcoords="offset points",
                        xytext=(3, 3),
                        fontsize=7,
                        color=drawn.get_color(),
                    )
                    if setting.default:
                        axis.plot(
                            *at, marker="o", markersize=9, color="black", zorder=0
                        )
            if x.startswith("seconds"):
                axis.set_xscale("log")
            axis.set_xlabel(x)
            axis.set_ylabel(y)
    axes[0, 0].legend(title="black: the default")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
