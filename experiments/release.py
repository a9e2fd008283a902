"""Turns a finished run into the weights that the package ships.

    python -m experiments.release --workdir=runs/all/final \
        --sources=experiments/unireg_sources.json
    python -m experiments.release --workdir=runs/twice --name=unireg_heldout \
        --sources=experiments/heldout_sources.json
    python -m experiments.release --workdir=runs/sam_lite --half --name=sam_lite \
        --sources=experiments/sam_lite_sources.json
    python -m experiments.release --workdir=runs/fold1/s5 --half --fold=1 \
        --sources=experiments/part_sources.json

Copies the run's weights into unireg_jax/weights/, completes their card: intended use,
known failures, licence, data with their licences, and the measured results. Two things
depend on the weights and are then made anew: docs/weights.md by experiments.model_card,
and the reference field of tests/registration/test_golden.py by that file. Weights of a
part of the cross-validation (--fold) stay beside the scripts, and nothing depends on
them but the figures of docs/peers.md.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli, real_pairs
from experiments.real_scans import FOLDS
from unireg_jax.errors import CHECKPOINT, UserError
from unireg_jax.registration import weights

TARGET = Path(__file__).resolve().parents[1] / "unireg_jax" / "weights"
LICENCE = "Apache-2.0 (these parameters); see `sources` for the training scans"


def main(argv) -> None:
    del argv
    options = flags.FLAGS
    sources = json.loads(Path(options.sources).read_text(encoding="utf-8"))
    target = TARGET / f"{options.name}.safetensors"
    if options.fold:
        target = Path(real_pairs.weights_of(f"fold{options.fold}"))
        sources["held_out"] = patients(options.fold)
    print(release(Path(options.workdir), sources, target, options.half))


def patients(fold: int) -> str:
    """Those that a part leaves out, as cards name them."""
    return "OpenKBP patients " + ", ".join(FOLDS[fold])


def release(
    run: Path, sources: dict[str, Any], target: Path, half: bool = False
) -> Path:
    """Writes the weights of a run with a complete card.

    Args:
        run: folder of the run.
        sources: what the card says besides, see `complete`.
        target: `.safetensors` file; an embedding that the network was trained on lies
            beside it.
        half: store kernels in float16.

    Returns:
        target.

    Raises:
        UserError: exit code 9, the weights cannot be read, or their embedding is not
            there.
    """
    params, spec = weights.load_weights(run / "weights.safetensors")
    if half:
        params = jax.tree.map(_half, params)
    for name in ("sha256", "format"):
        spec.pop(name)
    if "embedding" in spec:
        spec["embedding"]["name"] = _beside(target, spec["embedding"]["sha256"])
    spec = complete(spec | {"licence": LICENCE}, sources)
    target.parent.mkdir(exist_ok=True)
    weights.save_weights(target, params, spec)
    return target


def _beside(target: Path, sha256: str) -> str:
    """The name that the file of a digest has there."""
    there = sorted(target.parent.glob("*.safetensors"))
    if path := weights.find_digest(sha256, there):
        return path.name
    raise UserError(
        "checkpoint_missing",
        f"{target.parent.name}/: the embedding it was trained on, SHA-256 "
        f"{sha256[:16]}..., expected, none found; release that first",
        CHECKPOINT,
    )


def complete(card: dict[str, Any], sources: dict[str, Any]) -> dict[str, Any]:
    """The card with the fields of `sources`, dicts within dicts merged alike."""
    merged = card | sources
    for name, value in sources.items():
        if isinstance(value, dict) and isinstance(card.get(name), dict):
            merged[name] = complete(card[name], value)
    return merged


def _half(x):
    """Kernels in float16; vectors stay, whose range may be too wide for it."""
    return x.astype(np.float16) if x.ndim > 1 else x


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The finished run.")
    flags.DEFINE_string("sources", None, "JSON merged into the card.")
    flags.DEFINE_string("name", "unireg", "File stem.")
    flags.DEFINE_integer("fold", 0, "Of FOLDS, instead.", 0, len(FOLDS) - 1)
    flags.DEFINE_bool("half", False, "Kernels in float16: half the size.")
    flags.mark_flags_as_required(["workdir", "sources"])
    cli.run(main)
