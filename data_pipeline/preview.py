"""Pictures of a data set: three slices per scan with the outlines of its labels.

    python -m data_pipeline.preview --data prepared --out pictures
    python -m data_pipeline.preview --manifest scans.csv --out pictures
    python -m data_pipeline.preview --dataset amos --raw FOLDER --out pictures

Writes contact sheets, `<task>.png` and so on, and `index.html` with the same pictures
inside it: one file to look through or to send. `--data` shows what a network sees,
the others the raw scans. Patients are seen from their feet and from the front: their
right is on the left of the picture. Needs the extra `report`.
"""

import argparse
import base64
import html
import io
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm
from scipy import ndimage

from data_pipeline import parallel, prepare, sources, store
from data_pipeline.datasets import manifest
from data_pipeline.datasets.manifest import Record
from unireg_jax.errors import (
    FAILED,
    NOTHING,
    PARTLY,
    PREEMPTED,
    USAGE,
    UserError,
    spelled_out,
    tell,
)
from unireg_jax.imaging.colors import label_colors
from unireg_jax.tasks import OUTSIDE_HU, TASKS

try:
    from matplotlib import image as mpl_image
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ModuleNotFoundError:  # an extra; the command says so
    Figure = None

# HU shown from black to white: where lung is looked at, its vessels must be seen.
WINDOWS = dict.fromkeys(TASKS, (-500.0, 500.0))
WINDOWS |= dict.fromkeys(("chest", "lung"), (-1000.0, 500.0))
TILE = 300  # pixels along the longer side of a picture
_OUTSIDE = (18, 22, 60)  # dark blue: the network grid beyond the scan
_PER_PAGE = 12
_LEGEND = 28  # structures named on a contact sheet
# (axis cut across, name, left edge, upper edge); LPS axes grow to left, back and head.
PLANES = ((2, "axial", "R", "A"), (1, "coronal", "R", "S"), (0, "sagittal", "A", "S"))


class Job(NamedTuple):
    """One scan to draw.

    Attributes:
        task: name of its task.
        id: its name.
        caption: split, subject and so on.
        names: the task's vocabulary; id i + 1 of the drawn labels is names[i].
        spacing_mm: of prepared arrays; None for a raw scan.
        source: manifest.Record, or the entry of a prepared index.
        root: the prepared folder; None for a raw scan.
    """

    task: str
    id: str
    caption: str
    names: tuple[str, ...]
    spacing_mm: tuple[float, ...] | None
    source: Any
    root: str | None


class Drawing(NamedTuple):
    """A scan's pictures, or why there are none.

    Attributes:
        job: as given.
        tiles: three [H, W, 3] uint8, in the order of PLANES; () with a problem.
        shown: positions in job.names of the structures that are outlined.
        problem: one line, or "".
    """

    job: Job
    tiles: tuple[np.ndarray, ...]
    shown: tuple[int, ...]
    problem: str


def jobs_of_prepared(root: Path | str) -> list[Job]:
    """Lists the scans of a prepared folder.

    Args:
        root: written by `data_pipeline.prepare`.

    Raises:
        UserError: see `store.read_index`.
    """
    index = store.read_index(root)
    spacing = tuple(float(v) for v in index["spec"]["spacing_mm"])
    return [
        Job(
            volume["task"],
            volume["id"],
            f"{volume['split']}, subject {volume['subject']}",
            tuple(index["tasks"][volume["task"]]["labels"]),
            spacing,
            volume,
            str(root),
        )
        for volume in index["volumes"]
    ]


def jobs_of_records(records: Sequence[Record]) -> list[Job]:
    """Lists raw scans.

    Args:
        records: from a manifest or an adapter.
    """
    names = manifest.vocabulary(records)
    return [
        Job(
            record.task,
            record.id,
            f"{record.split}, subject {record.subject}",
            names[record.task],
            None,
            record,
            None,
        )
        for record in records
    ]


