"""Pre-aligns the pairs of a prepared folder and stores the result in it.

    python -m experiments.prealign --data=PREPARED
    python -m experiments.prealign --data=PREPARED --kind=features

By the rule that `unireg register --affine auto` follows (registration/affine.py); with
another kind, inter-patient pairs by that. UniReg, section 4.1: inter-patient datasets
are aligned globally first, by matched features. Pairs already in align.json are kept,
so an interrupted run goes on where it stopped, but those of volumes whose image, grid,
task or subject has changed since; align_kinds.json says how each was found.
"""

import functools
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipeline import loader, pairs, store
from experiments import cli
from unireg_jax.errors import USAGE, UserError, on_terminal
from unireg_jax.models import features
from unireg_jax.models.features import Extractor
from unireg_jax.registration import affine, feature_affine, matching, memory
from unireg_jax.registration.embedding import load_extractor
from unireg_jax.tasks import OUTSIDE_HU, PairType

KINDS = ("auto", "affine", "rigid", "features")
_SAVE_EVERY = 20
_KEEP_BYTES = 2**31  # of features


def prealign(
    root: Path | str, *, kind: str = "auto", extractor: Extractor | None = None
) -> Counter:
    """Aligns every pair that has no entry yet.

    Args:
        root: the prepared folder.
        kind: row of KINDS, for inter-patient pairs; others follow "auto".
        extractor: of the features to match; for "features".

    Returns:
        How many were new, by the kind that was used.

    Raises:
        UserError: `schema`, exit code 2: pairs are there that were asked for by another
            kind.
    """
    if kind not in KINDS or (kind == "features") != (extractor is not None):
        raise ValueError(
            f"kind must be one of {KINDS}, an extractor belongs to 'features' alone, "
            f"got {kind!r} and {extractor and extractor.backend!r}"
        )
    dataset = loader.Dataset(root, stale=True)
    if (free := memory.available_bytes()) is not None:
        dataset.limit(free / 2**31)  # half
    volumes = dataset.index["volumes"]
    done = {k: v.tolist() for k, v in dataset.alignments.items()}
    asked = kind if extractor is None else f"{kind} ({extractor.label})"
    # Pairs of one folder are found by one search.
    asked += f", search {affine.ALGORITHM}"
    notes = _notes(Path(root), asked, done)
    now, before = pairs.volume_digests(dataset.index), notes.get("volumes", {})
    wanted = [pair for split in pairs.SPLITS for pair in dataset.pairs(split)]
    todo = [pair for pair in wanted if _key(volumes, pair) not in done]
    see = _seer(dataset, extractor) if extractor else None
    used = Counter()
    changed = todo or before != before | now
    if changed:
        # What is left of volumes as they were goes before their digests do.
        _save(Path(root), notes | {"volumes": now | before}, done)
        notes["volumes"] = before | now
    for i, pair in enumerate(tqdm(todo, disable=not on_terminal())):
        matrix, name, warning = _align(dataset, pair, kind, see, extractor)
        key = _key(volumes, pair)
        done[key] = matrix.tolist()
        notes["pairs"][key] = name + (f"; {warning}" if warning else "")
        used[name] += 1
        if i % _SAVE_EVERY == _SAVE_EVERY - 1:
            _save(Path(root), notes, done)
    if changed:
        _save(Path(root), notes, done)
    return used


def _save(root: Path, notes: dict, done: dict) -> None:
    """Notes first: they may name a pair too many, never one too few.

    Digests of volumes that are gone stay for their return.
    """
    store.write_json(root / store.ALIGN_NOTES_NAME, notes)
    store.write_json(root / store.ALIGN_NAME, done)


def _notes(root: Path, asked: str, done: dict) -> dict:
    """What align_kinds.json says; it must have been asked for in the same way."""
    path = root / store.ALIGN_NOTES_NAME
    notes = {"kind": "auto", "pairs": {}}  # of a folder that knew no other
    if path.is_file():
        notes = json.loads(path.read_text(encoding="utf-8"))
    if done and notes["kind"] != asked:
        raise UserError(
            "schema",
            f"--kind: {notes['kind']} expected, as {len(done)} pairs of "
            f"{store.ALIGN_NAME} were asked for, got {asked}; delete "
            f"{store.ALIGN_NAME} to align them anew",
            USAGE,
        )
    kept = {k: v for k, v in notes["pairs"].items() if k in done}
    return notes | {"kind": asked, "pairs": kept}


class _Seen(NamedTuple):
    """A volume at the spacing that the features know, with its features."""

    maps: features.Maps
    hu: np.ndarray
    vox2world: np.ndarray


