"""On an accelerator: same numbers twice, and the numbers of the CPU.

    JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu

UNIREG_GPU_TESTS_ON_CPU=1 runs the same code on a CPU, to test the tests.
"""

import functools
import os

import jax
import numpy as np
import pytest

from experiments import benchmark, build
from unireg_jax.models.features import Extractor
from unireg_jax.models.unireg import UniReg
from unireg_jax.training import mesh as train_mesh
from unireg_jax.training import objective
from unireg_jax.training import state as train_state

pytestmark = pytest.mark.gpu
SHAPE = (64, 48, 32)


@pytest.fixture(autouse=True)
def _accelerator():
    if jax.default_backend() == "cpu" and not os.environ.get("UNIREG_GPU_TESTS_ON_CPU"):
        pytest.skip("no accelerator: set JAX_PLATFORMS=cuda,cpu")


def _train(steps):
    step, make_state = benchmark.training_step("float32", dice=1.0)
    mesh = train_mesh.make_mesh(jax.devices()[:1])
    batch = jax.device_put(benchmark.make_batch(SHAPE), train_mesh.pair_sharding(mesh))
    state = jax.device_put(make_state(), train_mesh.replicated(mesh))
    for _ in range(steps):
        state, scalars = step(state, batch, Extractor("mind"))
    return jax.device_get((state, scalars))


def test_training_steps_are_bit_exact_twice():
    """No scatter of floats anywhere: nothing depends on the order of atomics."""
    jax.tree.map(np.testing.assert_array_equal, _train(3), _train(3))


@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    # Of the largest vector: float32 sums, ten and eight bits per product.
    [
        ("float32", "highest", 1e-3),
        ("float32", "default", 2e-2),
        ("bfloat16", None, 5e-2),
    ],
)
def test_forward_equals_the_cpu(dtype, precision, bound):
    batch = benchmark.make_batch(SHAPE)
    fields = []
    for device, kind in ((jax.devices("cpu")[0], "float32"), (jax.devices()[0], dtype)):
        with jax.default_device(device), jax.default_matmul_precision(precision):
            model = UniReg(dtype=kind)
            params = train_state.init_params(model, jax.random.key(0))
            # A field of some voxels: the initial one is 1e-3.
            params["head"]["controller"]["bias"] *= 100
            pair = jax.jit(objective.prepare)(batch, Extractor("mind"))
            disp = jax.jit(functools.partial(build.apply, model))(
                params, pair.fixed, pair.moving, pair.corr, pair.region, pair.pair_type
            )
            fields.append(np.asarray(disp))
    scale = np.abs(fields[0]).max()
    np.testing.assert_allclose(fields[1], fields[0], atol=bound * scale)
