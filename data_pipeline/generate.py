"""Pairs made on the fly, without end: phantoms, painted label maps, deformed scans.

Each source is a grain data source: element k is a function of its seed and k alone.
Its `version` is raised when the same arguments would now give other pairs.
`make_iterator` turns one into the batches that training consumes, as `loader` does with
a prepared folder; `data_pipeline.synthesize` writes elements to such a folder.
"""

import functools
import hashlib
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from data_pipeline import deformed, fields, loader, painted, synthetic
from unireg_jax.errors import USAGE, UserError
from unireg_jax.imaging import nifti, preprocess
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.tasks import TASKS, PairBatch, PairType, Region

_AIR_HU = np.int16(-1000)


class Scan(NamedTuple):
    """One volume on the network grid.

    Attributes:
        hu: [X, Y, Z] int16, HU; OUTSIDE_HU beyond the scan.
        labels: [X, Y, Z] uint8, ids of the source's `label_names`; 0 is background.
        kind: contrast phase, breath or copy.
    """

    hu: np.ndarray
    labels: np.ndarray
    kind: str


class ScanPair(NamedTuple):
    """Two scans on one grid and, where they show one anatomy, the known fields.

    Attributes:
        fixed: Scan.
        moving: Scan.
        disp_fm: [X, Y, Z, 3] float32, voxels: moving(x + disp_fm(x)) is the tissue of
            fixed(x). None where the scans are of two subjects.
        disp_mf: [X, Y, Z, 3] float32, voxels: the way back, or None.
    """

    fixed: Scan
    moving: Scan
    disp_fm: np.ndarray | None
    disp_mf: np.ndarray | None


class LabelMap(NamedTuple):
    """A label map on the network grid.

    Attributes:
        labels: [X, Y, Z] uint8, along LPS axes; ids of the vocabulary.
        name: of its file.
    """

    labels: np.ndarray
    name: str


class PhantomPairs:
    """Phantoms: two phases or breaths of one subject, or two subjects."""

    kind = "phantoms"
    version = 1

    def __init__(self, task: str, spec: PreprocessSpec, *, seed: int, known: bool):
        """Describes the pairs.

        Args:
            task: a name of `unireg_jax.tasks.TASKS`.
            spec: the network grid.
            seed: of the subjects.
            known: one subject twice, related by a random field, for every task;
                else as the task has it: two subjects where it is inter-patient.

        Raises:
            ValueError: unknown task.
        """
        synthetic.variants(task)
        self.task, self.spec, self.seed, self.known = task, spec, seed, known
        self.label_names = synthetic.label_names(task)

    def __len__(self) -> int:
        return sys.maxsize

    def __repr__(self) -> str:  # with its version, once that is raised
        return f"PhantomPairs({self.task}, seed={self.seed}, known={self.known})"

    def __getitem__(self, k: int) -> ScanPair:
        grid = dict(shape=self.spec.shape, spacing_mm=self.spec.spacing_mm)
        draw = synthetic.deformed_pair if self.known else synthetic.pair
        seed = _number(self.seed, k)
        made = draw(self.task, seed=seed, both_ways=True, **grid)
        kinds = ("deformed", "scan") if self.known else ("scan", "scan")
        if not self.known and len(synthetic.variants(self.task)) == 2:
            kinds = synthetic.variants(self.task)
        fixed, moving = (
            Scan(np.maximum(phantom.hu, _AIR_HU), phantom.labels, kind)
            for phantom, kind in zip(made[:2], kinds, strict=True)
        )
        return ScanPair(fixed, moving, made.disp, made.disp_mf)


