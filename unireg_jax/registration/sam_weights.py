"""Public SAM checkpoints -> our weights: names, axes, description.

PyTorch keeps kernels as [out, in, D, H, W] with D, H, W = our Z, Y, X (the network was
trained on LPS+ volumes whose first axis goes up); ours are [X, Y, Z, in, out].
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unireg_jax.errors import CHECKPOINT, UserError
from unireg_jax.imaging.nifti import shown
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.registration import torch_file, weights

UNKNOWN_LICENCE = "unknown: see where the checkpoint was published"
# HU window and grid that the public networks were trained on.
PREPROCESS = PreprocessSpec(hu_low=-1024.0, hu_high=3071.0, air_hu=-1024)
_FIRST = "backbone.conv1.conv.weight"
_WIDTHS = {"stem": 64, "stages": (64, 128, 256, 512), "channels": 128}
_NORM = {
    "weight": "scale",
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
}


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    licence: str = UNKNOWN_LICENCE,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a public SAM, SAMv2 or SAME checkpoint as our weights.

    The semantic head of SAMv2, the registration network of SAME and the optimiser's
    state are left out. Nothing in `source` is run, see `torch_file`.

    Args:
        source: `.pth` file.
        target: name that ends in `.safetensors`; the description goes beside it.
        licence: of the checkpoint, for the description.
        overwrite: replace files of these names.

    Returns:
        The description, as `weights.load_weights` gives it.

    Raises:
        UserError: a name that does not fit or is taken (exit code 2); a checkpoint that
            is none, not whole or of another network (9); the disk (6).
    """
    source, target = Path(source), Path(target)
    weights.check_target(target, ".safetensors", overwrite=overwrite)
    tensors = torch_file.read_tensors(source)
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    variables, architecture, layout = from_torch(tensors, source)
    spec = {
        "kind": "sam",
        "architecture": architecture,
        "features": "sam",
        "preprocess": PREPROCESS.to_json(),
        "source": {"name": source.name, "sha256": digest, "layout": layout},
        "licence": licence,
    }
    if any("semantic_head." in name for name in tensors):
        spec["left_out"] = "semantic_head"
    weights.save_weights(target, variables, spec)
    return weights.load_weights(target)[1]


