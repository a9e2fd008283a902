"""A network with its parameters, from a weights file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unireg_jax.errors import CHECKPOINT, UserError
from unireg_jax.imaging import nifti
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.models import features
from unireg_jax.models.features import Extractor
from unireg_jax.models.unireg import UniReg
from unireg_jax.registration import weights as released
from unireg_jax.registration.devices import default_device
from unireg_jax.registration.embedding import load_extractor


class Model(NamedTuple):
    """A network with its parameters, ready for any number of pairs.

    Attributes:
        module: UniReg.
        params: parameters of `module`.
        preprocess: how the network sees a scan.
        extractor: of the features that the network joins.
        spec: description that came with the parameters.
    """

    module: UniReg
    params: Any
    preprocess: PreprocessSpec
    extractor: Extractor
    spec: dict[str, Any]


def load_model(path: str | os.PathLike | None = None) -> Model:
    """Loads weights and builds the network they belong to.

    Args:
        path: `.safetensors` file, or the name of one in the package without its
            ending; None for $UNIREG_WEIGHTS or the package's default.

    Returns:
        Model.

    Raises:
        UserError: exit code 9, see registration/weights.py; `checkpoint_other` when
            this package has no such network.
    """
    path = released.find_weights(path)
    params, spec = released.load_weights(path)
    name = nifti.shown(path)
    if spec.get("kind", "unireg") != "unireg":
        raise UserError(
            "checkpoint_other",
            f"{name}: weights of a registration network expected, got those of an "
            f"embedding (kind {spec['kind']!r}); set $UNIREG_SAM to this file, and "
            "--weights to a network's",
            CHECKPOINT,
        )
    fields = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in spec["architecture"].items()
    }
    if spec["features"] not in features.FEATURES:
        raise UserError(
            "checkpoint_other",
            f"{name}: features of {sorted(features.FEATURES)} expected, got "
            f"{spec['features']!r}; use weights for this version of the package",
            CHECKPOINT,
        )
    try:
        module = UniReg(**fields)
        expected = jax.eval_shape(initializer(module), jax.random.key(0))
    except (TypeError, ValueError, KeyError, IndexError) as error:
        got = " ".join(str(error).split())[:200]
        raise UserError(
            "checkpoint_other",
            f"{name}: an architecture of this package expected, got {fields}: {got}; "
            "use weights for this version of the package",
            CHECKPOINT,
        ) from error
    released.check_tensors(params, expected, path)
    grid = PreprocessSpec.from_json(spec["preprocess"])
    if any(n % 16 for n in grid.shape) or grid.codes != "LPS":
        raise UserError(
            "checkpoint_other",
            f"{name}: a network grid on LPS axes in multiples of 16 voxels expected, "
            f"got {grid.codes} and {grid.shape}; train with such a grid",
            CHECKPOINT,
        )
    params = jax.tree.map(jnp.asarray, params)
    return Model(module, params, grid, _extractor(spec, path, grid), spec)


def _extractor(spec: dict[str, Any], path: Path, grid: PreprocessSpec) -> Extractor:
    """The features that the network was trained on."""
    options = {
        "window": (grid.hu_low, grid.hu_high),
        "combine": spec.get("combine", "concat"),
    }
    if spec["features"] != "sam":
        return load_extractor(spec["features"], **options)
    return load_extractor(released.find_own(spec, path), **options)


def initializer(module: UniReg) -> Callable[[jax.Array], Any]:
    """Gives `key -> params`; they do not depend on the input's size."""

    def init(key):
        image = jnp.zeros((1, 16, 16, 16, 1))
        cond = jnp.zeros((1,), jnp.int32)
        corr = jnp.zeros((1, 8, 8, 8, 27))
        return module.init(key, image, image, corr, cond, cond)["params"]

    return init


def device() -> dict[str, str]:
    """Platform and kind of the device that is used, for records."""
    used = default_device()
    return {"platform": used.platform, "kind": used.device_kind}
