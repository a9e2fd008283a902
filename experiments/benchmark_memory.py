"""States the memory of the training step, by setting; compiles and runs nothing.

    python -m experiments.benchmark_memory [--shape=96,96,80] [--dtype=float32,bfloat16]
        [--remat=none,last,all] [--batch=1,2] [--space=1,2]

The step of preset `paper` with Dice on 13 labels, over all combinations, as a markdown
table: the compiler's estimate in MiB per device of scratch, arguments (state and batch)
and results, of which the state takes the place of the argument. On a machine without
so many devices CPU ones are simulated. What is estimated is the program for this
platform: on a CPU the convolutions compute in float32 whatever their dtype.
"""

import itertools
import os
import time

import jax
import numpy as np
from absl import flags

from experiments import benchmark, cli
from unireg_jax.models import backbone
from unireg_jax.models.features import Extractor
from unireg_jax.training import mesh as train_mesh


def compile_step(shape, dtype, remat, batch, space):
    """The compiled training step of one setting."""
    mesh = train_mesh.make_mesh(jax.devices()[:space], space=space)
    step, make_state = benchmark.training_step(dtype, 1.0, remat=remat, mesh=mesh)
    pairs = jax.tree.map(
        lambda x: np.concatenate([x] * batch), benchmark.make_batch(shape)
    )
    state = jax.eval_shape(make_state)
    return step.lower(state, pairs, Extractor("mind")).compile()


def main(argv) -> None:
    del argv
    cli.setup()
    jax.config.update("jax_enable_compilation_cache", False)
    asked = flags.FLAGS
    shape = tuple(int(n) for n in asked.shape)
    device = jax.devices()[0]
    print(f"{shape}, {device.platform} {device.device_kind}, jax {jax.__version__}\n")
    print(
        "| dtype | remat | batch | space | scratch | arguments | results | compile s |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for dtype, remat, batch, space in itertools.product(
        asked.dtype, asked.remat, map(int, asked.batch), map(int, asked.space)
    ):
        start = time.perf_counter()
        found = compile_step(shape, dtype, remat, batch, space).memory_analysis()
        sizes = (
            found.temp_size_in_bytes,
            found.argument_size_in_bytes,
            found.output_size_in_bytes,
        )
        print(
            f"| {dtype} | {remat} | {batch} | {space} | "
            + " | ".join(f"{size / 2**20:.0f}" for size in sizes)
            + f" | {time.perf_counter() - start:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_list("shape", ["96", "96", "80"], "X,Y,Z, multiples of 16.")
    flags.DEFINE_list("dtype", ["float32", "bfloat16"], "Of convolutions.")
    flags.DEFINE_list("remat", list(backbone.REMAT), "config.model.remat.")
    flags.DEFINE_list("batch", ["1", "2"], "Pairs of a step.")
    flags.DEFINE_list("space", ["1", "2"], "config.train.space_devices.")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    cli.run(main)
