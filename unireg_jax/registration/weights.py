"""Released parameters: find, verify, load and save.

Two files with one stem: `<stem>.safetensors` holds the tensors and can hold nothing
that runs, `<stem>.json` says what they belong to. Neither is trusted: the tensors must
have the digest that the description names, and must be finite. No JAX is imported here,
so that a list of what is installed is instant.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from unireg_jax.errors import CHECKPOINT, STORAGE, USAGE, UserError
from unireg_jax.imaging import nifti
from unireg_jax.imaging.nifti import shown
from unireg_jax.imaging.preprocess import PreprocessSpec

FORMAT = 1
VARIABLE = "UNIREG_WEIGHTS"
DEFAULT = "unireg.safetensors"  # preferred when the package holds several
EMBEDDING_VARIABLE = "UNIREG_SAM"
EMBEDDING = "sam_lite.safetensors"  # the package's anatomical embedding
_REQUIRED = {"format": int, "architecture": dict, "features": str, "preprocess": dict}
_LARGEST = {".json": 1 << 20, ".safetensors": 1 << 32}  # bytes
PACKAGE = Path(__file__).parents[1] / "weights"
_REMEDY = (
    "pass --weights FILE.safetensors, or a name that `unireg weights list` shows, or "
    "train your own with `python -m experiments.train`"
)


def find_weights(path: str | os.PathLike | None = None) -> Path:
    """Says which weights are used: argument, then $UNIREG_WEIGHTS, then the package's.

    Args:
        path: `.safetensors` file; or the name of one in the package, with or without
            its ending, unless a file of that name is there; or None.

    Returns:
        Path of a `.safetensors` file that exists.

    Raises:
        UserError: `checkpoint_missing`, exit code 9.
    """
    if path is not None:
        return _existing(named_file(path), "--weights")
    if named := os.environ.get(VARIABLE):
        return _existing(named_file(named), f"${VARIABLE}")
    packaged = sorted(PACKAGE.glob("*.safetensors"))
    preferred = [file for file in packaged if file.name == DEFAULT] or packaged
    if len(preferred) == 1:
        return preferred[0]
    if preferred:
        names = ", ".join(file.name for file in preferred)
        raise _fault(
            "missing", f"the package: one weights file expected, got {names}; {_REMEDY}"
        )
    raise _fault(
        "missing",
        f"no weights: none given, ${VARIABLE} is not set and the package holds none; "
        + _REMEDY,
    )


def named_file(name: str | os.PathLike) -> Path:
    """What a name or a path means; whether it is there is not looked at.

    Returns:
        The package's file of that name, with or without its ending, unless a file of
        the whole name is in the working folder; else the path as it is given.
    """
    name = os.fspath(name)
    for file in PACKAGE.glob("*.safetensors"):
        if name == file.stem or (name == file.name and not Path(name).exists()):
            return file
    return Path(name)


def default_embedding() -> Path:
    """$UNIREG_SAM, else the package's; whether it is there is not looked at."""
    return named_file(os.environ.get(EMBEDDING_VARIABLE) or PACKAGE / EMBEDDING)


