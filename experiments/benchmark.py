"""Times the network and the training step on this machine, and states their memory.

    python -m experiments.benchmark [--shape=96,96,80] [--repeats=5] [--memory]
        [--dtype=float32] [--precision=default]

Forward of the full network with the correlation given, features and correlation of a
pair, the training step of preset `paper` (MIND features, NCC, diffusion, SGD; without
and with Dice on 13 labels) as `experiments.train` compiles it. With PyTorch installed,
a twin of the same layers and losses (experiments/torch_twin.py; no features) runs in
turn with them in one process. Medians after one warm-up round. `share` is what the
network's 3x3x3 convolutions would take at the speed of a large matrix product, over
what they took; above 1, the formulation needs fewer operations than the definition.

--dtype is that of the convolutions, config.model.dtype in training. --precision is
JAX's default_matmul_precision: on recent GPUs `default` rounds float32 products to
TF32, `highest` does not; JAX_DEFAULT_MATMUL_PRECISION sets it for any other command.

--memory only compiles: scratch of forward and training step, float32 and bfloat16.
"""

import functools
import math
import os
import platform
import resource
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import build, cli, timing, unireg
from unireg_jax.models import features
from unireg_jax.models.features import Extractor
from unireg_jax.models.unireg import UniReg
from unireg_jax.tasks import PairBatch
from unireg_jax.training import mesh as train_mesh
from unireg_jax.training import objective, optimizer
from unireg_jax.training import state as train_state
from unireg_jax.training import step as train_step

_LABELS = 14  # 13 structures and background
_MACS_PER_VOXEL = 470.1e9 / (192 * 192 * 160)  # tests/models/test_unireg.py


def make_batch(shape: tuple[int, int, int]) -> PairBatch:
    """One pair of smooth random volumes with labels in blocks."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(2, 1, *(n // 8 for n in shape), 1))
    hu = np.asarray(jax.image.resize(coarse, (2, 1, *shape, 1), "linear"))
    hu = (300 * hu).astype(np.int16)
    blocks = rng.integers(0, _LABELS, size=tuple(n // 16 for n in shape))
    labels = np.kron(blocks, np.ones((16, 16, 16))).astype(np.uint8)[None]
    return PairBatch(
        fixed=hu[0],
        moving=hu[1],
        fixed_labels=labels,
        moving_labels=np.roll(labels, 3, axis=1),
        fixed_more=labels[:, None][:, :0],
        moving_more=labels[:, None][:, :0],
        align=np.eye(4, dtype=np.float32)[None],
        region=np.zeros(1, np.int32),
        pair_type=np.zeros(1, np.int32),
        pair=np.zeros(1, np.int32),
    )


def training_step(
    dtype: str,
    dice: float,
    *,
    remat: str = "none",
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Callable, Callable]:
    """The step of preset `paper` and what makes its first state; mesh: all devices."""
    config = unireg.get_config()
    model = UniReg(dtype=dtype, remat=remat, conv_impl=build.conv_impl())
    weights = objective.Weights(
        num_labels=_LABELS, **{**config.loss.to_dict(), "dice": dice}
    )
    loss = objective.make_loss(functools.partial(build.apply, model), weights=weights)
    tx = optimizer.make_optimizer(**config.optim.to_dict())
    step = train_step.make_train_step(loss, tx, mesh=mesh or train_mesh.make_mesh())
    return step, lambda: train_state.make_state(model, tx, seed=0)


def compile_step(dtype: str, dice: float, batch: PairBatch) -> timing.Program:
    """The step, as a program that goes on from its own result."""
    step, make_state = training_step(dtype, dice)
    mesh = train_mesh.make_mesh()
    batch = jax.device_put(batch, train_mesh.pair_sharding(mesh))
    held = [jax.device_put(make_state(), train_mesh.replicated(mesh))]
    start = time.perf_counter()
    extractor = Extractor("mind")
    program = step.lower(held[0], batch, extractor).compile()
    seconds = time.perf_counter() - start

    def run():
        state, scalars = program(held.pop(), batch, extractor)
        held.append(jax.block_until_ready(state))
        return jax.block_until_ready(scalars)

    return timing.describe(program, run, seconds)


def candidates(shape: tuple[int, int, int], dtype: str) -> dict[str, Callable]:
    """Everything that is timed, compiled; prints what the compiler says of ours.

    And the peak of memory on the host once each has run, before the twin is there.
    """
    batch = make_batch(shape)
    pair = jax.jit(lambda b: objective.prepare(b, Extractor("mind")))(batch)
    model = UniReg(dtype=dtype)
    params = train_state.init_params(model, jax.random.key(0))
    runs = {}

    def add(name, program):
        runs[name] = program.run
        program.run()
        least = "at least " * program.loops  # the body of a loop is counted once
        print(
            f"{name}: compiled in {program.compile_s:.1f} s, scratch "
            f"{program.scratch_mib:.0f} MiB, {least}{program.flops / 1e9:.0f} GFLOP "
            f"and {program.bytes / 1e9:.1f} GB, host peak {_host_peak():.1f} GiB",
            flush=True,
        )

    args = (pair.fixed, pair.moving, pair.corr, pair.region, pair.pair_type)
    program = timing.compile_program(
        functools.partial(build.apply, model), params, *args
    )
    add("forward", program)
    program = timing.compile_program(_match, batch.fixed, batch.moving)
    add("features and correlation", program)
    for name, dice in (("step", 0.0), ("step with Dice", 1.0)):
        add(name, compile_step(dtype, dice, batch))
    if jax.default_backend() != "cpu":
        print("the PyTorch twin runs on a CPU alone: left out")
        return runs
    try:
        from experiments import torch_twin
    except ImportError:
        print("PyTorch is not installed: no twin")
        return runs
    twin = torch_twin.prepare(
        np.asarray(pair.fixed[0, ..., 0]),
        np.asarray(pair.moving[0, ..., 0]),
        np.asarray(pair.corr[0]),
        np.asarray(batch.fixed_labels[0]),
    )
    return runs | {f"PyTorch twin, {k}": run for k, run in twin.items()}


def _host_peak() -> float:
    """Of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _match(fixed, moving):
    maps = (features.describe(hu, Extractor("mind")) for hu in (fixed, moving))
    return features.correlate(*maps)


