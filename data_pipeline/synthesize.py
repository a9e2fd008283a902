"""Command: made pairs -> a prepared folder, with the known fields beside them.

    python -m data_pipeline.synthesize --kind phantoms --task lung --count 8 --out DIR
    python -m data_pipeline.synthesize --kind painted --task abdomen --count 40 \\
        --labels maps/*.nii.gz --names labels.json --out DIR
    python -m data_pipeline.synthesize --kind deformed --task chest --count 20 \\
        --scans scans/*.nii.gz --out DIR

The folder is like one of `data_pipeline.prepare`; training reads it with no option
more. The same arguments give the same files. Where a pair shows one anatomy, fields/
holds what relates its scans, both ways; `read_field` reads it.
"""

import argparse
import io
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from data_pipeline import generate, store
from data_pipeline.datasets import manifest
from data_pipeline.prepare import grid_arguments
from unireg_jax.errors import DATA_CHANGED, USAGE, UserError, on_terminal, tell
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.tasks import TASKS, PairType

KINDS = ("phantoms", "painted", "deformed")
_PHANTOM_MAPS = 8  # painted where no map is given; each is varied in every pair


def write_pairs(
    out: Path | str, sources: Mapping[str, generate.Source], count: int
) -> Path:
    """Writes pairs as a prepared folder.

    Args:
        out: folder; made if absent. The caller holds it; see `store.made_folder`.
        sources: split -> source: all of one task, kind and vocabulary, each of its own
            seed. With "val", every fourth pair goes there. A split takes the elements
            of its source from 0 on.
        count: pairs.

    Returns:
        out as a Path: index.json, volumes/ and, where fields are known, fields/ with
        [X, Y, Z, 3] float16 voxels (to 0.01).

    Raises:
        ValueError: count below 1, no "train", sources that differ or share a seed.
        UserError: `storage`, exit code 6.
    """
    described = {(s.task, s.kind, s.label_names, s.spec) for s in sources.values()}
    apart = len({s.seed for s in sources.values()}) == len(sources)
    if count < 1 or "train" not in sources or len(described) != 1 or not apart:
        raise ValueError(
            "count must be at least 1 and sources of one task, kind, vocabulary and "
            "grid, each of its own seed, train among them, got "
            f"{count} and {sorted(sources)}"
        )
    first = sources["train"]
    store.make_folders(out, store.VOLUMES_NAME)
    volumes: list[dict[str, Any]] = []
    known: dict[str, str] = {}
    listed: dict[str, list[list[str]]] = {split: [] for split in sources}
    elements = {split: itertools.count() for split in sources}
    quiet = not on_terminal()
    for k in tqdm.tqdm(range(count), desc=first.kind, unit="pair", disable=quiet):
        split = "val" if "val" in sources and k % 4 == 3 else "train"
        element = next(elements[split])
        pair = sources[split][element]
        ids = _write_scans(out, sources[split], pair, k, element, split, volumes)
        if pair.disp_fm is not None:
            listed[split] += [ids, ids[::-1]]
            for (one, other), disp in zip(
                (ids, ids[::-1]), (pair.disp_fm, pair.disp_mf), strict=True
            ):
                known[f"{one}|{other}"] = _write_field(out, one, other, disp)
    index: dict[str, Any] = {
        "version": store.INDEX_VERSION,
        "spec": first.spec.to_json(),
        "tasks": {first.task: {"labels": list(first.label_names)}},
        "volumes": volumes,
    }
    if known:
        # Two copies of one scan make a pair; scans of other pairs do not.
        index |= {"pairs": {first.task: listed}, "fields": known}
    store.write_index(out, index)
    return Path(out)


def read_field(root: Path | str, fixed_id: str, moving_id: str) -> np.ndarray:
    """Reads the known field between two scans of a folder.

    Args:
        root: folder written by `write_pairs`.
        fixed_id, moving_id: ids in its index.

    Returns:
        [X, Y, Z, 3] float32, voxels: moving(x + disp(x)) is the tissue of fixed(x).

    Raises:
        UserError: `not_found`, exit code 10: there is none, or its file is gone.
    """
    name = store.read_index(root).get("fields", {}).get(f"{fixed_id}|{moving_id}")
    try:
        content = (Path(root) / str(name)).read_bytes() if name else None
    except OSError:
        content = None
    if content is None:
        raise UserError(
            "not_found",
            f"{fixed_id}|{moving_id}: a known field expected, none in the folder; "
            "pairs of two subjects have none",
            DATA_CHANGED,
        )
    return np.load(io.BytesIO(content), allow_pickle=False).astype(np.float32)


def _write_scans(
    out, source, pair, k: int, element: int, split: str, volumes: list
) -> list[str]:
    """Writes both scans of a pair and gives their ids."""
    spec = source.spec
    vox2world = np.diag([*spec.spacing_mm, 1.0])
    vox2world[:3, 3] = -vox2world[:3, :3] @ ((np.array(spec.shape) - 1) / 2)
    intra = TASKS[source.task].pair_type == PairType.INTRA
    ids = []
    for place, scan in zip(("fixed", "moving"), pair[:2], strict=True):
        volume_id = f"{source.task}_{source.kind}_{k:05d}_{place}"
        labels = scan.labels if source.label_names else None
        subject = f"{source.kind}_{k:05d}" + ("" if intra else f"_{place}")
        volumes.append(
            {
                "id": volume_id,
                "task": source.task,
                "subject": subject,
                "split": split,
                "group": scan.kind,
                **store.write_volume(out, volume_id, scan.hu, labels),
                "vox2world": vox2world.tolist(),
                "source": {
                    "generated": repr(source),
                    "element": element,
                    "scan": place,
                },
            }
        )
        ids.append(volume_id)
    return ids


