"""Streams of made pairs for a training on prepared scans.

phantoms  drawn, of every task
painted   CT painted from the label maps of the training volumes
deformed  training volumes and deformed copies of them

See docs/made_pairs.md. The labels are those of the first layer: where organs overlap,
the rest is left out, of both scans of a pair.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from data_pipeline import generate, loader, store
from unireg_jax.errors import NOTHING, UserError
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.tasks import TASKS, PairBatch

KINDS = ("phantoms", "painted", "deformed")


def make_streams(
    dataset: loader.Dataset,
    shares: Mapping[str, float],
    weights: Mapping[str, float],
    *,
    seed: int,
) -> tuple[loader.Stream, ...]:
    """Makes the streams of some kinds, one per task.

    Args:
        dataset: prepared scans; those of the split "train" are painted and deformed.
        shares: kind -> share of all pairs, 0 to 1, together at most 1.
        weights: task -> share within a kind, any positive scale. A kind leaves out the
            tasks it cannot serve.
        seed: of all pairs.

    Returns:
        For `loader.make_iterator`; named as phantoms_lung.

    Raises:
        UserError: `schema`, exit code 3: no task of a kind has what it needs.
        ValueError: unknown kind, shares out of range.
    """
    if set(shares) - set(KINDS) or not 0 <= math.fsum(shares.values()) <= 1 + 1e-9:
        raise ValueError(
            f"shares must be of {KINDS} and together 0 to 1, got {dict(shares)}"
        )
    found: list[loader.Stream] = []
    for kind in (kind for kind in KINDS if shares.get(kind)):
        tasks = [task for task in TASKS if weights.get(task)]
        sources = {task: _source(kind, dataset, task, seed) for task in tasks}
        sources = {task: source for task, source in sources.items() if source}
        if not sources:
            what = "with labels " if kind == "painted" else ""
            raise UserError(
                "schema",
                f"{dataset.root}: training volumes {what}of {', '.join(tasks)} "
                f"expected for {kind} pairs, none found; set their share to 0",
                NOTHING,
            )
        total = math.fsum(weights[task] for task in sources)
        found += [
            loader.Stream(
                name=f"{kind}_{task}",
                share=shares[kind] * weights[task] / total,
                label_names=source.label_names,
                draw=_drawer(source),
                version=source.version,
            )
            for task, source in sources.items()
        ]
    return tuple(found)


def _source(
    kind: str, dataset: loader.Dataset, task: str, seed: int
) -> generate.Source | None:
    """The source of a kind's pairs of a task; None where it has nothing to make of."""
    spec = PreprocessSpec.from_json(dataset.index["spec"])
    if kind == "phantoms":
        return generate.PhantomPairs(task, spec, seed=seed, known=False)
    volumes = [
        i
        for i, volume in enumerate(dataset.index["volumes"])
        if (volume["task"], volume["split"]) == (task, "train")
        and (kind == "deformed" or volume["labels"])
    ]
    if kind == "painted":  # a scan without its only organ has nothing to paint
        entries = dataset.index["volumes"]
        volumes = [
            i
            for i in volumes
            if store.read_array(dataset.root, entries[i], "labels").any()
        ]
    if not volumes:
        return None
    names = dataset.label_names(task)
    if kind == "deformed":
        scans = _Scans(dataset, volumes)
        return generate.DeformedPairs(task, spec, scans, names, seed=seed)
    maps = _Maps(dataset, volumes)
    return generate.PaintedPairs(task, spec, maps, names, seed=seed, known=False)


def _drawer(source: generate.Source) -> Callable[[int], PairBatch]:
    return lambda number: generate.example(source.task, number, source[number])


class _Volumes(Sequence):
    """Some volumes of a dataset, read when they are asked for."""

    def __init__(self, dataset: loader.Dataset, positions: Sequence[int]):
        self._dataset, self._positions = dataset, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, i):
        hu, labels, _ = self._dataset.volume(self._positions[i])
        return self._see(hu, labels)


class _Scans(_Volumes):
    def _see(self, hu, labels) -> generate.Scan:
        return generate.Scan(hu, labels, "scan")


class _Maps(_Volumes):
    def _see(self, hu, labels) -> generate.LabelMap:
        del hu
        return generate.LabelMap(labels, "training volume")