class PaintedPairs:
    """CT painted from label maps, each of which is deformed anew in every element."""

    kind = "painted"
    version = 2  # of 1, tasks shared their random numbers

    def __init__(
        self,
        task: str,
        spec: PreprocessSpec,
        maps: Sequence[LabelMap],
        label_names: Sequence[str],
        *,
        seed: int,
        known: bool,
    ):
        """Describes the pairs.

        Args:
            task: a name of `unireg_jax.tasks.TASKS`.
            spec: the network grid.
            maps: from `read_maps`; each is asked for when it is needed.
            label_names: their vocabulary: id i + 1 is the i-th name.
            seed: of maps, deformations, patients and phases.
            known: one patient twice, in any two phases, related by a known field, as
                intra-patient tasks have it anyway; else two patients, of two maps
                where there are two.

        Raises:
            ValueError: unknown task, or no map.
        """
        if task not in TASKS:
            raise ValueError(f"task must be one of {tuple(TASKS)}, got {task!r}")
        if not maps:
            raise ValueError("maps must hold a label map, got none")
        self.task, self.spec, self.seed = task, spec, seed
        self.known = known or TASKS[task].pair_type == PairType.INTRA
        self.label_names = tuple(label_names)
        self._maps = maps
        self._names = dict(enumerate(self.label_names, 1))

    def __len__(self) -> int:
        return sys.maxsize

    def __repr__(self) -> str:
        return (
            f"PaintedPairs({self.task}, version={self.version}, seed={self.seed}, "
            f"known={self.known}, maps={self._digest})"
        )

    @functools.cached_property
    def _digest(self) -> str:
        """Of names and all maps, which may have to be read for it."""
        return _digest(self.label_names, *(m.labels for m in self._maps))

    def __getitem__(self, k: int) -> ScanPair:
        rng = _rng(f"painted/{self.task}", self.seed, k)
        chosen = rng.permutation(len(self._maps))[:2]
        if not self.known:
            fixed, moving = (self._patient(self._maps[i], rng) for i in chosen[[0, -1]])
            return ScanPair(fixed, moving, None, None)
        labels = self._varied(self._maps[chosen[0]].labels, rng)
        phases = self._phases(rng)
        patient = int(rng.integers(2**32))
        fixed, moving = (
            painted.paint(
                labels,
                self._names,
                spacing_mm=self.spec.spacing_mm,
                seed=patient,
                phase=phase,
                scan=i,
            )
            for i, phase in enumerate(phases)
        )
        copy = deformed.deform(
            np.maximum(fixed, _AIR_HU),
            labels,
            spacing_mm=self.spec.spacing_mm,
            rng=rng,
            breathing=TASKS[self.task].region != Region.HEADNECK,
        )
        return ScanPair(
            Scan(copy.fixed, copy.fixed_labels, phases[0]),
            Scan(np.maximum(moving, _AIR_HU), labels, phases[1]),
            copy.disp_fm,
            copy.disp_mf,
        )

    def _phases(self, rng: np.random.Generator) -> tuple[str, str]:
        """Of the fixed and the moving scan; a breath changes no contrast."""
        if self.task == "liver":
            first, second = rng.permutation(len(painted.PHASES))[:2]
        elif self.task == "lung":
            first = second = rng.integers(len(painted.PHASES))
        else:
            first, second = rng.integers(len(painted.PHASES), size=2)
        return painted.PHASES[first], painted.PHASES[second]

    def _patient(self, label_map: LabelMap, rng: np.random.Generator) -> Scan:
        labels = self._varied(label_map.labels, rng)
        phase = painted.PHASES[rng.integers(len(painted.PHASES))]
        hu = painted.paint(
            labels,
            self._names,
            spacing_mm=self.spec.spacing_mm,
            seed=int(rng.integers(2**32)),
            phase=phase,
        )
        return Scan(np.maximum(hu, _AIR_HU), labels, phase)

    def _varied(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The organs of somebody else: shapes moved by a smooth field.

        As they were where that leaves none, of a voxel or so.
        """
        empty = np.broadcast_to(np.int16(0), labels.shape)
        disp, _ = deformed.random_fields(
            empty, spacing_mm=self.spec.spacing_mm, rng=rng, breathing=False
        )
        varied = fields.warp(labels, disp, order=0)
        return varied if varied.any() else labels


class DeformedPairs:
    """Scans and deformed copies of them."""

    kind = "deformed"
    version = 2  # of 1, tasks shared their random numbers
    known = True

    def __init__(
        self,
        task: str,
        spec: PreprocessSpec,
        scans: Sequence[Scan],
        label_names: Sequence[str] = (),
        *,
        seed: int,
    ):
        """Describes the pairs.

        Args:
            task: a name of `unireg_jax.tasks.TASKS`; all but headneck breathe.
            spec: the network grid.
            scans: from `read_scans`; each is asked for when it is needed.
            label_names: their vocabulary: id i + 1 is the i-th name.
            seed: of the fields.

        Raises:
            ValueError: unknown task, or no scan.
        """
        if task not in TASKS:
            raise ValueError(f"task must be one of {tuple(TASKS)}, got {task!r}")
        if not scans:
            raise ValueError("scans must hold a scan, got none")
        self.task, self.spec, self.seed = task, spec, seed
        self.label_names = tuple(label_names)
        self._scans = scans

    def __len__(self) -> int:
        return sys.maxsize

    def __repr__(self) -> str:
        return (
            f"DeformedPairs({self.task}, version={self.version}, seed={self.seed}, "
            f"scans={self._digest})"
        )

    @functools.cached_property
    def _digest(self) -> str:
        """Of names and all scans, which may have to be read for it."""
        parts = (part for s in self._scans for part in (s.hu, s.labels))
        return _digest(self.label_names, *parts)

    def __getitem__(self, k: int) -> ScanPair:
        # Every scan in turn: all are used equally often.
        scan = self._scans[k % len(self._scans)]
        made = deformed.deform(
            scan.hu,
            scan.labels,
            spacing_mm=self.spec.spacing_mm,
            rng=_rng(f"deformed/{self.task}", self.seed, k),
            breathing=TASKS[self.task].region != Region.HEADNECK,
        )
        fixed = Scan(made.fixed, made.fixed_labels, "deformed")
        return ScanPair(fixed, scan, made.disp_fm, made.disp_mf)


Source = PhantomPairs | PaintedPairs | DeformedPairs


def make_iterator(
    source: Source,
    *,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    num_threads: int = 2,
) -> loader.PairIterator:
    """Makes the endless stream of batches of a source.

    Args:
        source: PhantomPairs, PaintedPairs or DeformedPairs.
        batch_size: pairs per batch of this process.
        shard: (this process, number of processes); see `loader.make_iterator`.
        num_threads: painters; 0 paints in the caller's thread. No effect on the order.

    Returns:
        Iterator of PairBatch (NumPy), with get_state and set_state; `pair` is the
        element's number, modulo 2^31.

    Raises:
        ValueError: batch_size below 1, shard out of range.
    """
    if batch_size < 1 or not 0 <= shard[0] < shard[1]:
        raise ValueError(
            f"batch_size must be at least 1 and shard (i, n) with 0 <= i < n, got "
            f"{batch_size} and {shard}"
        )
    batches = (
        grain.MapDataset.source(_Numbered(source))
        .slice(slice(shard[0], None, shard[1]))
        .map(lambda item: example(source.task, *item))
        .batch(batch_size, drop_remainder=True, batch_fn=loader.stack)
    )
    ahead = 2 if num_threads else 0
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
    settings = {
        "data": hashlib.sha256(f"{source!r} {source.spec}".encode()).hexdigest()[:16],
        "split": "train",
        "seed": source.seed,
        "weights": {source.task: 1},
        "global_batch_size": batch_size * shard[1],
        "augment": None,
    }
    return loader.PairIterator(iter(batches.to_iter_dataset(options)), settings)


def read_maps(
    paths: Sequence[Path | str], names: Mapping[int, str], spec: PreprocessSpec
) -> tuple[list[LabelMap], tuple[str, ...]]:
    """Brings label maps onto the network grid, their organs at its centre.

    Args:
        paths: NIfTI files.
        names: id in the files -> organ; other ids become background.
        spec: the network grid.

    Returns:
        The maps, and their vocabulary: the names, sorted.

    Raises:
        UserError: a file cannot be read, or `label_set`: it holds none of the names
            (exit code 4), the grid shows none of them, or there are more than 255 (2).
    """
    vocabulary, lookup = _vocabulary(names)
    maps = []
    for path in paths:
        volume = nifti.read_labels(path)
        volume = volume._replace(data=_renamed(volume.data, lookup))
        there = np.argwhere(volume.data)
        if not len(there):
            raise UserError(
                "label_set",
                f"{nifti.shown(path)}: a structure named in the list expected, none "
                "found; check the ids in --names",
            )
        middle = np.append((there.min(0) + there.max(0)) / 2, 1)
        vox2world = np.diag([*spec.spacing_mm, 1.0])
        half = vox2world[:3, :3] @ ((np.array(spec.shape) - 1) / 2)
        vox2world[:3, 3] = (volume.vox2world @ middle)[:3] - half
        labels = preprocess.prepare_labels(
            volume, preprocess.Grid(spec.shape, vox2world)
        )
        _check_shown(labels, nifti.shown(path), spec)
        maps.append(LabelMap(labels, Path(path).name))
    return maps, vocabulary


def phantom_maps(
    task: str, spec: PreprocessSpec, *, count: int, seed: int
) -> tuple[list[LabelMap], tuple[str, ...]]:
    """Takes the organs of phantoms, for painting where no label map is at hand.

    Args:
        task: a name of `unireg_jax.tasks.TASKS`.
        spec: the network grid.
        count: maps.
        seed: of the phantoms.

    Returns:
        The maps, and the task's vocabulary.

    Raises:
        UserError: `label_set`, exit code 2: the grid shows no organ.
        ValueError: unknown task.
    """
    grid = dict(shape=spec.shape, spacing_mm=spec.spacing_mm)
    maps = [
        synthetic.phantom(task, seed=_number(seed, k), **grid) for k in range(count)
    ]
    named = [LabelMap(made.labels, f"phantom {k}") for k, made in enumerate(maps)]
    for labels, name in named:
        _check_shown(labels, name, spec)
    return named, synthetic.label_names(task)


def read_scans(
    paths: Sequence[Path | str],
    spec: PreprocessSpec,
    *,
    label_paths: Sequence[Path | str] = (),
    names: Mapping[int, str] | None = None,
) -> tuple[list[Scan], tuple[str, ...]]:
    """Brings scans, and their label maps if there are any, onto the network grid.

    Args:
        paths: NIfTI files, CT in HU.
        spec: the network grid.
        label_paths: NIfTI files, one per scan on its grid, or none.
        names: id in the label maps -> organ.

    Returns:
        The scans, and the labels' vocabulary.

    Raises:
        UserError: a file cannot be read, a label map lies on another grid, or there
            are more than 255 names.
        ValueError: another number of label maps than of scans.
    """
    if label_paths and len(label_paths) != len(paths):
        raise ValueError(
            f"label_paths must be none or {len(paths)}, one per scan, got "
            f"{len(label_paths)}"
        )
    vocabulary, lookup = _vocabulary(names or {})
    scans = []
    for i, path in enumerate(paths):
        image = nifti.read_image(path)
        grid = preprocess.network_grid(image, spec)
        hu = preprocess.prepare_image(image, grid, spec)
        labels = np.zeros(hu.shape, np.uint8)
        if label_paths:
            volume = nifti.read_labels(label_paths[i])
            nifti.check_same_grid(image, volume)
            volume = image._replace(data=_renamed(volume.data, lookup))
            labels = preprocess.prepare_labels(volume, grid)
        scans.append(Scan(hu, labels, "scan"))
    return scans, vocabulary


class _Numbered:
    """A source that also tells the number of its elements."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, k: int) -> tuple[int, ScanPair]:
        return int(k), self._source[int(k)]

    def __repr__(self) -> str:
        return repr(self._source)


def example(task: str, k: int, pair: ScanPair) -> PairBatch:
    """A made pair as training takes it.

    Args:
        task: a name of `unireg_jax.tasks.TASKS`.
        k: the element's number.
        pair: from a source.

    Returns:
        PairBatch without the batch axis, of no further layers; `pair` is k modulo 2^31.
    """
    nothing = np.zeros((0, *pair.fixed.labels.shape), np.uint8)
    return PairBatch(
        fixed=pair.fixed.hu[..., None],
        moving=pair.moving.hu[..., None],
        fixed_labels=pair.fixed.labels,
        moving_labels=pair.moving.labels,
        fixed_more=nothing,
        moving_more=nothing,
        align=np.eye(4, dtype=np.float32),
        region=np.int32(TASKS[task].region),
        pair_type=np.int32(TASKS[task].pair_type),
        pair=np.int32(k % 2**31),
    )


def _rng(purpose: str, seed: int, k: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(purpose.encode()), seed, int(k)])


