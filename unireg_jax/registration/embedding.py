"""Feature extractors by name or file: MIND, or an anatomical embedding (SAM)."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp

from unireg_jax.errors import CHECKPOINT, UserError
from unireg_jax.imaging import nifti
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.models.features import FEATURES, Extractor, sam
from unireg_jax.registration import weights as released

VARIABLE = released.EMBEDDING_VARIABLE
_REMEDY = (
    "convert a public checkpoint (`unireg weights convert --from SAM.pth --to "
    "sam.safetensors`) or train one (`python -m experiments.train_sam`), and pass the "
    f"file or set ${VARIABLE}"
)


def load_extractor(
    source: str | os.PathLike = "mind",
    *,
    window: tuple[float, float] = (-800.0, 400.0),
    combine: str = "concat",
    dtype: str = "float32",
    conv_impl: str = "auto",
) -> Extractor:
    """Makes an extractor; never one with random parameters.

    Args:
        source: "mind" or "none"; "sam" for the file in $UNIREG_SAM, else the package's
            own; or a `.safetensors` file with its description beside it.
        window: lowest and highest HU, for "mind" and "none".
        combine: see features.Extractor.
        dtype: of the embedding's convolutions.
        conv_impl: formulation of the embedding's convolutions, see ops/conv.py.

    Returns:
        Extractor.

    Raises:
        UserError: exit code 9: `checkpoint_missing`, `checkpoint_other` when the file
            holds no embedding, and see registration/weights.py.
    """
    name = os.fspath(source)
    if name in FEATURES and name != "sam":
        return Extractor(name, tuple(window), combine)
    path = find_embedding(None if name == "sam" else name)
    variables, spec = released.load_weights(path)
    shown = nifti.shown(path)
    if spec.get("kind") != "sam":
        raise _other(
            f"{shown}: an anatomical embedding (kind 'sam') expected, got "
            f"{spec.get('kind', 'a registration network')!r}; {_REMEDY}"
        )
    fields = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in spec["architecture"].items()
    }
    try:
        trained = sam.Sam(**fields, norm="batch", conv_impl="direct")
        expected = jax.eval_shape(initializer(trained), jax.random.key(0))
    except (TypeError, ValueError, KeyError, IndexError) as error:
        got = " ".join(str(error).split())[:200]
        raise _other(
            f"{shown}: an embedding of this package expected, got {fields}: {got}; use "
            "weights for this version of the package"
        ) from error
    released.check_tensors(variables, expected, path)
    network = sam.Sam(**fields, dtype=dtype, conv_impl=conv_impl)
    params = sam.fold(variables)
    spacing = PreprocessSpec.from_json(spec["preprocess"]).spacing_mm
    digest = spec["sha256"]
    return Extractor("sam", tuple(window), combine, network, params, spacing, digest)


def load_matcher(own: Extractor) -> Extractor:
    """Says which features find matches for pre-alignment.

    Args:
        own: of the registration network.

    Returns:
        own if it is an embedding; else the one in $UNIREG_SAM, else the package's, else
        own.

    Raises:
        UserError: exit code 9, see `load_extractor`: $UNIREG_SAM cannot be used.
    """
    if own.backend == "sam":
        return own
    if (
        VARIABLE not in os.environ
        and not (released.PACKAGE / released.EMBEDDING).is_file()
    ):
        return own
    return load_extractor("sam", window=own.window)


def find_embedding(path: str | os.PathLike | None = None) -> Path:
    """Says which embedding is used: argument, then $UNIREG_SAM, then the package's.

    Args:
        path: `.safetensors` file, a name as of `weights.find_weights`, or None.

    Returns:
        Path of a file that exists.

    Raises:
        UserError: `checkpoint_missing`, exit code 9, with both remedies.
    """
    found = released.named_file(path) if path else released.default_embedding()
    try:
        there = found.is_file()
    except (OSError, ValueError):  # a name that cannot be one
        there = False
    if there and found.suffix == ".safetensors":
        return found
    got = "got another file" if there else "none found"
    what = nifti.shown(found)
    if not path:
        what = f"${VARIABLE} {what}" if os.environ.get(VARIABLE) else "the package"
    raise UserError(
        "checkpoint_missing",
        f"{what}: a .safetensors file of an anatomical embedding expected, {got}; "
        + _REMEDY,
        CHECKPOINT,
    )


def initializer(module: sam.Sam):
    """Gives `key -> variables`; they do not depend on the input's size."""

    def init(key):
        return module.init(key, jnp.zeros((1, 16, 16, 8, 1)))

    return init


def _other(message: str) -> UserError:
    return UserError("checkpoint_other", message, CHECKPOINT)
