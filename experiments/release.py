"""Turns a finished run into the weights that the package ships.

    python -m experiments.release --workdir=runs/all/final \
        --sources=experiments/unireg_sources.json
    python -m experiments.release --workdir=runs/twice --name=unireg_heldout \
        --sources=experiments/heldout_sources.json
    python -m experiments.release --workdir=runs/sam_lite --half --name=sam_lite \
        --sources=experiments/sam_lite_sources.json

Copies the run's weights into unireg_jax/weights/, completes their card: intended use,
known failures, licence, data with their licences, and the measured results. Two things
depend on the weights and are then made anew: docs/weights.md by experiments.model_card,
and the reference field of tests/registration/test_golden.py by that file.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from unireg_jax.errors import CHECKPOINT, UserError
from unireg_jax.registration import weights

TARGET = Path(__file__).resolve().parents[1] / "unireg_jax" / "weights"
LICENCE = "Apache-2.0 (these parameters); see `sources` for the training scans"


def main(argv) -> None:
    del argv
    run = Path(flags.FLAGS.workdir)
    params, spec = weights.load_weights(run / "weights.safetensors")
    if flags.FLAGS.half:
        params = jax.tree.map(_half, params)
    for name in ("sha256", "format"):
        spec.pop(name)
    if "embedding" in spec:
        spec["embedding"]["name"] = packaged(spec["embedding"]["sha256"])
    sources = json.loads(Path(flags.FLAGS.sources).read_text())
    spec = complete(spec | {"licence": LICENCE}, sources)
    TARGET.mkdir(exist_ok=True)
    path = TARGET / f"{flags.FLAGS.name}.safetensors"
    weights.save_weights(path, params, spec)
    print(path)


def packaged(sha256: str) -> str:
    """The name of the embedding in the package that a network was trained on.

    Raises:
        UserError: exit code 9, it is not there.
    """
    for path in sorted(TARGET.glob("*.json")):
        card = json.loads(path.read_text())
        if card.get("kind") == "sam" and card["sha256"] == sha256:
            return path.with_suffix(".safetensors").name
    raise UserError(
        "checkpoint_other",
        f"{TARGET.name}/: an embedding of SHA-256 {sha256[:16]}... expected, that of "
        "the features the network was trained on, none found; release it first",
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
    flags.DEFINE_bool("half", False, "Kernels in float16: half the size.")
    flags.mark_flags_as_required(["workdir", "sources"])
    cli.run(main)