def _write_field(out, fixed_id: str, moving_id: str, disp: np.ndarray) -> str:
    store.make_folders(out, store.FIELDS_NAME)
    buffer = io.BytesIO()
    np.save(buffer, disp.astype(np.float16), allow_pickle=False)
    name = f"{store.FIELDS_NAME}/{fixed_id}__{moving_id}.npy"
    store.write_atomic(Path(out) / name, buffer.getvalue())
    return name


# --- command ---


def _sources(options: argparse.Namespace) -> dict[str, generate.Source]:
    """The sources of each split; label maps and scans never serve two."""
    spec = PreprocessSpec(shape=options.shape, spacing_mm=options.spacing)
    task, known = options.task, options.known
    names = _read_names(options)
    if options.kind == "phantoms":
        return _split(
            options,
            [None] * 4,  # enough for a val
            lambda _, seed: generate.PhantomPairs(task, spec, seed=seed, known=known),
        )
    if options.kind == "painted":
        if options.labels:
            maps, vocabulary = generate.read_maps(options.labels, names, spec)
        else:
            maps, vocabulary = generate.phantom_maps(
                task, spec, count=_PHANTOM_MAPS, seed=options.seed
            )
        return _split(
            options,
            maps,
            lambda some, seed: generate.PaintedPairs(
                task, spec, some, vocabulary, seed=seed, known=known
            ),
        )
    scans, vocabulary = generate.read_scans(
        options.scans, spec, label_paths=options.labels, names=names
    )
    return _split(
        options,
        scans,
        lambda some, seed: generate.DeformedPairs(
            task, spec, some, vocabulary, seed=seed
        ),
    )


def _split(
    options: argparse.Namespace, items: list, make
) -> dict[str, generate.Source]:
    """Of four items or more, every fourth is kept for val, if count is 4 or more.

    Train has twice the seed, val the next: no random number serves two splits or seeds.
    """
    seed = 2 * options.seed
    if options.count < 4 or len(items) < 4:
        return {"train": make(items, seed)}
    rest = [item for i, item in enumerate(items) if i % 4 != 3]
    return {"train": make(rest, seed), "val": make(items[3::4], seed + 1)}


def _read_names(options: argparse.Namespace) -> dict[int, str]:
    """Names of the labels: --names, or labels.json beside or above the first map."""
    if not options.labels:
        return {}
    folder = Path(options.labels[0]).resolve().parent
    places = [folder / "labels.json", folder.parent / "labels.json"]
    if options.names:
        places = [Path(options.names)]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise UserError(
            "not_found",
            f"{places[0].name}: names of the labels expected, none found; give --names",
            USAGE,
        )
    # Of an id with several names the first: a voxel is painted once.
    names = dict(reversed(manifest.read_label_map(path)))
    if not names:
        raise UserError(
            "schema",
            f"{path.name}: a structure expected, got background alone; list the ids",
            USAGE,
        )
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.synthesize",
        description="Writes made pairs of scans as a folder, ready for training.",
    )
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--task", choices=tuple(TASKS), required=True)
    parser.add_argument("--count", type=int, required=True, help="pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="folder to write")
    grid_arguments(parser)
    parser.add_argument(
        "--labels",
        nargs="+",
        default=[],
        metavar="FILE",
        help="label maps to paint (default: of phantoms), or those of --scans in the "
        "same order",
    )
    parser.add_argument(
        "--names",
        metavar="FILE",
        help='JSON {"1": "liver", …} (default: labels.json beside or above --labels)',
    )
    parser.add_argument(
        "--scans", nargs="+", default=[], metavar="FILE", help="CT to deform"
    )
    parser.add_argument(
        "--known",
        action="store_true",
        help="one anatomy twice with a known field, for inter-patient tasks too",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a folder of made pairs.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code: 0, 2 (usage), 4 (a file cannot be used), 6 (storage), 9 or 10 (the
        index in --out cannot be read).
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.count < 1 or options.seed < 0:
        parser.error("--count must be at least 1 and --seed at least 0")
    if options.kind == "deformed" and not options.scans:
        parser.error("--kind deformed needs --scans")
    if options.scans and options.kind != "deformed":
        parser.error(f"--scans goes with --kind deformed, not {options.kind}")
    if options.labels and options.kind == "phantoms":
        parser.error("--labels goes with --kind painted or deformed, not phantoms")
    if options.names and not options.labels:
        parser.error("--names goes with --labels, whose ids it names")
    if options.scans and options.labels and len(options.labels) != len(options.scans):
        parser.error("--labels must be as many as --scans, in the same order")
    try:
        with store.made_folder(options.out):  # before scans are read for minutes
            made = write_pairs(options.out, _sources(options), options.count)
    except UserError as error:
        tell(f"error: {error.reason}: {error}")
        return error.exit_code
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
