"""Pre-aligns the pairs of a prepared folder and stores the result in it.

    python -m experiments.prealign --data=PREPARED

By the rule that `unireg register --affine auto` follows (registration/affine.py).
UniReg, section 4.1: inter-patient datasets are aligned globally first. Pairs already in
align.json are kept, so an interrupted run goes on where it stopped.
"""

import sys
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipeline import loader, pairs, store
from experiments import cli
from unireg_jax.registration import affine
from unireg_jax.tasks import OUTSIDE_HU

_SAVE_EVERY = 20


def prealign(root: Path | str) -> int:
    """Aligns every pair that has no entry yet; returns how many were new."""
    dataset = loader.Dataset(root)
    volumes = dataset.index["volumes"]
    done = {k: v.tolist() for k, v in dataset.alignments.items()}
    wanted = [pair for split in pairs.SPLITS for pair in dataset.pairs(split)]
    todo = [pair for pair in wanted if _key(volumes, pair) not in done]
    for i, pair in enumerate(tqdm(todo, disable=not sys.stderr.isatty())):
        done[_key(volumes, pair)] = _align(dataset, pair).tolist()
        if i % _SAVE_EVERY == _SAVE_EVERY - 1 or i == len(todo) - 1:
            store.write_json(Path(root) / store.ALIGN_NAME, done)
    return len(todo)


def _key(volumes, pair) -> str:
    return f"{volumes[pair.fixed]['id']}|{volumes[pair.moving]['id']}"


def _align(dataset: loader.Dataset, pair: pairs.Pair) -> np.ndarray:
    """Fixed voxel -> moving voxel of one pair."""
    ends = (pair.fixed, pair.moving)
    fixed, moving = (
        np.asarray(dataset.index["volumes"][i]["vox2world"], float) for i in ends
    )
    fixed_hu, moving_hu = (dataset.volume(i)[0] for i in ends)
    kind, _ = affine.choose_kind(
        *(_box(hu, m) for hu, m in ((fixed_hu, fixed), (moving_hu, moving))),
        region=pair.region,
        pair_type=pair.pair_type,
    )
    world = affine.affine_align(
        fixed_hu,
        moving_hu,
        fixed_vox2world=fixed,
        moving_vox2world=moving,
        kind=kind,
    )
    return np.linalg.inv(moving) @ world @ fixed


def _box(hu: np.ndarray, vox2world: np.ndarray) -> np.ndarray:
    """Box of the scan's own field of view, without padding."""
    inside = np.argwhere(hu != OUTSIDE_HU)
    return affine.scan_box(vox2world, inside.min(0), inside.max(0))


def main(argv) -> None:
    del argv
    cli.setup()
    print(f"{prealign(flags.FLAGS.data)} pairs aligned")


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder made by data_pipeline.prepare.")
    flags.mark_flags_as_required(["data"])
    cli.run(main)
