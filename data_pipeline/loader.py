"""Batches of pairs from a prepared folder: deterministic, weighted by task, resumable.

Which pair comes at which step is a function of (seed, weights, step) alone. Every task
has a stream of its own, an endless row of permutations of its pairs; a fixed pattern
interleaves the streams with exact counts, and those of made pairs, if there are any.
Threads only read ahead.

Deviates from the paper, which samples the task of every step at random: exact counts
have the same mean and no runs without a task.
"""

import collections
import contextlib
import fractions
import functools
import hashlib
import heapq
import json
import math
import os
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np

from data_pipeline import store
from data_pipeline.augment import AugmentSpec, make_augment
from data_pipeline.pairs import Pair, make_pairs, read_alignments, stale_alignments
from unireg_jax.errors import DATA_CHANGED, NOTHING, STORAGE, USAGE, UserError, tell
from unireg_jax.tasks import TASKS, PairBatch

# grain's defaults (16 threads, 500 batches ahead) would fill the memory with volumes.
_THREADS = 4
_PAIRS_AHEAD = 8
_Batch = TypeVar("_Batch", bound=tuple)
_LOOK_AHEAD = 1000  # pairs tried in place of one that cannot be used
ON_FAULT = ("fail", "skip")
_SETTINGS = ("split", "seed", "weights", "global_batch_size", "augment")