def draw(job: Job) -> Drawing:
    """Draws one scan; a fault becomes its picture's text.

    Args:
        job: see Job.

    Returns:
        Drawing.
    """
    try:
        hu, labels, spacing = _load(job)
        counts = [_plane_counts(labels, axis, len(job.names)) for axis, *_ in PLANES]
        tiles = []
        for (axis, *_), count in zip(PLANES, counts, strict=True):
            cut = [np.take(a, _plane(count), axis=axis) for a in (hu, labels)]
            tiles.append(_tile(job, *cut, axis, spacing))
        shown = tuple(np.flatnonzero(counts[0].sum(axis=0)[1:]).tolist())
        return Drawing(job, tuple(tiles), shown, "")
    except UserError as error:
        # The reader's line begins with a path, which is no one's business.
        line = str(error)
        line = line[max(0, line.find(f"{error.reason}: ")) :]
    except MemoryError:
        line = "out_of_memory: fewer --workers"
    except OSError as error:  # its text names a path, too
        line = f"storage: {error.strerror or type(error).__name__}"
    except Exception as error:  # a fault of ours: named, and the others still drawn
        line = f"internal: {type(error).__name__}: {error}"
    return Drawing(job, (), (), " ".join(line.split()))


def _load(job: Job) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU, labels in the task's vocabulary (zeros without), spacing in mm."""
    if job.root is not None:
        hu = store.read_array(job.root, job.source, "image")
        if job.source["labels"] is None:
            labels = np.zeros(hu.shape, np.uint8)
        else:
            labels = store.read_array(job.root, job.source, "labels")
        return hu, labels, np.array(job.spacing_mm)
    image = sources.read_scan(job.source)
    layers, _ = sources.read_layers(job.source, image, job.names)
    # Where structures overlap, the first is drawn.
    labels = np.zeros(image.data.shape, np.uint8) if layers is None else layers[0]
    return image.data, labels, np.array(image.spacing_mm)


def _plane_counts(labels: np.ndarray, axis: int, names: int) -> np.ndarray:
    """[n, ids]: voxels of every id in each plane across one axis."""
    planes = np.moveaxis(labels, axis, 0)
    return np.stack([np.bincount(p.ravel(), minlength=names + 1) for p in planes])


def _plane(counts: np.ndarray) -> int:
    """The plane that cuts most structures; of those, the one nearest to the middle."""
    cut = (counts[:, 1:] > 3).sum(axis=1)
    best = np.flatnonzero(cut == cut.max())
    return int(best[np.abs(best - (len(counts) - 1) / 2).argmin()])


def _tile(job: Job, picture: np.ndarray, drawn: np.ndarray, axis: int, spacing_mm):
    """[H, W, 3] uint8: one slice in true proportions, outlines on it."""
    spacing = np.delete(spacing_mm, axis)
    if job.root is None:  # of a prepared scan, its place on the grid counts, too
        box = _box((picture > -500) | (drawn > 0), spacing)
        picture, drawn = picture[box], drawn[box]
    size = np.array(picture.shape) * spacing
    sides = [max(1, round(TILE * side / max(size))) for side in size]
    places = [
        (np.arange(pixels) + 0.5) * n / pixels - 0.5
        for n, pixels in zip(picture.shape, sides, strict=True)
    ]
    if axis != 2:
        places[1] = places[1][::-1]  # the head is up; in axial slices the front is
    where = np.meshgrid(*places)
    nearest = tuple(
        np.clip(np.rint(c), 0, n - 1).astype(int)
        for c, n in zip(where, picture.shape, strict=True)
    )
    outside = picture == OUTSIDE_HU
    values = np.where(outside, -1000, picture).astype(np.float32)
    gray = ndimage.map_coordinates(values, where, order=1, mode="nearest")
    low, high = WINDOWS[job.task]
    gray = np.clip((gray - low) / (high - low), 0, 1)
    tile = np.repeat((255 * gray).astype(np.uint8)[..., None], 3, axis=2)
    tile[outside[nearest]] = _OUTSIDE
    edges = _edges(drawn[nearest])
    tile[edges > 0] = label_colors(len(job.names))[edges[edges > 0] - 1]
    return tile


