"""Times every operator against the same operation in other libraries.

    python -m experiments.benchmark_ops [--shape=96,96,80] [--repeats=5]
        [--only=warp,ncc,...]

Per op, ours and the peers run in turn in one process, after one warm-up round, and the
medians of CPU and wall time are compared; on a GPU read the wall times alone. Then what
the compiler says of ours: compile seconds (no persistent cache), scratch, FLOPs and
bytes, and the share of the machine's limits measured in the same run, a float32 matrix
product and a large copy. A peer that is not installed, or needs more memory than is
free, is named and left out.

    pip install -e .[bench,parity]

installs them all (voxelmorph brings neurite, whose NCC and gradient penalty it uses).
"""

import functools
import os
import platform
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from scipy import ndimage

from experiments import benchmark_peers as peers
from experiments import cli, timing
from unireg_jax.errors import USAGE, UserError
from unireg_jax.models import layers
from unireg_jax.models.conditioning import dynamic
from unireg_jax.ops import (
    conv,
    correlation,
    dice,
    jacobian,
    mind,
    ncc,
    resample,
    smoothness,
    warp,
)

_NUM_LABELS = 46  # 45 structures and background


class Op(NamedTuple):
    """One row of the table."""

    function: Callable  # ours
    inputs: Callable  # (shape, rng) -> its arguments, NumPy arrays, without `static`
    peers: dict[str, Callable]  # name -> what prepares it (experiments/benchmark_peers)
    static: tuple = ()  # last arguments that are no arrays


def _image(shape, rng):
    """Smooth structure with noise, [1, X, Y, Z, 1] float32."""
    image = _smooth(shape, rng, 1) + 0.1 * rng.normal(size=(1, *shape, 1))
    return image.astype(np.float32)


def _disp(shape, rng):
    """Smooth field of some voxels, [1, X, Y, Z, 3] float32."""
    return 3.0 * _smooth(shape, rng, 3)


def _labels(shape, rng):
    """Balls of 45 labels over a third of the volume, [1, X, Y, Z] uint8."""
    labels = np.zeros(shape, np.uint8)
    for label in range(1, _NUM_LABELS):
        radius = 0.12 * np.asarray(shape)
        centre = rng.uniform(radius, np.asarray(shape) - radius)
        low = np.floor(centre - radius).astype(int)
        high = np.ceil(centre + radius).astype(int) + 1
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        part = labels[box]
        index = np.moveaxis(np.indices(part.shape), 0, -1) + low
        part[(((index - centre) / radius) ** 2).sum(-1) <= 1.0] = label
    return labels[None]


