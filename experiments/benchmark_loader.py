"""Times the training stream: pairs per second, bytes moved and memory of the host.

    python -m experiments.benchmark_loader [--volumes=6] [--pairs=24] [--repeats=3]
    python -m experiments.benchmark_loader --repeats=0 --memory_batches=500

A prepared folder of 45-label volumes (smooth HU with noise, blocks for organs) in a
temporary folder, read once before, so that the page cache is warm. Candidates run in
turn; per turn each makes its stream, empties what was read ahead, and then `pairs`
pairs are timed; medians. "files": a memory of one volume, so that files are read and
their digests checked; "memory": all volumes held. "nifti": the same volumes as .nii.gz
through `imaging.nifti`, no resampling. Bytes are those that the process asked the
system for (/proc/self/io) and those of the arrays in a batch.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from scipy import ndimage

from data_pipeline import augment, loader, store
from experiments import cli
from unireg_jax.imaging import nifti

LABELS = tuple(f"organ{i}" for i in range(45))
SPACING_MM = 2.0
AUGMENTS = {
    "none": None,
    "intensity and flips": augment.AugmentSpec(
        flip=0.5, gain=0.1, shift_hu=20.0, noise_hu=10.0
    ),
    "all": augment.AugmentSpec(
        flip=0.5,
        rotate_deg=5.0,
        scale=0.05,
        shift_mm=10.0,
        elastic_mm=8.0,
        gain=0.1,
        shift_hu=20.0,
        noise_hu=10.0,
    ),
}


class Rate(NamedTuple):
    """Of one turn, per pair."""

    wall_ms: float
    cpu_ms: float  # all threads
    read_mib: float  # asked of the system
    batch_mib: float  # arrays given


def make_folder(root: Path, count: int, shape: tuple[int, int, int]) -> list[dict]:
    """Writes a prepared folder of one task, and each volume as .nii.gz beside it."""
    rng = np.random.default_rng(0)
    volumes = []
    vox2world = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    for i in range(count):
        coarse = rng.uniform(-200, 200, (6, 6, 5))
        smooth = ndimage.zoom(coarse, np.divide(shape, coarse.shape), order=1)
        hu = (smooth + rng.normal(0, 20, shape)).astype(np.int16)
        blocks = rng.integers(0, len(LABELS) + 1, [-(-n // 16) for n in shape])
        labels = blocks.astype(np.uint8)
        for axis, n in enumerate(shape):
            labels = labels.repeat(16, axis=axis).take(range(n), axis=axis)
        labels = np.ascontiguousarray(labels)
        name = f"scan{i}"
        place = {"task": "headneck", "subject": name, "split": "train"}
        fields = store.write_volume(root, name, hu, labels)
        place["vox2world"] = vox2world.tolist()
        volumes.append({"id": name, **place, **fields})
        nifti.write_volume(root / f"{name}_hu.nii.gz", hu, vox2world)
        nifti.write_volume(root / f"{name}_labels.nii.gz", labels, vox2world)
    store.write_index(
        root,
        {
            "version": store.INDEX_VERSION,
            "spec": {"shape": list(shape), "spacing_mm": [SPACING_MM] * 3},
            "tasks": {"headneck": {"labels": list(LABELS)}},
            "volumes": volumes,
        },
    )
    return volumes


def stream(
    dataset: loader.Dataset,
    batch_size: int,
    readers: int,
    spec: augment.AugmentSpec | None = None,
) -> loader.PairIterator:
    """The stream of training."""
    return loader.make_iterator(
        dataset,
        "train",
        batch_size=batch_size,
        seed=0,
        num_threads=readers,
        augment=spec,
    )


def nifti_stream(root: Path, dataset: loader.Dataset) -> Iterator[list[np.ndarray]]:
    """The same pairs from .nii.gz, one after the other in this thread."""
    pairs = dataset.pairs("train")
    order = loader.PairOrder(pairs, {"headneck": 1}, 0)
    for k in range(len(order)):
        pair = pairs[order[k]]
        arrays = []
        for position in (pair.fixed, pair.moving):
            name = dataset.index["volumes"][position]["id"]
            arrays.append(nifti.read_image(root / f"{name}_hu.nii.gz").data)
            arrays.append(nifti.read_labels(root / f"{name}_labels.nii.gz").data)
        yield arrays


def rate(iterator: Any, batch_size: int, pairs: int) -> Rate:
    """Times `pairs` pairs of a new stream, after those that it read ahead."""
    steps = max(1, pairs // batch_size)
    # The readers run up to 8 pairs or 2 batches ahead.
    warm = 2 + 12 // batch_size if isinstance(iterator, loader.PairIterator) else 1
    for _ in range(warm):
        batch = next(iterator)
    read, cpu, wall = _bytes_read(), time.process_time(), time.perf_counter()
    for _ in range(steps):
        batch = next(iterator)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    read, count = _bytes_read() - read, steps * batch_size
    size = sum(np.asarray(part).nbytes for part in batch) / batch_size
    iterator.close()
    return Rate(
        1e3 * wall / count, 1e3 * cpu / count, read / count / 2**20, size / 2**20
    )


def compare(candidates: dict[str, Callable[[], Rate]], repeats: int) -> None:
    """Runs the candidates in turn and prints their medians."""
    rows: dict[str, list[Rate]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            rows[name].append(run())
    print("| stream | pairs/s | wall ms | CPU ms | read MiB | arrays MiB |")
    print("|---|---|---|---|---|---|")
    for name, found in rows.items():
        row = Rate(*np.median(found, axis=0))
        print(
            f"| {name} | {1e3 / row.wall_ms:.1f} | {row.wall_ms:.1f} "
            f"| {row.cpu_ms:.1f} | {row.read_mib:.1f} | {row.batch_mib:.1f} |",
            flush=True,
        )


def memory(name: str, iterator: loader.PairIterator, batches: int) -> None:
    """Prints the resident memory over a long stream, and its slope."""
    every = max(1, batches // 50)
    steps, sizes = [], []
    for n in range(1, batches + 1):
        next(iterator)
        if n % every == 0:
            steps.append(n)
            sizes.append(_resident_mib())
    iterator.close()
    half = len(steps) // 2  # the first half fills caches and buffers
    slope = np.polyfit(steps[half:], sizes[half:], 1)[0]
    print(
        f"{name}: {batches} batches, resident {sizes[0]:.0f} MiB after {steps[0]}, "
        f"{max(sizes):.0f} at most, {sizes[-1]:.0f} at the end; slope over the second "
        f"half {100 * slope:+.1f} MiB per 100 batches",
        flush=True,
    )


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _resident_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmRSS")).split()[1]) / 1024


def main(argv: list[str]) -> None:
    del argv
    options = flags.FLAGS
    shape: Any = tuple(map(int, options.shape))
    with tempfile.TemporaryDirectory(dir=options.workdir) as name:
        root = Path(name)
        make_folder(root, options.volumes, shape)
        for path in root.rglob("*.*"):
            path.read_bytes()
        sizes = {"files": 0.0, "memory": 64.0}
        datasets = {n: loader.Dataset(root, cache_gib=g) for n, g in sizes.items()}
        for position in range(options.volumes):
            datasets["memory"].volume(position)
        candidates: dict[str, Callable[[], Rate]] = {}

        def add(title, make, batch_size=1):
            candidates[title] = lambda: rate(make(), batch_size, options.pairs)

        for place, dataset in datasets.items():
            for size in map(int, options.batch_sizes):
                for readers in map(int, options.readers):
                    title = f"{place}, batch {size}, {readers} readers"
                    add(
                        title,
                        lambda d=dataset, s=size, r=readers: stream(d, s, r),
                        size,
                    )
        if options.augment:
            for title, spec in AUGMENTS.items():
                add(
                    f"files, batch 1, 2 readers, augment: {title}",
                    lambda spec=spec: stream(datasets["files"], 1, 2, spec),
                )
        if options.nifti:
            add("nifti, 0 readers", lambda: nifti_stream(root, datasets["files"]))
        if options.repeats:
            compare(candidates, options.repeats)
        if options.memory_batches:
            for place, dataset in datasets.items():
                memory(place, stream(dataset, 1, 2), options.memory_batches)


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("workdir", None, "Where the temporary folder goes.")
    flags.DEFINE_list("shape", ["192", "192", "160"], "Voxels of a volume.")
    flags.DEFINE_integer("volumes", 6, "Volumes in the folder.")
    flags.DEFINE_integer("pairs", 24, "Timed pairs per turn.")
    flags.DEFINE_integer("repeats", 3, "Turns; 0: none.")
    flags.DEFINE_list("batch_sizes", ["1", "4"], "Pairs per batch.")
    flags.DEFINE_list("readers", ["0", "1", "2", "4"], "Reading threads.")
    flags.DEFINE_boolean("nifti", True, "Also read .nii.gz.")
    flags.DEFINE_boolean("augment", True, "Also change the pairs.")
    flags.DEFINE_integer("memory_batches", 0, "Batches to watch the memory for.")
    cli.run(main)