def _box(mask: np.ndarray, spacing: np.ndarray) -> tuple[slice, slice]:
    """The mask's bounding box and 10 mm around it."""
    box = []
    for axis in (0, 1):
        there = np.flatnonzero(mask.any(axis=1 - axis))
        margin = 1 + round(10 / spacing[axis])
        low, high = (there[0], there[-1]) if there.size else (0, mask.shape[axis])
        box.append(slice(max(0, low - margin), high + margin + 1))
    return box[0], box[1]


def _edges(labels: np.ndarray) -> np.ndarray:
    """The label at its own border, 0 elsewhere."""
    padded = np.pad(labels, 1, mode="edge")
    same = np.ones(labels.shape, bool)
    for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
        height, width = labels.shape
        same &= padded[dy : dy + height, dx : dx + width] == labels
    return np.where(same, 0, labels)


# --- pages ---


def write(out: Path | str, drawings: Sequence[Drawing], left_out: int = 0) -> list[str]:
    """Writes contact sheets and the HTML page.

    Args:
        out: folder; made if absent.
        drawings: of all tasks.
        left_out: scans that were not drawn; the page says so.

    Returns:
        Names of the files.

    Raises:
        UserError: `not_installed`: the extra is absent; `storage`.
    """
    _need_matplotlib()
    out = store.make_folders(out)
    names = []
    groups = _by_task(drawings)
    for task, members in groups.items():
        pages = math.ceil(len(members) / _PER_PAGE)
        for page in range(pages):
            name = f"{task}.png" if page == 0 else f"{task}_{page + 1}.png"
            part = members[page * _PER_PAGE : (page + 1) * _PER_PAGE]
            title = f"{task}, {page + 1} of {pages}" if pages > 1 else task
            store.write_atomic(out / name, _sheet(title, part))
            names.append(name)
    store.write_atomic(out / "index.html", _page(groups, left_out).encode())
    return [*names, "index.html"]


def _need_matplotlib() -> None:
    if Figure is None:
        raise UserError(
            "not_installed",
            "preview: matplotlib expected, it is not installed; pip install "
            "unireg-jax[report]",
            USAGE,
        )


def _by_task(drawings: Iterable[Drawing]) -> dict[str, list[Drawing]]:
    """Tasks in the order of TASKS, scans in their own."""
    drawings = list(drawings)
    groups = {t: [d for d in drawings if d.job.task == t] for t in TASKS}
    return {task: members for task, members in groups.items() if members}


