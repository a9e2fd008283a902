"""The per-operator benchmark: it runs, and its peers compute what ours does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark_ops, timing
from unireg_jax.models.unireg import UniReg
from unireg_jax.registration.network import initializer

SHAPE = (16, 32, 16)


def test_benchmark_ops_prints_three_tables(capsys):
    names = ("warp", "pool")
    rows = {name: benchmark_ops.run_op(name, SHAPE, 1) for name in names}
    benchmark_ops.print_comparison(rows)
    benchmark_ops.print_peers(rows)
    benchmark_ops.print_programs(rows, {"matmul_flops": 1e11, "copy_bytes": 1e10})
    tables = capsys.readouterr().out
    assert all(tables.count(f"\n| {name} |") == 3 for name in names)
    # Either measured or named as left out.
    peers = [peer for name in names for peer in benchmark_ops.OPS[name].peers]
    assert all(peer in tables for peer in peers)
    for row in rows.values():
        assert row.ours.wall_ms > 0.0 and row.program.bytes > 0.0


@pytest.mark.parametrize(
    "name, peer",
    [
        ("warp", "torch grid_sample"),
        ("warp", "SciPy"),
        ("jacobian", "torch slices"),
        ("correlation", "torch products"),
        ("head", "torch conv3d"),
        ("pool_grad", "torch max_pool3d"),
        ("resample", "SciPy"),
        ("mind", "torch slices"),
        ("diffusion_grad", "torch diff"),
        ("encoder_0", "torch conv3d"),
        ("decoder_3", "torch conv3d"),
        ("remaining_1", "torch conv3d"),
        ("pre_head_grad", "torch conv3d"),
    ],
)
def test_peer_computes_the_same(name, peer):
    op = benchmark_ops.OPS[name]
    inputs = op.inputs(SHAPE, np.random.default_rng(0))
    try:
        theirs = op.peers[peer](*inputs, *op.static)()
    except ImportError as error:
        pytest.skip(str(error))
    ours = op.function(*map(jnp.asarray, inputs), *op.static)
    # The gradient where there is one; sorted, because channels stand elsewhere.
    ours, theirs = (r[-1] if isinstance(r, tuple | list) else r for r in (ours, theirs))
    ours, theirs = (np.sort(np.asarray(r), axis=None) for r in (ours, theirs))
    # float32 sums in another order.
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.ptp(ours))


def test_layers_are_those_of_the_network():
    params = jax.eval_shape(initializer(UniReg()), jax.random.key(0))
    kernels = {
        path[-2].key: leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel"
    }
    for name, layer in benchmark_ops.LAYERS.items():
        channels = sum(layer.parts) + layer.coarse
        assert kernels[name] == (3, 3, 3, channels, layer.features), name


def test_unavailable_memory_is_refused():
    timing.require_memory(1.0)
    with pytest.raises(MemoryError, match="GiB are free"):
        timing.require_memory(2.0**60)
