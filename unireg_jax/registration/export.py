"""The compiled path as a file that needs JAX and nothing of this package.

A StableHLO program for CPU and CUDA with the parameters inside: one file is complete,
and its digest says which network it is; parameters beside it could be mixed up, and at
355 405 numbers (1.4 MB) there is nothing to save. Beside it `<stem>.json` says what
goes in and comes out.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from unireg_jax.errors import USAGE, UserError
from unireg_jax.imaging import nifti
from unireg_jax.models import features
from unireg_jax.registration import compiled
from unireg_jax.registration.network import Model, load_model
from unireg_jax.registration.weights import check_target
from unireg_jax.tasks import OUTSIDE_HU, TASKS, PairType, Region

FORMAT = 1
SUFFIX = ".stablehlo"
PLATFORMS = ("cpu", "cuda")
_SCAN = (
    "HU cut to air_hu ... 3071 and rounded, outside_hu beyond the scan and where it "
    "is padded below -1500 HU, interpolated linearly (blurred first where voxels "
    "grow); hu_low ... hu_high is applied inside; on the grid of `preprocess`, about "
    "the middle of"
)
_VERSIONED = ("unireg-jax", "jax", "jaxlib", "flax")
_CARRIED = (
    "description",
    "intended_use",
    "known_failures",
    "licence",
    "sources",
    "held_out",
    "training",
    "embedding",
)


def export_register(
    path: str | os.PathLike,
    *,
    weights: Model | str | os.PathLike | None = None,
    shape: Sequence[int] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes features, network and conversion to voxels as one StableHLO program.

    The program takes fixed_hu and moving_hu, [b, X, Y, Z, 1] int16 in HU, moving
    pre-aligned on the fixed grid, and region and pair_type, [b] int32, for any b; it
    gives disp, [b, X, Y, Z, 3] float32 in voxels: `compile_register`'s. It has no
    gradient. `jax.export.deserialize(data).call(...)` runs it.

    Args:
        path: name that ends in `.stablehlo`; the description goes beside it as `.json`.
        weights: Model, or as in `load_model`.
        shape: (X, Y, Z) voxels, multiples of 16; None for the grid of the weights.
        overwrite: replace files of these names.

    Returns:
        What the description holds: preprocess, inputs, outputs, digests, versions.

    Raises:
        ValueError: shape is not as above.
        UserError: a name that does not fit or is taken, or flatbuffers is absent (exit
            code 2); weights that cannot be used (9); the disk (6).
    """
    path = Path(path)
    check_target(path, SUFFIX, overwrite=overwrite)
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError(
            "not_installed",
            "export: package flatbuffers expected, got none; run "
            "`pip install unireg-jax[export]`",
            USAGE,
        )
    if shape is not None:
        shape = compiled.check_shape(shape)
    model = weights if isinstance(weights, Model) else load_model(weights)
    spec = dataclasses.replace(model.preprocess, shape=shape or model.preprocess.shape)
    exported = _trace(model, spec.shape)
    data = bytes(exported.serialize())
    card = _describe(model, spec, exported, path.name, data)
    text = json.dumps(card, indent=2, allow_nan=False) + "\n"
    # The description comes last: its digest says whether the two belong together.
    with nifti.atomic_path(path) as temp:
        temp.write_bytes(data)
    with nifti.atomic_path(path.with_suffix(".json")) as temp:
        temp.write_text(text, encoding="utf-8")
    return card


def _trace(model: Model, shape: tuple[int, int, int]) -> jax.export.Exported:
    """The program for every platform and batch size, parameters inside."""
    window = (model.preprocess.hu_low, model.preprocess.hu_high)

    def register(fixed_hu, moving_hu, region, pair_type):
        scans = [
            compiled.Described(hu, features.describe(hu, model.extractor))
            for hu in (fixed_hu, moving_hu)
        ]
        encoded = compiled.encode_described(
            model.params,
            *scans,
            module=model.module,
            window=window,
            combine=model.extractor.combine,
        )
        params = {"params": model.params}
        # A vector is as long as in the window of the weights, whatever this one's.
        return model.module.apply(
            params,
            encoded,
            region,
            pair_type,
            unit_shape=model.preprocess.shape,
            method="decode",
        )

    (batch,) = jax.export.symbolic_shape("b")
    hu = jax.ShapeDtypeStruct((batch, *shape, 1), jnp.int16)
    codes = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return jax.export.export(jax.jit(register), platforms=PLATFORMS)(
        hu, hu, codes, codes
    )


def _describe(model, spec, exported, name, data) -> dict[str, Any]:
    """What a user of the program has to know; plain JSON."""
    grid = list(spec.shape)

    def array(name, shape, dtype, unit, meaning):
        return {
            "name": name,
            "shape": shape,
            "dtype": dtype,
            "unit": unit,
            "meaning": meaning,
        }

    volume = ["b", *grid, 1]
    return {
        "format": FORMAT,
        "artefact": {
            "name": name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "serialization": "jax.export",
            "calling_convention": exported.calling_convention_version,
        },
        "platforms": list(exported.platforms),
        "inputs": [
            array("fixed_hu", volume, "int16", "HU", f"{_SCAN} the fixed body"),
            array("moving_hu", volume, "int16", "HU", f"{_SCAN} it, pre-aligned"),
            array("region", ["b"], "int32", None, "see `region`"),
            array("pair_type", ["b"], "int32", None, "see `pair_type`"),
        ],
        "outputs": [
            array(
                "disp",
                ["b", *grid, 3],
                "float32",
                "voxels of the fixed grid",
                "moving_hu is read at x + disp(x), the scan itself where the "
                "pre-alignment leads that to; instance optimisation is no part of it",
            )
        ],
        "outside_hu": OUTSIDE_HU,
        "region": {region.name.lower(): int(region) for region in Region},
        "pair_type": {kind.name.lower(): int(kind) for kind in PairType},
        "tasks": {
            name: [task.region.name.lower(), task.pair_type.name.lower()]
            for name, task in TASKS.items()
        },
        "preprocess": spec.to_json(),
        "features": model.extractor.backend,
        "architecture": model.spec.get("architecture"),
        "weights": {
            "sha256": model.spec.get("sha256"),
            **{key: model.spec[key] for key in _CARRIED if key in model.spec},
        },
        "versions": {name: _version(name) for name in _VERSIONED},
    }


def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None