class Dataset:
    """Volumes of a prepared folder, read when first needed and then kept in memory.

    Safe to use from several threads. A file that no longer has the digest of the index
    is refused when it is read.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        cache_gib: float = 64.0,
        read_timeout_s: float | None = None,
        stale: bool = False,
    ):
        """Opens a prepared folder.

        Args:
            root: folder written by `data_pipeline.prepare`.
            cache_gib: memory for volumes; beyond it the least recently used one goes.
            read_timeout_s: a volume that takes longer to read is named and ends the
                process with exit code 6, see `_ends_if_stuck`; None waits for ever.
            stale: whether alignments of volumes as they were before are left out
                rather than refused.

        Raises:
            UserError: see `store.read_index` and `pairs.read_alignments`; `schema`,
                exit code 10, for alignments of volumes as they were before.
        """
        self.root = Path(root)
        self.index = store.read_index(root)
        self.alignments = read_alignments(root)
        old = stale_alignments(root, self.index, self.alignments)
        if stale:
            for key in old:
                del self.alignments[key]
        elif old:
            raise UserError(
                "schema",
                f"{store.ALIGN_NAME}: {len(old)} pairs ({old[0]} first) were "
                "aligned before their volumes, subjects or tasks changed; run "
                "experiments.prealign again",
                DATA_CHANGED,
            )
        self._aligned = not stale and (self.root / store.ALIGN_NAME).exists()
        self.shape = tuple(self.index["spec"]["shape"])
        # Of the volume with most: batches of one dataset are all of one shape.
        self.layers = max(
            (store.count_layers(root, volume) for volume in self.index["volumes"]),
            default=0,
        )
        self._pairs: dict[str, list[Pair]] = {}
        self._budget = cache_gib * 2**30
        self._timeout = read_timeout_s
        self._held = 0
        self._cache: collections.OrderedDict = collections.OrderedDict()
        self._lock = threading.Lock()

    @functools.cached_property
    def digest(self) -> str:
        """Digest of index and alignments: equal digests give equal streams."""
        align = {k: v.tolist() for k, v in sorted(self.alignments.items())}
        text = json.dumps([store.index_digest(self.index), align])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def pairs(self, split: str) -> list[Pair]:
        """The split's pairs, see `pairs.make_pairs`; the same list every time."""
        if split not in self._pairs:  # a million of them take seconds and a gigabyte
            found = make_pairs(self.index, split, alignments=self.alignments)
            self._pairs[split] = found
        return self._pairs[split]

    def limit(self, cache_gib: float) -> None:
        """Takes no more memory for volumes than that, nor than given before."""
        self._budget = min(self._budget, cache_gib * 2**30)

    def tell_missing(self, pairs: Sequence[Pair]) -> None:
        """Warns of pairs that a pre-alignment of the folder has not come to.

        Args:
            pairs: of this folder.
        """
        ids = [volume["id"] for volume in self.index["volumes"]]
        keys = (f"{ids[pair.fixed]}|{ids[pair.moving]}" for pair in pairs)
        missing = [key for key in keys if key not in self.alignments]
        if self._aligned and missing:
            tell(
                f"warning: {len(missing)} of {len(pairs)} pairs ({missing[0]} first) "
                f"are not in {store.ALIGN_NAME}: of two patients the middles of the "
                "bodies meet, of one the scanner's frames; run "
                f"`python -m experiments.prealign --data={self.root}`"
            )

    def label_names(self, task: str) -> tuple[str, ...]:
        """The task's vocabulary: id i + 1 is the i-th name."""
        return tuple(self.index["tasks"][task]["labels"])

    def volume(self, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reads one volume.

        Args:
            position: in the index's `volumes`.

        Returns:
            hu [X, Y, Z] int16, labels [X, Y, Z] uint8, all 0 when it has none, and
            overlaps [its own L, X, Y, Z] uint8; all read-only.

        Raises:
            UserError: `checksum` or `not_found`, exit code 10.
        """
        with self._lock:
            if position in self._cache:
                self._cache.move_to_end(position)
                return self._cache[position]
        entry = self.index["volumes"][position]
        with _ends_if_stuck(entry["id"], self._timeout):
            arrays = self._read(entry)
        with self._lock:
            if position not in self._cache:
                self._cache[position] = arrays
                self._held += sum(a.nbytes for a in arrays)
            while self._held > self._budget and len(self._cache) > 1:
                _, old = self._cache.popitem(last=False)
                self._held -= sum(a.nbytes for a in old)
        return arrays

    def example(self, pair: Pair, position: int) -> PairBatch:
        """Reads one pair, as a PairBatch without the batch axis.

        Args:
            pair: from `pairs`.
            position: the pair's position in that list.

        Returns:
            PairBatch of [X, Y, Z, 1], [X, Y, Z], [self.layers, X, Y, Z], [4, 4] and
            scalar arrays.

        Raises:
            UserError: see `volume`.
        """
        fixed, fixed_labels, fixed_more = self.volume(pair.fixed)
        moving, moving_labels, moving_more = self.volume(pair.moving)
        return PairBatch(
            fixed=fixed[..., None],
            moving=moving[..., None],
            fixed_labels=fixed_labels,
            moving_labels=moving_labels,
            fixed_more=fill_layers(fixed_more, self.layers),
            moving_more=fill_layers(moving_more, self.layers),
            align=np.asarray(pair.align, np.float32),
            region=np.int32(pair.region),
            pair_type=np.int32(pair.pair_type),
            pair=np.int32(position),
        )

    def _read(self, entry: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        hu = store.read_array(self.root, entry, "image")
        labels = np.zeros(hu.shape, np.uint8)
        if entry["labels"] is not None:
            labels = store.read_array(self.root, entry, "labels")
        more = np.zeros((0, *hu.shape), np.uint8)
        if "overlaps" in entry:
            more = store.read_array(self.root, entry, "overlaps")
        arrays = (hu, labels, more)
        found = [(a.shape[-3:], a.dtype) for a in arrays]
        if found != [(self.shape, kind) for kind in (np.int16, np.uint8, np.uint8)]:
            raise UserError(
                "schema",
                f"{entry['id']}: int16 and uint8 of {self.shape} expected, found "
                f"{found}; run data_pipeline.prepare again",
                DATA_CHANGED,
            )
        for array in arrays:
            array.flags.writeable = False
        return arrays


@contextlib.contextmanager
def _ends_if_stuck(volume: str, seconds: float | None) -> Iterator[None]:
    """Ends the process when the block takes longer.

    A read that hangs, as on a network share that is gone, cannot be interrupted, nor
    can the threads that wait for it. What was saved is whole at any moment.
    """
    if seconds is None:
        yield
        return

    def end():
        text = (
            f"error: worker_died: {volume}: read within {seconds:g} s expected, still "
            "reading; mend the disk or the network share, then run the same command "
            "again\n"
        )
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        os._exit(STORAGE)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Stream(NamedTuple):
    """An endless row of made pairs, to be mixed with those of a prepared folder.

    Attributes:
        name: what log lines call it; no name of TASKS.
        share: of all pairs, above 0 and up to 1.
        label_names: of its ids, id i + 1 is the i-th; for flips.
        draw: number -> PairBatch without the batch axis, a function of the number
            alone; its `pair` does not count.
        version: of what it draws; a run of another one does not go on.
    """

    name: str
    share: float
    label_names: tuple[str, ...]
    draw: Callable[[int], PairBatch]
    version: int = 1


class PairIterator(grain.DatasetIterator):
    """Endless batches; its state says where it is and of what.

    `get_state` gives a small dict for JSON; `set_state` takes it, or just
    {"next_index": step}, and refuses the state of another stream. As a grain
    DatasetIterator it goes into an Orbax checkpoint through `grain.checkpoint`.
    """

    def __init__(
        self,
        parent: grain.DatasetIterator,
        settings: dict[str, Any],
        pair: Callable[[int], int] | None = None,
    ):
        """Follows the iterator of `settings`; pair(k) is `pair` of element k."""
        super().__init__(parent)
        self._settings = settings
        self._pair = pair

    def __next__(self) -> PairBatch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        """The number of batches taken so far, and what they were drawn from."""
        return {**self._settings, **self._parent.get_state()}

    def last_pairs(self) -> list[int]:
        """`pair` of every row of the last batch, of all processes together.

        Nothing is read: where a process skips a bad volume, its pair is still named.
        """
        size = self._settings["global_batch_size"]
        end = self.get_state()["next_index"] * size
        return [self._pair(k) for k in range(end - size, end)]

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a state.

        Raises:
            UserError: `checksum`, exit code 10, when the prepared data are others, or
                what draws the made pairs; `schema`, exit code 2, when split, seed,
                weights, batch size or augmentation are.
        """
        if state.get("data", self._settings["data"]) != self._settings["data"]:
            raise UserError(
                "checksum",
                f"prepared data: digest {state['data']} when the run began, now "
                f"{self._settings['data']}; restore them, or start a new run",
                DATA_CHANGED,
            )
        other = [
            f"{name} {state[name]!r} then, {self._settings.get(name)!r} now"
            for name in _SETTINGS
            if name in state and state[name] != self._settings.get(name)
        ]
        if other:
            raise UserError(
                "schema",
                f"data stream: {'; '.join(other)}; resume with the settings of the run",
                USAGE,
            )
        versions = self._settings.get("versions")
        if "data" in state and state.get("versions") != versions:
            began = state.get("versions") or "of an older release"
            raise UserError(
                "checksum",
                f"made pairs: versions {began} when the run began, now {versions}: "
                "they would be other pairs; start a new run",
                DATA_CHANGED,
            )
        self._parent.set_state({"next_index": int(state["next_index"])})


def make_iterator(
    root: Path | str | Dataset,
    split: str,
    *,
    batch_size: int,
    seed: int,
    weights: Mapping[str, float] | None = None,
    shape: Sequence[int] | None = None,
    shard: tuple[int, int] = (0, 1),
    num_threads: int = _THREADS,
    augment: AugmentSpec | None = None,
    on_fault: str = "fail",
    streams: Sequence[Stream] = (),
) -> PairIterator:
    """Makes the endless stream of batches that training consumes.

    Args:
        root: prepared folder, or a Dataset that is open already.
        split: "train", "val" or "test".
        batch_size: pairs per batch of this process.
        seed: of the permutations.
        weights: task -> share of the pairs, any positive scale, taken to three digits;
            tasks not named or of weight 0 are left out. None: all tasks alike.
        shape: (X, Y, Z) that the caller expects, or None.
        shard: (this process, number of processes). All together draw the stream that
            one process with batch_size * number would.
        num_threads: readers; 0 reads in the caller's thread. No effect on the stream.
        augment: how much the pairs are changed, by `augment.make_augment`; None: not
            at all. The changes of a pair are a function of seed and place, too.
        on_fault: what a volume that cannot be used does: "fail" ends the stream, "skip"
            names it on stderr and gives the next pair of the order without it, until
            more than one volume in a hundred (at least one) is at fault. One that a
            made pair needs always ends it.
        streams: made pairs, whose shares come off those of the tasks; in a batch their
            `pair` is the number of pairs of the split plus the stream's place here.

    Returns:
        Iterator of PairBatch (NumPy, maybe read-only), with get_state and set_state.

    Raises:
        UserError: exit code 3 when there is no pair; 2 for an unknown task, a bad
            weight, another shape, or see `augment.make_augment`; while iterating 10
            when a volume has changed.
        ValueError: batch_size below 1, shard out of range, unknown on_fault.
    """
    dataset = root if isinstance(root, Dataset) else Dataset(root)
    if on_fault not in ON_FAULT:
        raise ValueError(f"on_fault must be one of {ON_FAULT}, got {on_fault!r}")
    if batch_size < 1 or not 0 <= shard[0] < shard[1]:
        raise ValueError(
            f"batch_size must be at least 1 and shard (i, n) with 0 <= i < n, got "
            f"{batch_size} and {shard}"
        )
    if shape is not None and tuple(shape) != dataset.shape:
        raise UserError(
            "grid_mismatch",
            f"prepared data: shape {tuple(shape)} expected, {dataset.shape} found; "
            f"prepare with --shape {','.join(str(n) for n in shape)}",
            USAGE,
        )
    pairs = dataset.pairs(split)
    dataset.tell_missing(pairs)
    shares = _shares(pairs, split, weights, streams)
    order = PairOrder(pairs, shares, seed)
    elements = _Examples(dataset, pairs, order, streams, skip=on_fault == "skip")
    examples = grain.MapDataset.source(range(len(order))).map(elements)
    if augment is not None and augment.on:
        names = {task: dataset.label_names(task) for task in shares if task in TASKS}
        names |= {stream.name: stream.label_names for stream in streams}
        change = make_augment(augment, names, dataset.index["spec"]["spacing_mm"])
        kinds = [pair.task for pair in pairs] + [stream.name for stream in streams]
        examples = examples.seed(seed).random_map(
            lambda example, rng: change(example, kinds[example.pair], rng)
        )
    # Sharded last: the generator of a record is that of its place in the whole stream.
    batches = examples.slice(slice(shard[0], None, shard[1])).batch(
        batch_size, drop_remainder=True, batch_fn=stack
    )
    ahead = max(2, _PAIRS_AHEAD // batch_size) if num_threads else 0
    # A reader makes a whole batch: more of them than batches ahead would only wait.
    options = grain.ReadOptions(
        num_threads=min(num_threads, ahead), prefetch_buffer_size=ahead
    )
    settings = {
        "data": dataset.digest,
        "split": split,
        "seed": seed,
        "weights": shares,
        "global_batch_size": batch_size * shard[1],
        "augment": augment._asdict() if augment is not None and augment.on else None,
    }
    # States that were saved before there were versions are of the first.
    if versions := {s.name: s.version for s in streams if s.version > 1}:
        settings["versions"] = versions
    iterator = iter(batches.to_iter_dataset(options))
    return PairIterator(iterator, settings, elements.pair)


def make_eval_batches(
    root: Path | str | Dataset,
    split: str,
    *,
    tasks: Sequence[str] | None = None,
    pairs_per_task: int | None = None,
) -> Iterator[tuple[Pair, PairBatch]]:
    """Gives the pairs of a split once, in order, as batches of one.

    Args:
        root: prepared folder, or a Dataset that is open already.
        split: "train", "val" or "test".
        tasks: only these; None: all.
        pairs_per_task: so many at most, evenly spread over the task's pairs, because
            neighbours share their fixed volume; None: all.

    Returns:
        Iterator of (Pair, PairBatch with B = 1); only these are read.

    Raises:
        UserError: at once, exit code 3, when there is no pair; 2 for an unknown task;
            while iterating 10 when a volume has changed.
    """
    dataset = root if isinstance(root, Dataset) else Dataset(root)
    chosen = None if tasks is None else dict.fromkeys(tasks, 1)
    pairs = dataset.pairs(split)
    wanted = _shares(pairs, split, chosen)
    positions = sorted(
        position
        for task in wanted
        for position in _spread(
            [i for i, pair in enumerate(pairs) if pair.task == task], pairs_per_task
        )
    )
    return ((pairs[i], stack([dataset.example(pairs[i], i)])) for i in positions)


class _Examples:
    """Element k of an order; if asked to skip, the next one that can be used."""

    def __init__(
        self,
        dataset: Dataset,
        pairs: Sequence[Pair],
        order: "PairOrder",
        streams: Sequence[Stream],
        *,
        skip: bool,
    ):
        self._dataset, self._pairs, self._order = dataset, pairs, order
        self._streams = {s.name: (i, s) for i, s in enumerate(streams)}
        self._skip = skip
        self._budget = max(1, len(dataset.index["volumes"]) // 100)
        self._faults: dict[int, UserError] = {}
        self._lock = threading.Lock()

    def __call__(self, k: int) -> PairBatch:
        for place in range(k, k + _LOOK_AHEAD):
            name, number = self._order.place(place)
            if name in self._streams:
                return self._made(*self._streams[name], number)
            position = self._order.position(name, number)
            pair = self._pairs[position]
            ends = (pair.fixed, pair.moving)
            if not self._skip or all(self._usable(volume) for volume in ends):
                return self._dataset.example(pair, position)
        names = [self._dataset.index["volumes"][i]["id"] for i in self._faults]
        raise UserError(
            "checksum",
            f"prepared data: a pair without {', '.join(names)} expected, none among "
            f"the next {_LOOK_AHEAD}; restore these volumes",
            DATA_CHANGED,
        )

    def pair(self, k: int) -> int:
        """`pair` of element k, if it can be used."""
        name, number = self._order.place(k)
        if name in self._streams:
            return len(self._pairs) + self._streams[name][0]
        return self._order.position(name, number)

    def _made(self, i: int, stream: Stream, number: int) -> PairBatch:
        example = stream.draw(number)
        layers = self._dataset.layers
        return example._replace(
            fixed_more=fill_layers(example.fixed_more, layers),
            moving_more=fill_layers(example.moving_more, layers),
            pair=np.int32(len(self._pairs) + i),
        )

    def _usable(self, volume: int) -> bool:
        if volume in self._faults:
            return False
        try:
            self._dataset.volume(volume)
        except UserError as error:
            with self._lock:
                if volume not in self._faults:
                    self._faults[volume] = error
                    tell(f"warning: skipped: {error}")
                if len(self._faults) > self._budget:
                    raise UserError(
                        error.reason,
                        f"{error} ({len(self._faults)} volumes at fault, at most "
                        f"{self._budget} are skipped)",
                        error.exit_code,
                    ) from error
            return False
        return True


class PairOrder:
    """The endless stream of pairs: element k is a function of (seed, k) alone.

    Not grain's `shuffle` and `mix`: the former shuffles epoch e with seed + e, so that
    neighbouring seeds share their permutations, and takes long for few pairs (grain
    0.2.18, one CPU core: 10 ms per element of 2, 0.1 ms of 380); the latter rounds
    weights (3 : 7 becomes 100 : 233).
    """

    def __init__(self, pairs: Sequence[Pair], shares: Mapping[str, int], seed: int):
        """Lays out the pattern of tasks.

        Args:
            pairs: from `Dataset.pairs`.
            shares: task, or name of a Stream -> how many of each run of sum(shares)
                elements.
            seed: of the permutations.
        """
        self._seed = seed
        self._tasks = tuple(shares)
        self._shares = tuple(shares.values())
        self._positions = {
            task: np.flatnonzero([pair.task == task for pair in pairs])
            for task in self._tasks
        }
        # Element j of a task is due at (j + 1/2) / share: evenly spread.
        due = [
            [(fractions.Fraction(2 * j + 1, 2 * n), i, j) for j in range(n)]
            for i, n in enumerate(self._shares)
        ]
        self._pattern = tuple((i, j) for _, i, j in heapq.merge(*due))
        self._permutation = functools.lru_cache(maxsize=4 * len(shares))(self._permute)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> int:
        """Position in `pairs` of the k-th element."""
        return self.position(*self.place(k))

    def place(self, k: int) -> tuple[str, int]:
        """Task or stream of the k-th element, and its number within it."""
        period, place = divmod(int(k), len(self._pattern))
        which, nth = self._pattern[place]
        return self._tasks[which], period * self._shares[which] + nth

    def position(self, task: str, number: int) -> int:
        """Position in `pairs` of an element of a task."""
        epoch, inside = divmod(number, len(self._positions[task]))
        return int(self._permutation(task, epoch)[inside])

    def __repr__(self) -> str:
        return f"PairOrder({dict(zip(self._tasks, self._shares, strict=True))})"

    def _permute(self, task: str, epoch: int) -> np.ndarray:
        """The task's positions, in the order of one epoch."""
        # Raw bits of PCG64 stay the same in every release of NumPy; `permutation` may
        # change.
        bits = np.random.PCG64([self._seed, zlib.crc32(task.encode()), epoch])
        positions = self._positions[task]
        return positions[np.argsort(bits.random_raw(len(positions)), kind="stable")]


def _shares(
    pairs: list[Pair],
    split: str,
    weights: Mapping[str, float] | None,
    streams: Sequence[Stream] = (),
) -> dict[str, int]:
    """Whole numbers in the ratio of the weights, in the order of TASKS."""
    made = math.fsum(stream.share for stream in streams)
    wanted = _wanted(pairs, split, weights) if made < 1 - 1e-9 else {}
    total = sum(wanted.values())
    parts = {task: weight / total * (1 - made) for task, weight in wanted.items()}
    parts |= {stream.name: stream.share for stream in streams}
    whole = {name: max(1, round(part * 1000)) for name, part in parts.items()}
    for scale in range(1, 1000):
        counts = {name: round(part * scale) for name, part in parts.items()}
        error = max(abs(counts[name] / scale - part) for name, part in parts.items())
        if min(counts.values()) > 0 and error < 1e-6:  # the ratio meant, as 3 : 7
            return counts
    return whole


def _wanted(
    pairs: list[Pair], split: str, weights: Mapping[str, float] | None
) -> dict[str, float]:
    """The weights, checked, without those that are 0."""
    present = {pair.task for pair in pairs}
    wanted = dict.fromkeys(present, 1.0) if weights is None else dict(weights)
    for task, weight in wanted.items():
        if task not in TASKS:
            raise UserError(
                "task_unknown",
                f"weights: one of {', '.join(TASKS)} expected, got {task!r}",
                USAGE,
            )
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 <= weight < math.inf:
            raise UserError(
                "schema",
                f"weights.{task}: a number from 0 expected, got {weight!r}",
                USAGE,
            )
    wanted = {task: wanted[task] for task in TASKS if wanted.get(task)}
    empty = [task for task in wanted if task not in present]
    if empty or not wanted:
        which = f" for {', '.join(empty)}" if empty else ""
        raise UserError(
            "schema",
            f"split {split}: no pairs{which}; inter-patient tasks need two subjects in "
            "the split, intra-patient tasks two volumes of one subject",
            NOTHING,
        )
    return wanted


def _spread(items: Sequence[int], count: int | None) -> Sequence[int]:
    """`count` of the items at even distances, the first and the last among them."""
    if count is None or count >= len(items):
        return items
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, count).round()]


def fill_layers(more: np.ndarray, layers: int) -> np.ndarray:
    """Adds layers that hold nothing.

    Args:
        more: [N, X, Y, Z] uint8.
        layers: how many there shall be, N or more.

    Returns:
        [layers, X, Y, Z] uint8; more itself if it has as many.
    """
    if len(more) == layers:
        return more
    out = np.zeros((layers, *more.shape[1:]), np.uint8)
    out[: len(more)] = more
    return out


def stack(examples: Sequence[_Batch]) -> _Batch:
    """Puts examples of one kind, a named tuple of arrays, into a batch.

    Args:
        examples: PairBatch or ViewBatch without the batch axis.

    Returns:
        The same kind with the batch axis first; of one example, views.
    """
    kind = type(examples[0])
    if len(examples) == 1:  # a pair of 192 x 192 x 160 has 34 MiB
        return kind(*(np.asarray(part)[None] for part in examples[0]))
    return kind(*(np.stack(parts) for parts in zip(*examples, strict=True)))