def from_torch(
    tensors: Mapping[str, np.ndarray], path: str | os.PathLike
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Maps names and axes.

    Args:
        tensors: as `torch_file.read_tensors` gives them.
        path: for messages.

    Returns:
        variables, {"params", "batch_stats"} of models/features/sam.py, float32;
        architecture, its widths and last stride; layout, "SAM", "SAMv2" or "SAME".

    Raises:
        UserError: `checkpoint_other`: not this network, or not all of it;
            `checkpoint_nonfinite`: numbers that float32 cannot hold.
    """
    net, layout = _network(tensors, path)
    architecture = _architecture(net)
    want = _shapes(architecture)
    got = {name: tuple(tensor.shape) for name, tensor in net.items()}
    if wrong := weights.shape_faults(want, got):
        raise _fault(
            "other",
            f"{shown(path)}: the tensors of a SAM network expected: {wrong}; pass "
            "SAM.pth, SAMv2_iter_20000.pth or a SAME checkpoint",
        )
    variables: dict[str, Any] = {}
    for name, place in _places().items():
        *folders, last = place
        branch = variables
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[last] = _leaf(net[name], name, path)
    return variables, architecture, layout


def _fault(kind: str, message: str) -> UserError:
    return UserError(f"checkpoint_{kind}", message, CHECKPOINT)


def _network(
    tensors: Mapping[str, np.ndarray], path: str | os.PathLike
) -> tuple[dict[str, np.ndarray], str]:
    """The embedding network's tensors, and the layout they were found in.

    It lies under `state_dict.` in mmcv's files, further down under `embed.` in SAME's;
    a parallel wrapper adds `module.` anywhere.
    """
    starts = [
        name.removesuffix(_FIRST)
        for name in tensors
        if f".{name}".endswith(f".{_FIRST}")
    ]
    if len(starts) != 1:
        names = ", ".join(shown(name)[:80] for name in sorted(tensors)[:3])
        raise _fault(
            "other",
            f"{shown(path)}: one tensor {_FIRST} of a SAM network expected, got "
            f"{len(starts)} among {len(tensors)} tensors ({names or 'none'}); pass "
            "SAM.pth, SAMv2_iter_20000.pth or a SAME checkpoint",
        )
    start = starts[0]
    net = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    semantic = [name for name in net if name.startswith("semantic_head.")]
    for name in (*semantic, *(n for n in net if n.endswith(".num_batches_tracked"))):
        del net[name]
    if "embed" in start.split("."):
        return net, "SAME"
    return net, "SAMv2" if semantic else "SAM"


def _architecture(net: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Widths, read from the tensors; the public ones where they are absent."""

    def width(unit, default):
        # A convolution's own number, else that of what belongs to it.
        names = [f"{unit}.{n}" for n in ("conv.weight", "conv.bias", "bn.weight")]
        sizes = [net[n].shape[0] for n in names if n in net and net[n].ndim]
        return sizes[0] if sizes else default

    stages = [
        width(f"backbone.layer{k + 1}.0.conv1", n)
        for k, n in enumerate(_WIDTHS["stages"])
    ]
    return {
        "stem": width("backbone.conv1", _WIDTHS["stem"]),
        "stages": stages,
        "channels": width("neck.lateral_convs.0", _WIDTHS["channels"]),
        "last_stride": [2, 2, 2],
    }


def _units() -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Convolutions with normalisation: PyTorch's name, ours, ours of the norm."""
    units = [("backbone.conv1", ("stem",), ("stem_norm",))]
    for k in range(1, 5):
        for b in range(2):
            names = [("conv1", "norm1"), ("conv2", "norm2")]
            names += [("downsample", "downsample_norm")] if b == 0 else []
            units += [
                (
                    f"backbone.layer{k}.{b}.{c}",
                    (f"layer{k}_{b}", c),
                    (f"layer{k}_{b}", n),
                )
                for c, n in names
            ]
    return units


def _heads() -> list[tuple[str, tuple[str, str]]]:
    """Convolutions with bias: PyTorch's name, ours."""
    fine = [(f"neck.lateral_convs.{i}", ("fine", f"lateral_{i}")) for i in range(3)]
    return [
        *fine,
        ("neck.fpn_convs.0", ("fine", "output")),
        ("read_out_head.lateral_convs.0", ("coarse", "lateral_0")),
        ("read_out_head.fpn_convs.0", ("coarse", "output")),
    ]


def _places() -> dict[str, tuple[str, ...]]:
    """PyTorch's name -> path in our tree."""
    places: dict[str, tuple[str, ...]] = {}
    for name, conv, norm in _units():
        places[f"{name}.conv.weight"] = ("params", *conv, "kernel")
        for theirs, ours in _NORM.items():
            room = "batch_stats" if theirs.startswith("running") else "params"
            places[f"{name}.bn.{theirs}"] = (room, *norm, ours)
    for name, conv in _heads():
        places[f"{name}.conv.weight"] = ("params", *conv, "kernel")
        places[f"{name}.conv.bias"] = ("params", *conv, "bias")
    return places


def _shapes(architecture: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """PyTorch's name -> shape, of a network of these widths."""
    stem, stages = architecture["stem"], architecture["stages"]
    channels = architecture["channels"]
    kernels = {"backbone.conv1": (stem, 1, 3, 7, 7)}
    for k, (before, width) in enumerate(zip((stem, *stages), stages, strict=False)):
        size = (1, 3, 3) if k < 2 else (3, 3, 3)
        for b in range(2):
            name = f"backbone.layer{k + 1}.{b}"
            kernels[f"{name}.conv1"] = (width, width if b else before, *size)
            kernels[f"{name}.conv2"] = (width, width, *size)
        kernels[f"backbone.layer{k + 1}.0.downsample"] = (width, before, 1, 1, 1)
    shapes = {
        f"{name}.bn.{n}": kernels[name][:1] for name, *_ in _units() for n in _NORM
    }
    for i, width in enumerate(stages[:3]):
        kernels[f"neck.lateral_convs.{i}"] = (channels, width, 1, 1, 1)
    kernels["read_out_head.lateral_convs.0"] = (channels, stages[3], 1, 1, 1)
    for head in ("neck", "read_out_head"):
        kernels[f"{head}.fpn_convs.0"] = (channels, channels, 3, 3, 3)
    shapes |= {f"{name}.conv.bias": (channels,) for name, _ in _heads()}
    return shapes | {f"{name}.conv.weight": shape for name, shape in kernels.items()}


def _leaf(tensor: np.ndarray, name: str, path: str | os.PathLike) -> np.ndarray:
    """A tensor in our axes, contiguous float32."""
    if tensor.dtype.kind != "f":
        raise _fault(
            "other",
            f"{shown(path)}: real numbers expected in {name}, got {tensor.dtype}; pass "
            "the checkpoint as published",
        )
    with np.errstate(over="ignore"):
        leaf = tensor.astype(np.float32)
    if not np.isfinite(leaf).all() or (name.endswith("_var") and (leaf < 0).any()):
        raise _fault(
            "nonfinite",
            f"{shown(path)}: finite float32 and no negative variance expected, got "
            f"other numbers in {name}; use another checkpoint",
        )
    leaf = leaf.transpose(4, 3, 2, 1, 0) if leaf.ndim == 5 else leaf
    return np.ascontiguousarray(leaf)