def load_weights(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loads parameters and their description, both verified.

    Whether the tensors fit the network is for `check_tensors`.

    Args:
        path: `.safetensors` file, its description beside it as `.json`.

    Returns:
        params, nested dict of float32 arrays, whatever precision they are stored in;
        spec: format, architecture (arguments of UniReg), features (row of FEATURES),
        preprocess (PreprocessSpec), sha256 (of the tensors' file), and what else the
        description says.

    Raises:
        UserError: exit code 9; reason `checkpoint_missing`, `checkpoint_torn`,
            `checkpoint_changed`, `checkpoint_format`, `checkpoint_other` (tensors that
            are not floating) or `checkpoint_nonfinite`.
    """
    path = _existing(Path(path), "weights", "check the name")
    card = path.with_suffix(".json")
    if not card.is_file():
        raise _fault(
            "missing",
            f"{shown(path)}: its description {shown(card.name)} is expected beside it, "
            "none found; copy both files",
        )
    spec = _parse(_read(card), card)
    data = _read(path)
    digest = hashlib.sha256(data).hexdigest()
    if digest != spec["sha256"]:
        raise _fault(
            "changed",
            f"{shown(path)}: SHA-256 {spec['sha256'][:16]}... expected by "
            f"{shown(card.name)}, got {digest[:16]}...; download or copy both files "
            "again",
        )
    try:
        tensors = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _fault(
            "torn",
            f"{shown(path)}: safetensors of float32 or float16 expected, got "
            f"{_one_line(error)}; download or copy it again",
        ) from error
    single = {}
    for name, tensor in tensors.items():
        if not np.issubdtype(tensor.dtype, np.floating):
            raise _fault(
                "other",
                f"{shown(path)}: tensors of float32 or float16 expected, got "
                f"{tensor.dtype} in {shown(name)}; use weights for this package",
            )
        with np.errstate(over="ignore"):
            single[name] = tensor.astype(np.float32)
        if not np.isfinite(single[name]).all():
            raise _fault(
                "nonfinite",
                f"{shown(path)}: finite numbers expected, got NaN or infinity in "
                f"{shown(name)}; use an earlier checkpoint of the run",
            )
    return _nest(single), spec


def find_digest(sha256: str, files: Iterable[Path]) -> Path | None:
    """The first of some weights files whose description names a digest.

    The tensors are not read: `load_weights` verifies them.

    Args:
        sha256: of the tensors' file.
        files: `.safetensors`; those that are not there, or not whole, are passed over.

    Returns:
        Path, or None.
    """
    for path in files:
        try:
            card = path.with_suffix(".json")
            if path.is_file() and _parse(_read(card), card)["sha256"] == sha256:
                return path
        except (UserError, OSError, ValueError):  # or a name that cannot be one
            continue
    return None


def find_own(spec: Mapping[str, Any], network: str | os.PathLike) -> Path:
    """Finds the embedding that a network was trained on, and takes no other.

    Args:
        spec: of a network on features of one, from `load_weights`.
        network: its `.safetensors` file.

    Returns:
        Path of the file of that name beside the network, of any in the package or of
        $UNIREG_SAM, the first whose description has the digest.

    Raises:
        UserError: exit code 9: `checkpoint_missing`, none of these has it;
            `checkpoint_torn`, the description does not name one.
    """
    if "embedding" not in spec:
        raise _fault(
            "torn",
            f"{shown(network)}: the name and digest of the embedding it was trained on "
            "expected in its description, got none; use the two files of one training "
            "run",
        )
    wanted = spec["embedding"]
    name = Path(wanted["name"]).name or "embedding.safetensors"
    places = [Path(network).with_name(name), *sorted(PACKAGE.glob("*.safetensors"))]
    places.append(default_embedding())  # the variable's, if it is set
    found = find_digest(wanted["sha256"], places)
    if found is None:
        raise _fault(
            "missing",
            f"{shown(network)}: the embedding it was trained on, SHA-256 "
            f"{shown(wanted['sha256'][:16])}..., expected beside it, in the package or "
            f"by ${EMBEDDING_VARIABLE}, none found; copy {shown(name)} and its .json "
            f"there, or set ${EMBEDDING_VARIABLE} to that file",
        )
    return found


def save_weights(
    path: str | os.PathLike, params: Mapping[str, Any], spec: Mapping[str, Any]
) -> None:
    """Writes parameters and their description, each whole or not at all.

    Args:
        path: name that ends in `.safetensors`; the description goes beside it.
        params: nested dict of arrays, names without a slash.
        spec: architecture, features, preprocess, and anything else JSON can hold;
            format and sha256 are set here.

    Raises:
        ValueError: wrong name, a field is missing, or not JSON.
        UserError: `storage`, exit code 6.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {shown(path)}; rename it")
    spec = {**spec, "format": FORMAT}
    if missing := sorted(set(_REQUIRED) - set(spec)):
        raise ValueError(f"spec must hold {sorted(_REQUIRED)}, {missing} not given")
    data = safetensors.numpy.save(_flatten(params))
    spec["sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(spec, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with nifti.atomic_path(path) as temp:
        temp.write_bytes(data)
    with nifti.atomic_path(path.with_suffix(".json")) as temp:
        temp.write_text(text, encoding="utf-8")


def copy_weights(
    path: str | os.PathLike, copy: str | os.PathLike, *, sha256: str
) -> None:
    """Copies parameters and their description, each whole or not at all.

    Args:
        path: `.safetensors` file, its description beside it as `.json`.
        copy: name of the copy, which also ends so; it may be the file itself.
        sha256: digest of the tensors' file when it was loaded.

    Raises:
        UserError: `checkpoint_changed`, exit code 9: the files are others by now, and
            nothing was written; `storage`, 6.
    """
    path, copy = Path(path), Path(copy)
    data, card = _read(path), _read(path.with_suffix(".json"))
    digest = hashlib.sha256(data).hexdigest()
    described = _parse(card, path.with_suffix(".json"))["sha256"]
    if not digest == described == sha256:
        raise _fault(
            "changed",
            f"{shown(path)}: SHA-256 {sha256[:16]}... expected, as when it was loaded, "
            f"got {digest[:16]}..., {described[:16]}... in its description; try again",
        )
    for file, content in ((copy, data), (copy.with_suffix(".json"), card)):
        with nifti.atomic_path(file) as temp:
            temp.write_bytes(content)


def check_tensors(
    params: Mapping[str, Any],
    expected: Mapping[str, Any],
    path: str | os.PathLike,
    *,
    network: str = "the architecture in its description",
    remedy: str = "use the two files of one training run",
) -> None:
    """Refuses parameters that do not fit the network.

    Args:
        params: nested dict of arrays, as loaded.
        expected: the same tree of the network, leaves with a `shape`.
        path: for the message.
        network: for the message, what `expected` is.
        remedy: for the message.

    Raises:
        UserError: `checkpoint_other`, exit code 9, with both values.
    """
    got = {name: tuple(leaf.shape) for name, leaf in _leaves(params)}
    want = {name: tuple(leaf.shape) for name, leaf in _leaves(expected)}
    if wrong := shape_faults(want, got):
        raise _fault(
            "other",
            f"{shown(path)}: the tensors do not fit {network}: {wrong}; {remedy}",
        )


def shape_faults(
    want: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]
) -> str:
    """Says in which tensors two sets differ.

    Args:
        want: name -> shape, of the network.
        got: name -> shape, as stored.

    Returns:
        The first three differences and how many more there are; "" when none.
    """
    wrong = [
        f"{shown(name)}: {want.get(name, 'nothing')} expected, "
        f"got {got.get(name, 'nothing')}"
        for name in sorted({*want, *got})
        if want.get(name) != got.get(name)
    ]
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return "; ".join(wrong[:3]) + more


def _fault(kind: str, message: str) -> UserError:
    return UserError(f"checkpoint_{kind}", message, CHECKPOINT)


def _existing(path: Path, source: str, remedy: str = _REMEDY) -> Path:
    """The path, if it is a file with the right name."""
    # A name too long or with NUL is no file either.
    try:
        found = path.is_file()
    except (OSError, ValueError):
        found = False
    if not found or path.suffix != ".safetensors":
        got = f"{shown(path.name)} is none" if found else "no such file"
        raise _fault(
            "missing",
            f"{source} {shown(path)}: a .safetensors file expected, {got}; {remedy}",
        )
    return path


def _read(path: Path) -> bytes:
    """A whole file of believable size."""
    limit = _LARGEST[path.suffix]
    try:
        size = path.stat().st_size
        if not 0 < size <= limit:
            raise _fault(
                "torn",
                f"{shown(path)}: 1 to {limit} bytes expected, got {size}; download or "
                "copy it again",
            )
        return path.read_bytes()
    except PermissionError as error:
        raise _fault(
            "missing",
            f"{shown(path)}: read access expected, got none; ask its owner",
        ) from error
    except OSError as error:
        raise UserError(
            "storage",
            f"{shown(path)}: cannot be read: {error.strerror}; check the disk",
            STORAGE,
        ) from error


def _parse(data: bytes, card: Path) -> dict[str, Any]:
    """The description, every field of the right kind."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON number")

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        spec = json.loads(data, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _fault(
            "torn",
            f"{shown(card)}: a JSON description of weights expected, got "
            f"{_one_line(error)}; download or copy it again",
        ) from error
    if not isinstance(spec, dict):
        raise _fault(
            "torn", f"{shown(card)}: a JSON object expected, got {type(spec).__name__}"
        )
    # Before anything else: a newer format may name and mean everything differently.
    if isinstance(number := spec.get("format"), int) and number > FORMAT:
        raise _fault(
            "format",
            f"{shown(card)}: format {FORMAT} or older expected, got {number}; update "
            "the package",
        )
    for name, kind in {**_REQUIRED, "sha256": str}.items():
        if not isinstance(spec.get(name), kind) or isinstance(spec[name], bool):
            raise _fault(
                "torn",
                f"{shown(card)}: {name} of type {kind.__name__} expected, got "
                f"{shown(repr(spec.get(name))[:40])}; copy both files again",
            )
    if "embedding" in spec and not _names_a_file(spec["embedding"]):
        raise _fault(
            "torn",
            f"{shown(card)}: embedding with the texts name and sha256 expected, got "
            f"{shown(repr(spec['embedding'])[:40])}; copy both files again",
        )
    try:
        PreprocessSpec.from_json(spec["preprocess"])
    except (ValueError, TypeError) as error:
        raise _fault("format", f"{shown(card)}: {_one_line(error)}") from error
    return spec


def _names_a_file(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("name", "sha256")
    )


def _one_line(error: Exception) -> str:
    """The message of an exception, without line breaks and of bounded length."""
    return " ".join(str(error).split())[:200]


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of a nested dict with their joined names."""
    if not isinstance(tree, Mapping):
        return [(prefix, tree)]
    return [
        leaf
        for name, branch in tree.items()
        for leaf in _leaves(branch, f"{prefix}/{name}" if prefix else name)
    ]


def _flatten(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    # Not ascontiguousarray, which gives a scalar an axis.
    return {name: np.asarray(leaf, order="C") for name, leaf in _leaves(params)}


def _nest(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Inverse of `_flatten`."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *folders, last = name.split("/")
        branch: Any = tree
        for folder in folders:
            branch = branch.setdefault(folder, {}) if isinstance(branch, dict) else None
        if not isinstance(branch, dict) or last in branch:
            raise _fault("torn", f"tensor {shown(name)} lies inside another one")
        branch[last] = tensor
    return tree


def check_target(path: Path, suffix: str, *, overwrite: bool) -> None:
    """Refuses to write a file and the .json beside it, before any work.

    The description of weights is never replaced by that of another file.

    Args:
        path: the file.
        suffix: that its name shall have.
        overwrite: whether both may be there.

    Raises:
        UserError: `name_mismatch` or `id_duplicate`, exit code 2; `storage`, 6.
    """
    if path.suffix != suffix or len(path.name) == len(suffix):
        raise UserError(
            "name_mismatch",
            f"{shown(path)}: a name that ends in {suffix} expected, got "
            f"{shown(path.name)}; rename it",
            USAGE,
        )
    weights = path.with_suffix(".safetensors")
    if weights != path and os.path.lexists(weights):
        raise UserError(
            "id_duplicate",
            f"{shown(path)}: its .json is the description of {shown(weights.name)} "
            "beside it; choose another name",
            USAGE,
        )
    if not os.path.isdir(path.parent):
        raise UserError(
            "storage",
            f"{shown(path.parent)}: a folder expected, none found; make it first",
            STORAGE,
        )
    for file in (path, path.with_suffix(".json")):
        if os.path.lexists(file) and not (overwrite and os.path.isfile(file)):
            raise UserError(
                "id_duplicate",
                f"{shown(file)} exists; pass --overwrite to replace it, or another "
                "name",
                USAGE,
            )