def _maps(channels, divisor=1):
    """Inputs: one feature map."""
    return lambda shape, rng: (_noise([n // divisor for n in shape], rng, channels),)


def _smooth(shape, rng, channels):
    coarse = rng.normal(size=(6, 5, 4, channels))
    zoom = [n / c for n, c in zip((*shape, channels), coarse.shape, strict=True)]
    return ndimage.zoom(coarse, zoom, order=1).astype(np.float32)[None]


def _noise(shape, rng, channels):
    return rng.standard_normal((1, *shape, channels), np.float32)


def _warp_inputs(shape, rng):
    return _image(shape, rng), _disp(shape, rng)


def _warp_gradient_inputs(shape, rng):
    return *_warp_inputs(shape, rng), _image(shape, rng)


def _pair(shape, rng):
    return _image(shape, rng), _image(shape, rng)


def _field(shape, rng):
    return (_disp(shape, rng),)


def _half_field(shape, rng):
    return (_disp([n // 2 for n in shape], rng),)


def _features(shape, rng):
    half = [n // 2 for n in shape]
    return _noise(half, rng, 128), _noise(half, rng, 128)


def _head_inputs(shape, rng):
    omega = 0.3 * rng.standard_normal((1, dynamic.NUM_GENERATED), np.float32)
    return _noise(shape, rng, 8), omega


def _pool_gradient_inputs(shape, rng):
    return _noise(shape, rng, 32), _noise([n // 2 for n in shape], rng, 32)


def _dice_inputs(shape, rng):
    return _labels(shape, rng), _labels(shape, rng), _disp(shape, rng)


class Layer(NamedTuple):
    """A convolution block of the paper's network, models/backbone.py.

    Attributes:
        level: of its grid; 0 is the full one, 1 half of it.
        parts: channels of each input.
        coarse: channels of the up-sampled input, 0 for none.
        features: channels out.
    """

    level: int
    parts: tuple[int, ...]
    coarse: int
    features: int


# The others together are a twentieth of the arithmetic.
LAYERS = {
    "encoder_0": Layer(0, (1, 1), 0, 16),
    "encoder_1": Layer(1, (16, 27), 0, 32),
    "decoder_3": Layer(1, (32,), 32, 32),
    "remaining_0": Layer(0, (16,), 32, 32),
    "remaining_1": Layer(0, (32,), 0, 16),
    "remaining_2": Layer(0, (16,), 0, 16),
    "pre_head": Layer(0, (16,), 0, 8),
}


def _layer_inputs(layer):
    """Kernel, bias, the parts, and the coarse map last."""

    def make(shape, rng):
        grid = [n >> layer.level for n in shape]
        channels = sum(layer.parts) + layer.coarse
        kernel = rng.standard_normal((3, 3, 3, channels, layer.features), np.float32)
        bias = rng.standard_normal(layer.features, np.float32)
        maps = [_noise(grid, rng, c) for c in layer.parts]
        if layer.coarse:
            maps.append(_noise([n // 2 for n in grid], rng, layer.coarse))
        return 0.03 * kernel, bias, *maps

    return make


def _layer_gradient_inputs(layer):
    def make(shape, rng):
        grid = [n >> layer.level for n in shape]
        cotangent = _noise(grid, rng, layer.features)
        return cotangent, *_layer_inputs(layer)(shape, rng)

    return make


def _warp_gradient(volume, disp, cotangent):
    warped, pull = jax.vjp(lambda d: warp.warp(volume, d), disp)
    return warped, *pull(cotangent)


def _ncc_gradient(fixed, moving):
    return jax.value_and_grad(lambda m: ncc.local_ncc(fixed, m).mean())(moving)


def _jacobian_metrics(disp):
    return jacobian.folding_fraction(disp), jacobian.sdlogj(disp)


def _pool_gradient(x, cotangent):
    pooled, pull = jax.vjp(layers.max_pool, x)
    return pooled, *pull(cotangent)


def _upsample(x):
    """Nearest up-sampling by two, as a copy."""
    b, nx, ny, nz, c = x.shape
    wide = (b, nx, 2, ny, 2, nz, 2, c)
    wide = jnp.broadcast_to(x[:, :, None, :, None, :, None], wide)
    return wide.reshape(b, 2 * nx, 2 * ny, 2 * nz, c)


def _resize(disp):
    return resample.resize_disp(disp, tuple(2 * n for n in disp.shape[1:4]))


def _dice_gradient(fixed_labels, moving_labels, disp, num_labels, counting="scatter"):
    def loss(disp):
        values, _ = dice.soft_dice(
            fixed_labels,
            moving_labels,
            disp,
            num_labels=num_labels,
            counting=counting,
        )
        return values.mean()

    return jax.value_and_grad(loss)(disp)


def _diffusion_gradient(disp):
    return jax.grad(lambda d: smoothness.diffusion(d).mean())(disp)


def _convolve(kernel, bias, *maps, upsampled):
    parts, coarse = (maps[:-1], maps[-1]) if upsampled else (maps, None)
    return conv.conv3d(parts, kernel, bias, coarse=coarse, slope=0.2)


def _convolve_gradient(cotangent, *inputs, upsampled):
    function = functools.partial(_convolve, upsampled=upsampled)
    out, pull = jax.vjp(function, *inputs)
    return out, *pull(cotangent)


def _layer_ops(name, layer):
    def bound(function):
        return functools.partial(function, upsampled=layer.coarse > 0)

    return {
        name: Op(
            bound(_convolve),
            _layer_inputs(layer),
            {"torch conv3d": bound(peers.torch_layer)},
        ),
        f"{name}_grad": Op(
            bound(_convolve_gradient),
            _layer_gradient_inputs(layer),
            {"torch conv3d": bound(peers.torch_layer_gradient)},
        ),
    }


OPS = {
    "warp": Op(
        warp.warp,
        _warp_inputs,
        {
            "torch grid_sample": peers.torch_warp,
            "MONAI": peers.monai_warp,
            "voxelmorph": peers.voxelmorph_warp,
            "SimpleITK": peers.sitk_warp,
            "SciPy": peers.scipy_warp,
        },
    ),
    "warp_grad": Op(
        _warp_gradient,
        _warp_gradient_inputs,
        {
            "torch grid_sample": peers.torch_warp_gradient,
            "MONAI": peers.monai_warp_gradient,
            "voxelmorph": peers.voxelmorph_warp_gradient,
        },
    ),
    "ncc": Op(
        lambda fixed, moving: ncc.local_ncc(fixed, moving),
        _pair,
        {
            "torch avg_pool3d": peers.torch_ncc_pool,
            "torch conv3d": peers.torch_ncc_conv,
            "MONAI": peers.monai_ncc,
            "voxelmorph": peers.voxelmorph_ncc,
        },
    ),
    "ncc_grad": Op(
        _ncc_gradient,
        _pair,
        {
            "torch avg_pool3d": peers.torch_ncc_pool_gradient,
            "torch conv3d": peers.torch_ncc_conv_gradient,
            "MONAI": peers.monai_ncc_gradient,
            "voxelmorph": peers.voxelmorph_ncc_gradient,
        },
    ),
    "jacobian": Op(
        _jacobian_metrics,
        _field,
        {
            "SimpleITK + NumPy": peers.sitk_jacobian,
            "NumPy": peers.numpy_jacobian,
            "torch slices": peers.torch_jacobian,
        },
    ),
    "correlation": Op(
        correlation.correlation,
        _features,
        {"torch products": peers.torch_correlation},
    ),
    "head": Op(
        lambda features, omega: jax.vmap(dynamic.apply_head)(features, omega),
        _head_inputs,
        {"torch conv3d": peers.torch_head},
    ),
    "pool": Op(layers.max_pool, _maps(32), {"torch max_pool3d": peers.torch_pool}),
    "pool_grad": Op(
        _pool_gradient,
        _pool_gradient_inputs,
        {"torch max_pool3d": peers.torch_pool_gradient},
    ),
    "upsample": Op(
        _upsample,
        _maps(32, divisor=2),
        {"torch interpolate": peers.torch_upsample},
    ),
    "resample": Op(
        _resize,
        _half_field,
        {"torch interpolate": peers.torch_resize, "SciPy": peers.scipy_resize},
    ),
    "mind": Op(
        lambda volume: mind.mind_ssc(volume),
        lambda shape, rng: (_image(shape, rng),),
        {"torch slices": peers.torch_mind},
    ),
    "dice_grad": Op(
        _dice_gradient,
        _dice_inputs,
        {
            "JAX one-hot": peers.jax_onehot_dice,
            "torch one-hot": peers.torch_onehot_dice,
        },
        static=(_NUM_LABELS,),
    ),
    # Without the one scatter of the training step; for devices that make it serial.
    "dice_grad_compare": Op(
        _dice_gradient, _dice_inputs, {}, static=(_NUM_LABELS, "compare")
    ),
    "diffusion_grad": Op(
        _diffusion_gradient,
        _field,
        {
            "torch diff": peers.torch_diffusion_gradient,
            "voxelmorph": peers.voxelmorph_diffusion_gradient,
        },
    ),
}
for _name, _layer in LAYERS.items():
    OPS |= _layer_ops(_name, _layer)


class Row(NamedTuple):
    """An op measured."""

    program: timing.Program
    ours: timing.Timing
    peers: dict[str, timing.Timing]


def run_op(name: str, shape: tuple[int, int, int], repeats: int) -> Row:
    """Measures one op and its peers, and names the peers left out."""
    op = OPS[name]
    inputs = op.inputs(shape, np.random.default_rng(0))
    program = timing.compile_program(
        lambda *args: op.function(*args, *op.static), *map(jnp.asarray, inputs)
    )
    candidates = {"ours": program.run}
    for peer, prepare in op.peers.items():
        try:
            candidates[peer] = prepare(*inputs, *op.static)
        except (ImportError, MemoryError) as error:
            print(f"{name}: {peer} left out, {error}", flush=True)
    times = timing.measure(candidates, repeats)
    return Row(program, times.pop("ours"), times)


def print_comparison(rows: dict[str, Row]) -> None:
    """Ours against the fastest peer, by CPU time and by wall time."""
    print(
        "\n| op | ours, CPU / wall ms | fastest peer | CPU / wall ms | CPU × | wall × |"
    )
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        if not row.peers:
            print(f"| {name} | {_both(row.ours)} | none | | | |")
            continue
        best = min(row.peers, key=lambda peer: row.peers[peer].cpu_ms)
        cpu = row.peers[best].cpu_ms / row.ours.cpu_ms
        # The peer with the least wall time may be another one.
        wall = min(t.wall_ms for t in row.peers.values()) / row.ours.wall_ms
        print(
            f"| {name} | {_both(row.ours)} | {best} | {_both(row.peers[best])} "
            f"| {cpu:.1f} | {wall:.1f} |"
        )


def print_peers(rows: dict[str, Row]) -> None:
    """Every peer's times."""
    print("\n| op | peers, CPU / wall ms |\n|---|---|")
    for name, row in rows.items():
        times = (f"{peer} {_both(t)}" for peer, t in row.peers.items())
        print(f"| {name} | {'; '.join(times)} |")


def print_programs(rows: dict[str, Row], limits: dict[str, float]) -> None:
    """What the compiler says of ours, and how near the machine's limits it runs."""
    print(
        "\n| op | compile s | scratch MiB | GFLOP | GB | of the product's FLOP/s "
        "| of the copy's B/s | inputs and result alone, of the copy's B/s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        program, seconds = row.program, 1e-3 * row.ours.wall_ms
        # The compiler counts the body of a loop once.
        least = "≥ " if program.loops else ""
        flops = program.flops / seconds / limits["matmul_flops"]
        moved, needed = (
            n / seconds / limits["copy_bytes"]
            for n in (program.bytes, program.least_bytes)
        )
        print(
            f"| {name} | {program.compile_s:.1f} | {program.scratch_mib:.1f} "
            f"| {least}{program.flops / 1e9:.2f} | {least}{program.bytes / 1e9:.2f} "
            f"| {least}{flops:.0%} | {least}{moved:.0%} | {needed:.0%} |"
        )


def _both(times: timing.Timing) -> str:
    return f"{times.cpu_ms:.3g} / {times.wall_ms:.3g}"


def _describe_machine() -> str:
    device = jax.devices()[0]
    versions = []
    for package in ("jax", "torch", "monai", "voxelmorph", "neurite", "SimpleITK"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return (
        f"{device.platform} {device.device_kind}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {', '.join(versions)}"
    )


def main(argv) -> None:
    del argv
    cli.keep_freed_memory()
    shape = tuple(int(n) for n in flags.FLAGS.shape)
    names = flags.FLAGS.only or list(OPS)
    if unknown := sorted(set(names) - set(OPS)):
        raise UserError(
            "schema", f"--only takes {', '.join(OPS)}; got {unknown}", USAGE
        )
    jax.config.update("jax_enable_compilation_cache", False)
    print(f"{shape}, {flags.FLAGS.repeats} repeats, {_describe_machine()}", flush=True)
    limits = timing.machine_limits(flags.FLAGS.repeats)
    print(
        f"limits: float32 product {limits['matmul_flops'] / 1e9:.0f} GFLOP/s, "
        f"copy {limits['copy_bytes'] / 1e9:.1f} GB/s (read and written)",
        flush=True,
    )
    rows = {}
    for name in names:
        rows[name] = run_op(name, shape, flags.FLAGS.repeats)
        print(f"{name}: {_both(rows[name].ours)} ms", flush=True)
    print_comparison(rows)
    print_peers(rows)
    print_programs(rows, limits)


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_list("shape", ["96", "96", "80"], "X,Y,Z, multiples of 16.")
    flags.DEFINE_integer("repeats", 5, "Counted rounds.")
    flags.DEFINE_list("only", [], "Ops to time, by default all.")
    cli.run(main)