def _number(seed: int, k: int) -> int:
    """A seed for phantoms: pairs take 2 n and 2 n + 1."""
    return int(_rng("phantoms", seed, k).integers(2**31))


def _vocabulary(names: Mapping[int, str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Sorted names, and id in the files -> id of the vocabulary."""
    found = tuple(sorted(set(names.values())))
    if len(found) > 255:
        raise UserError(
            "label_set",
            f"names: 255 at most expected, got {len(found)}; leave some out",
            USAGE,
        )
    lookup = np.zeros(2**16, np.uint8)
    for number, name in names.items():
        lookup[number] = found.index(name) + 1
    return found, lookup


def _renamed(labels: np.ndarray, lookup: np.ndarray) -> np.ndarray:
    return lookup[labels]


def _check_shown(labels: np.ndarray, name: str, spec: PreprocessSpec) -> None:
    """Refuses a map of which the grid shows nothing: there is nothing to paint."""
    if not labels.any():
        raise UserError(
            "label_set",
            f"{name}: a structure on the grid of {spec.shape} at {spec.spacing_mm} mm "
            "expected, none left; give another --shape or --spacing",
            USAGE,
        )


def _digest(names: Sequence[str], *arrays: np.ndarray) -> str:
    whole = hashlib.sha256(repr(tuple(names)).encode())
    for array in arrays:
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()[:12]