def report(times: dict[str, timing.Timing], shape: tuple[int, int, int]) -> str:
    """Markdown: CPU and wall seconds, ratio to the twin, share of the matrix peak."""
    peak = timing.machine_limits(3)["matmul_flops"]
    least = 2e3 * _MACS_PER_VOXEL * math.prod(shape) / peak
    lines = [
        f"matrix product: {peak / 1e9:.0f} GF/s",
        "",
        "| candidate | CPU s | wall s | twin / ours, CPU | wall | share |",
        "|---|---|---|---|---|---|",
    ]
    for name, (cpu, wall) in times.items():
        ratios = ["", ""]
        if twin := times.get(f"PyTorch twin, {name}"):
            ratios = [f"{twin.cpu_ms / cpu:.2f}", f"{twin.wall_ms / wall:.2f}"]
        passes = {"forward": 1, "step": 3, "step with Dice": 3}
        share = passes.get(name.removeprefix("PyTorch twin, "), 0) * least / wall
        lines.append(
            f"| {name} | {cpu / 1e3:.2f} | {wall / 1e3:.2f} | {ratios[0]} | "
            f"{ratios[1]} | {share or math.nan:.2f} |".replace("nan", "")
        )
    return "\n".join(lines)


def memory(shape: tuple[int, int, int]) -> None:
    """Prints the compiled scratch of forward and training step; runs nothing."""
    cond = jnp.zeros(1, jnp.int32)
    image = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32)
    half = tuple(n // 2 for n in shape)
    corr = jax.ShapeDtypeStruct((1, *half, 27), jnp.float32)
    print("| scratch, GiB | float32 | bfloat16 |\n|---|---|---|")
    rows: dict[str, list] = {"forward": [], "step": [], "step with Dice": []}
    for dtype in ("float32", "bfloat16"):
        model = UniReg(dtype=dtype)
        params = jax.eval_shape(
            lambda m=model: train_state.init_params(m, jax.random.key(0))
        )
        forward = jax.jit(functools.partial(build.apply, model))
        rows["forward"].append(forward.lower(params, image, image, corr, cond, cond))
        for name, dice in (("step", 0.0), ("step with Dice", 1.0)):
            step, make_state = training_step(dtype, dice)
            rows[name].append(
                step.lower(
                    jax.eval_shape(make_state), make_batch(shape), Extractor("mind")
                )
            )
    for name, lowered in rows.items():
        sizes = [x.compile().memory_analysis().temp_size_in_bytes for x in lowered]
        print(f"| {name} | " + " | ".join(f"{s / 2**30:.2f}" for s in sizes) + " |")


def main(argv) -> None:
    del argv
    cli.keep_freed_memory()
    jax.config.update("jax_enable_compilation_cache", False)
    shape = tuple(int(n) for n in flags.FLAGS.shape)
    device = jax.devices()[0]
    print(
        f"{shape}, {device.platform} {device.device_kind}, {os.cpu_count()} cores, "
        f"jax {jax.__version__}, Python {platform.python_version()}"
    )
    if flags.FLAGS.memory:
        memory(shape)
        return
    with jax.default_matmul_precision(flags.FLAGS.precision):
        runs = candidates(shape, flags.FLAGS.dtype)
    times = timing.measure(runs, flags.FLAGS.repeats)
    print(report(times, shape))
    print(f"\nhost peak in the end: {_host_peak():.1f} GiB")
    if stats := device.memory_stats():
        print(f"peak on the device: {stats['peak_bytes_in_use'] / 2**30:.1f} GiB")


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_list("shape", ["96", "96", "80"], "X,Y,Z, multiples of 16.")
    flags.DEFINE_integer("repeats", 5, "Counted runs of each candidate.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of convolutions.")
    flags.DEFINE_enum(
        "precision", "default", ["default", "high", "highest"], "Of float32 products."
    )
    flags.DEFINE_boolean("memory", False, "Only compile, and state the scratch.")
    cli.run(main)