def _seer(dataset: loader.Dataset, extractor: Extractor):
    """Volumes with their features by position; the last ones are kept."""
    program = jax.jit(features.describe)
    factor = _factor(dataset.index["spec"]["spacing_mm"], extractor)

    def compute(i):
        hu = np.asarray(dataset.volume(i)[0])
        vox2world = np.asarray(dataset.index["volumes"][i]["vox2world"], float)
        if factor > 1:
            hu, vox2world = _pooled(hu, vox2world, factor)
        return _Seen(program(hu[None, ..., None], extractor), hu, vox2world)

    if not dataset.index["volumes"]:
        return compute
    size = sum(m.nbytes for m in compute(0).maps)
    return functools.lru_cache(max(2, _KEEP_BYTES // size))(compute)


def _factor(spacing_mm, extractor: Extractor) -> int:
    """Voxels of the volumes per voxel that the features were trained on."""
    if extractor.spacing_mm is None:
        return 1
    ratio = np.array(extractor.spacing_mm) / spacing_mm
    factor = max(1, int(round(ratio[0])))
    if np.abs(ratio / factor - 1).max() > 0.1:
        raise UserError(
            "grid_mismatch",
            f"--features: an embedding for voxels of {spacing_mm} mm or a multiple of "
            f"them expected, got one for {extractor.spacing_mm}; use another one, or "
            "--features=mind",
            USAGE,
        )
    return factor


def _pooled(hu: np.ndarray, vox2world: np.ndarray, factor: int):
    """Means over cubes of voxels inside the scan; padded to what networks take."""
    pads = [(0, -n % (m * factor)) for n, m in zip(hu.shape, (16, 16, 8), strict=True)]
    hu = np.pad(hu, pads, constant_values=OUTSIDE_HU)
    a, b, c = (n // factor for n in hu.shape)
    cubes = hu.reshape(a, factor, b, factor, c, factor).astype(np.float32)
    inside = cubes != OUTSIDE_HU
    count = inside.sum((1, 3, 5))
    mean = np.where(inside, cubes, 0).sum((1, 3, 5)) / np.maximum(count, 1)
    mean = np.where(2 * count >= factor**3, np.rint(mean), OUTSIDE_HU)
    place = np.diag([float(factor)] * 3 + [1.0])
    place[:3, 3] = (factor - 1) / 2
    return mean.astype(np.int16), vox2world @ place


def _key(volumes, pair) -> str:
    return f"{volumes[pair.fixed]['id']}|{volumes[pair.moving]['id']}"


def _align(dataset, pair: pairs.Pair, kind, see, extractor):
    """Fixed voxel -> moving voxel of one pair, the kind used, and a warning."""
    ends = (pair.fixed, pair.moving)
    fixed, moving = (
        np.asarray(dataset.index["volumes"][i]["vox2world"], float) for i in ends
    )
    fixed_hu, moving_hu = (dataset.volume(i)[0] for i in ends)
    places = {"fixed_vox2world": fixed, "moving_vox2world": moving}
    warning = ""
    if pair.pair_type != PairType.INTER or kind == "auto":
        kind, _ = affine.choose_kind(
            *(_box(hu, m) for hu, m in ((fixed_hu, fixed), (moving_hu, moving))),
            region=pair.region,
            pair_type=pair.pair_type,
        )
    if kind == "features":
        seen = [see(i) for i in ends]
        spacing = np.linalg.norm(seen[0].vox2world[:3, :3], axis=0)
        found = feature_affine.feature_align(
            *(scan.maps for scan in seen),
            *(scan.hu for scan in seen),
            fixed_vox2world=seen[0].vox2world,
            moving_vox2world=seen[1].vox2world,
            plan=matching.plan_for(extractor.backend, spacing),
        )
        world, kind, warning = found.matrix, found.kind, found.warning
    else:
        world = affine.affine_align(fixed_hu, moving_hu, **places, kind=kind)
    return np.linalg.inv(moving) @ world @ fixed, kind, warning


def _box(hu: np.ndarray, vox2world: np.ndarray) -> np.ndarray:
    """Box of the scan's own field of view, without padding."""
    inside = np.argwhere(hu != OUTSIDE_HU)
    return affine.scan_box(vox2world, inside.min(0), inside.max(0))


def main(argv) -> None:
    del argv
    cli.setup()
    options = flags.FLAGS
    extractor = None
    if options.kind == "features":
        extractor = load_extractor(options.features)
    used = prealign(options.data, kind=options.kind, extractor=extractor)
    how = ", ".join(f"{kind} {count}" for kind, count in sorted(used.items()))
    print(f"{used.total()} pairs aligned" + (f": {how}" if how else ""))


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder made by data_pipeline.prepare.")
    flags.DEFINE_enum("kind", "auto", KINDS, "How to align two patients.")
    flags.DEFINE_string("features", "sam", "Of --kind=features: sam, mind or a file.")
    flags.mark_flags_as_required(["data"])
    cli.run(main)