def _sheet(title: str, drawings: Sequence[Drawing]) -> bytes:
    """One contact sheet as PNG: two scans a row, three planes each."""
    rows = math.ceil(len(drawings) / 2)
    shown = {i for drawing in drawings for i in drawing.shown}
    listed = sorted(shown)[:_LEGEND]
    head, row, foot = 0.6, 3.4, 0.2 + 0.24 * math.ceil(len(listed) / 7)  # inches
    height = head + rows * row + foot
    figure = Figure(figsize=(6 * 3.1, height), dpi=100, facecolor="white")
    figure.suptitle(_latin(title), fontsize=15, y=1 - 0.1 / height, parse_math=False)
    for number, drawing in enumerate(drawings):
        line, half = divmod(number, 2)
        left, top = 0.005 + half / 2, 1 - (head + line * row) / height
        text = _latin(f"{drawing.job.id}  ({drawing.job.caption})")
        figure.text(left, top, text, fontsize=12, va="top", parse_math=False)
        if drawing.problem:
            text, place = _latin(_folded(drawing.problem)), top - 0.5 / height
            style = dict(fontsize=11, color="firebrick", va="top", parse_math=False)
            figure.text(left, place, text, **style)
        for i, tile in enumerate(drawing.tiles):
            place = (left + i * 0.164, top - (row - 0.1) / height, 0.162, 3.0 / height)
            _show(figure.add_axes(place, anchor="NW"), tile, PLANES[i])
    if listed:
        names = drawings[0].job.names
        colors = label_colors(len(names)) / 255
        patches = [Patch(color=colors[i], label=_latin(names[i])) for i in listed]
        legend = figure.legend(handles=patches, loc="lower center", ncols=7, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _show(axis: Any, tile: np.ndarray, plane: tuple[int, str, str, str]) -> None:
    """One picture, with the letters of its left and upper edge."""
    axis.set_axis_off()
    axis.imshow(tile, interpolation="nearest")
    style = dict(color="yellow", fontsize=11, transform=axis.transAxes)
    axis.text(0.01, 0.5, plane[2], va="center", **style)
    axis.text(0.5, 0.99, plane[3], ha="center", va="top", **style)


def _latin(text: str) -> str:
    """Printable Latin text: a font lacks other letters, and would only warn."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text.encode("latin-1", "backslashreplace").decode("latin-1")


def _folded(text: str) -> str:
    """Lines of at most about 60 letters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > 60:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(line.strip() for line in lines)


_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5em; color: #222; }
figure { display: inline-block; margin: 0 1em 1.2em 0; vertical-align: top; }
figure img { display: block; background: #000; }
figcaption { max-width: 900px; overflow-wrap: anywhere; }
.problem { color: #a00; }
.names span { display: inline-block; margin-right: 1em; }
.names i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
"""


def _page(groups: Mapping[str, Sequence[Drawing]], left_out: int) -> str:
    """The whole page; nothing in it is loaded from elsewhere, all text is escaped."""
    total = sum(len(members) for members in groups.values())
    note = f"; {left_out} more were left out (--most)" if left_out else ""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        # No script, no link to the outside, whatever an id holds.
        '<meta http-equiv="Content-Security-Policy" content="default-src '
        "'none'; img-src data:; style-src 'unsafe-inline'\">",
        f"<title>{total} scans</title><style>{_STYLE}</style></head><body>",
        f"<h1>{total} scans</h1>",
        "<p>Axial, coronal and sagittal: the slices that cut most structures. The "
        "patient's right is on the left, the front on the left of sagittal slices. "
        f"Dark blue lies beyond the scan{note}.</p>",
    ]
    for task, members in groups.items():
        low, high = WINDOWS[task]
        parts.append(f"<h2>{_escaped(task)}: {len(members)}</h2>")
        parts.append(f"<p>{low:g} to {high:g} HU from black to white.</p>")
        names = members[0].job.names
        colors = label_colors(len(names))
        shown = sorted({i for drawing in members for i in drawing.shown})
        spans = [
            f'<span><i style="background:rgb({colors[i][0]},{colors[i][1]},'
            f'{colors[i][2]})"></i>{_escaped(names[i])}</span>'
            for i in shown
        ]
        parts.append(f'<p class="names">{"".join(spans)}</p>')
        parts += [_figure(drawing) for drawing in members]
    return "\n".join([*parts, "</body></html>", ""])


def _figure(drawing: Drawing) -> str:
    job = drawing.job
    caption = f"<b>{_escaped(job.id)}</b> {_escaped(job.caption)}"
    caption += f", {len(drawing.shown)} structures" if drawing.tiles else ""
    if drawing.problem:
        problem = f'<span class="problem">{_escaped(drawing.problem)}</span>'
        return f"<figure><figcaption>{caption}<br>{problem}</figcaption></figure>"
    height = max(tile.shape[0] for tile in drawing.tiles)
    padded = [
        np.pad(tile, ((0, height - tile.shape[0]), (0, 4), (0, 0)))
        for tile in drawing.tiles
    ]
    buffer = io.BytesIO()
    strip = np.ascontiguousarray(np.concatenate(padded, axis=1))
    mpl_image.imsave(buffer, strip, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    picture = f'<img alt="{_escaped(job.id)}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _escaped(text: str) -> str:
    text = text if text.isprintable() else ascii(text)[1:-1]
    return html.escape(text, quote=True)


# --- command ---


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.preview", description=__doc__.split("\n\n")[2]
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="prepared folder")
    prepare.source_arguments(source, parser)
    parser.add_argument(
        "--task", choices=tuple(TASKS), help="only for --dataset nnunet"
    )
    parser.add_argument("--out", required=True, help="folder for the pictures")
    parser.add_argument(
        "--most",
        type=int,
        default=48,
        metavar="N",
        help="scans drawn of a task, spread over all of them (default: 48)",
    )
    parallel.add_workers(parser)
    return parser


def _spread(jobs: Sequence[Job], most: int) -> list[Job]:
    """At most `most` jobs per task, evenly spaced."""
    kept = []
    for task in TASKS:
        members = [job for job in jobs if job.task == task]
        count = min(len(members), max(1, most))
        kept += [members[i * len(members) // count] for i in range(count)]
    return kept


def _numbered(item: tuple[int, Job]) -> tuple[int, Drawing]:
    number, job = item
    return number, draw(job)


def _died(item: tuple[int, Job]) -> tuple[int, Drawing]:
    number, job = item
    return number, Drawing(job, (), (), "worker_died: often for memory")


def preview(
    jobs: Sequence[Job],
    out: Path | str,
    *,
    most: int = 48,
    workers: int = 1,
    progress: Callable[[Iterable, int], Iterable] = lambda results, total: results,
) -> tuple[list[Drawing], list[str]]:
    """Draws scans and writes the pictures.

    Args:
        jobs: from `jobs_of_prepared` or `jobs_of_records`.
        out: folder.
        most: scans drawn of a task.
        workers: processes.
        progress: wraps the results as they come; takes their number too.

    Returns:
        Drawings and the names of the files written.

    Raises:
        UserError: see `write`.
    """
    _need_matplotlib()
    kept = list(enumerate(_spread(jobs, most)))
    done = dict(progress(parallel.run(_numbered, kept, workers, died=_died), len(kept)))
    drawings = [done[i] for i in range(len(kept))]
    return drawings, write(out, drawings, len(jobs) - len(kept))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code: 0, 2 (usage, manifest, no matplotlib), 3 (no scan), 4 (none could be
        drawn), 5 (some could not), 6 (storage), 75 (interrupted).
    """
    options = _parser().parse_args(argv)

    def bar(results, total):
        return tqdm.tqdm(
            results, total=total, desc="preview", unit="scan", disable=None
        )

    try:
        _need_matplotlib()
        if options.data is not None:
            if options.raw or options.data_root or options.task:
                raise UserError(
                    "schema",
                    "--raw, --data-root and --task are for raw scans; --data shows "
                    "all of a prepared folder",
                    USAGE,
                )
            jobs = jobs_of_prepared(options.data)
        else:
            loose = argparse.Namespace(**vars(options), strict=False, allow_leak=True)
            jobs = jobs_of_records(prepare.read_source(loose).records)
        if not jobs:
            raise UserError("empty", f"{options.data}: no scan is in it", NOTHING)
        with parallel.terminable():
            drawings, names = preview(
                jobs,
                options.out,
                most=options.most,
                workers=options.workers,
                progress=bar,
            )
    except UserError as error:
        tell(f"error: {error.reason}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        tell("interrupted: nothing was written")
        return PREEMPTED
    bad = [d for d in drawings if d.problem]
    for drawing in bad:
        tell(f"failed: {drawing.job.id}: {drawing.problem}")
    print(spelled_out(f"{options.out}: {', '.join(names)}"))
    if not bad:
        return 0
    return FAILED if len(bad) == len(drawings) else PARTLY


if __name__ == "__main__":
    sys.exit(main())
