"""Times the network and the training step on this machine.

    python -m experiments.benchmark [--shape=96,96,80] [--repeats=5] [--train]

Forward of the full network (features included), forward with each convolution form
interleaved in one process, and, with --train, one training step: compile seconds, and
median CPU and wall seconds after one warm-up, and the compiled scratch memory. With
PyTorch installed, a twin of the network with the same layers runs interleaved.
"""

import os
import platform
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from unireg_jax.models import features
from unireg_jax.models.unireg import UniReg
from unireg_jax.ops import ncc, smoothness, warp


def _inputs(shape):
    rng = np.random.default_rng(0)
    fixed, moving = jnp.asarray(rng.uniform(-1, 1, (2, 1, *shape, 1)), jnp.float32)
    return fixed, moving, jnp.zeros(1, jnp.int32)


def _compiled(name: str, function: Callable, *args) -> tuple[str, Callable]:
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    scratch = program.memory_analysis().temp_size_in_bytes / 2**20
    print(f"{name}: compiled in {seconds:.1f} s, scratch {scratch:.0f} MiB")
    return name, lambda: jax.block_until_ready(program(*args))


def _torch_twin(shape) -> Callable | None:
    """The same layers in PyTorch, channels-last, no features; None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    functional = torch.nn.functional
    widths = {
        "e0": (2, 16),
        "e1": (43, 32),
        "e2": (32, 32),
        "e3": (32, 32),
        "d0": (32, 32),
        "d1": (64, 32),
        "d2": (64, 32),
        "d3": (64, 32),
        "r0": (48, 32),
        "r1": (32, 16),
        "r2": (16, 16),
        "p": (16, 8),
    }
    layers = {
        k: torch.nn.Conv3d(a, b, 3, padding=1).to(memory_format=torch.channels_last_3d)
        for k, (a, b) in widths.items()
    }
    head = torch.nn.Conv3d(8, 3, 1)

    def conv(name, x):
        return functional.leaky_relu(layers[name](x), 0.2)

    def up(x):
        return functional.interpolate(x, scale_factor=2, mode="nearest")

    def run():
        with torch.inference_mode():
            x = torch.rand(1, 2, *shape).to(memory_format=torch.channels_last_3d)
            corr = torch.rand(1, 27, *(n // 2 for n in shape))
            corr = corr.to(memory_format=torch.channels_last_3d)
            skips = [conv("e0", x)]
            x = torch.cat([functional.max_pool3d(skips[0], 2), corr], 1)
            for name in ("e1", "e2", "e3"):
                skips.append(conv(name, x))
                x = functional.max_pool3d(skips[-1], 2)
            x = conv("d0", x)
            for name, skip in zip(("d1", "d2", "d3"), skips[:0:-1], strict=True):
                x = conv(name, torch.cat([up(x), skip], 1))
            x = torch.cat([up(x), skips[0]], 1)
            for name in ("r0", "r1", "r2"):
                x = conv(name, x)
            head(layers["p"](x))

    return run


def _measure(candidates: dict[str, Callable], repeats: int) -> None:
    """Interleaved: every candidate once per round, medians over the rounds."""
    times: dict[str, list] = {name: [] for name in candidates}
    for i in range(repeats + 1):
        for name, run in candidates.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if i:  # the first round warms up
                times[name].append((cpu, wall))
    for name, pairs in times.items():
        cpu, wall = np.median(pairs, axis=0)
        print(f"{name}: {cpu:.2f} CPU s, {wall:.2f} s (median of {repeats})")


def main(argv) -> None:
    del argv
    shape = tuple(int(n) for n in flags.FLAGS.shape)
    device = jax.devices()[0]
    print(
        f"{shape}, {device.platform} {device.device_kind}, {os.cpu_count()} cores, "
        f"jax {jax.__version__}, Python {platform.python_version()}"
    )
    fixed, moving, cond = _inputs(shape)
    model = UniReg()
    tiny = jnp.zeros((1, 16, 16, 16, 1))
    corr = jnp.zeros((1, 8, 8, 8, 27))
    params = jax.jit(model.init)(jax.random.key(0), tiny, tiny, corr, cond, cond)
    corr = jax.jit(lambda a, b: features.match(a, b, backend="mind"))(fixed, moving)

    def forward(impl):
        return UniReg(conv_impl=impl).apply

    args = (params, fixed, moving, corr, cond, cond)
    candidates = dict(
        [
            _compiled("network", forward("auto"), *args),
            _compiled(
                "features and correlation",
                lambda a, b: features.match(a, b, backend="mind"),
                fixed,
                moving,
            ),
        ]
    )
    if flags.FLAGS.direct:
        candidates |= [_compiled("network, XLA convolution", forward("direct"), *args)]
    if flags.FLAGS.train:

        def loss(params, fixed, moving, corr, cond):
            disp = model.apply(params, fixed, moving, corr, cond, cond)
            similarity = ncc.local_ncc(fixed, warp.warp(moving, disp))
            return (smoothness.diffusion(disp) - similarity).mean()

        candidates |= [
            _compiled(
                "loss and gradient", jax.grad(loss), params, fixed, moving, corr, cond
            )
        ]
    if twin := _torch_twin(shape):
        candidates["PyTorch twin, forward"] = twin
    _measure(candidates, flags.FLAGS.repeats)


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_list("shape", ["96", "96", "80"], "X,Y,Z, multiples of 16.")
    flags.DEFINE_integer("repeats", 5, "Counted runs of each candidate.")
    flags.DEFINE_boolean("train", False, "Time a training step, too.")
    flags.DEFINE_boolean("direct", False, "Also XLA's own convolution (slow).")
    app.run(main)
