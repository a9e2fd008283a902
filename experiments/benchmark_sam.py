"""Time and memory of the anatomical embedding: one volume, and a pair's correlation.

    python -m experiments.benchmark_sam --shape=96,96,80 --shape=192,192,160

The full network of the public checkpoints and the narrow `lite` one, parameters as
initialised (no figure here depends on them), MIND beside them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli, timing
from experiments.sam import get_config
from unireg_jax.models import features
from unireg_jax.models.features import Extractor, sam
from unireg_jax.registration import embedding


def extractor(preset: str, dtype: str) -> Extractor:
    """An embedding with initial parameters, folded."""
    fields = {**get_config(preset).model.to_dict(), "dtype": dtype}
    trained = sam.Sam(**fields, norm="batch")
    variables = jax.jit(embedding.initializer(trained))(jax.random.key(0))
    network = sam.Sam(**fields)
    return Extractor("sam", network=network, params=sam.fold(variables))


def main(argv) -> None:
    del argv
    cli.setup()
    jax.config.update("jax_enable_compilation_cache", False)
    options = flags.FLAGS
    print(
        "| grid | features | parameters | describe a volume, CPU s | wall s | scratch "
        "MiB | maps MiB | correlate a pair, CPU s | scratch MiB | compile s |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    kinds = {"mind": Extractor("mind")}
    for preset, name in (("lite", "sam lite"), ("paper", "sam")):
        kinds[name] = extractor(preset, "float32")
    kinds["sam, bfloat16"] = extractor("paper", "bfloat16")
    for text in options.shape:
        shape = tuple(int(n) for n in text.split(","))
        rng = np.random.default_rng(0)
        hu = jnp.asarray(rng.integers(-1000, 600, (1, *shape, 1)), jnp.int16)
        for name, kind in kinds.items():
            print(row(text, name, kind, hu, options.repeats), flush=True)


def row(text: str, name: str, kind: Extractor, hu: jax.Array, repeats: int) -> str:
    """One line of the table."""
    describe = timing.compile_program(features.describe, hu, kind)
    maps = describe.run()
    correlate = timing.compile_program(features.correlate, maps, maps)
    runs = {"describe": describe.run, "correlate": correlate.run}
    times = timing.measure(runs, repeats)
    size = sum(x.nbytes for x in maps) / 2**20
    count = sum(x.size for x in jax.tree.leaves(kind.params))
    return (
        f"| {text.replace(',', '×')} | {name} | {count / 1e6:.2f} M | "
        f"{times['describe'].cpu_ms / 1e3:.2f} | {times['describe'].wall_ms / 1e3:.2f} "
        f"| {describe.scratch_mib:.0f} | {size:.0f} | "
        f"{times['correlate'].cpu_ms / 1e3:.2f} | {correlate.scratch_mib:.0f} | "
        f"{describe.compile_s + correlate.compile_s:.1f} |"
    )


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_multi_string("shape", ["96,96,80"], "X,Y,Z voxels; may repeat.")
    flags.DEFINE_integer("repeats", 3, "Counted runs.", lower_bound=1)
    cli.run(main)
