"""Volumes split along X over the devices of a mesh: slabs, and the slices around them.

The mesh is that of the trace (`jax.sharding.use_abstract_mesh`), with the axes `data`
for the batch and `space` for X. XLA partitions by itself what is written in whole
arrays; what loops over slices, it would gather: that runs slab by slab here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

DATA, SPACE = "data", "space"


def slabs() -> int:
    """Devices that share a volume; 1 without a mesh, and within one slab."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[SPACE] if types.get(SPACE) == AxisType.Auto else 1


def splits(*volumes: jax.Array) -> bool:
    """Says whether volumes [B, X, ...] are split: X is a multiple of the slabs."""
    count = slabs()
    return count > 1 and all(v.shape[1] % count == 0 for v in volumes)


def over_slabs(
    function: Callable, volumes: Sequence[Any], whole: Sequence[Any] = ()
) -> Any:
    """Runs function(*volumes, *whole) on every slab.

    Args:
        function: maps slabs [b, x, ...] and what is not split to slabs [b, x, ...]; it
            may ask its neighbours through `with_halo`.
        volumes: pytrees of [B, X, ...] that split.
        whole: pytrees that every device holds.

    Returns:
        What the function returns, joined along B and X.
    """
    specs = jax.tree.map(_spec, tuple(volumes))
    out = _spec(jax.tree.leaves(tuple(volumes))[0])
    # The check of varying axes knows no custom derivative.
    return jax.shard_map(
        function,
        in_specs=(*specs, *jax.tree.map(lambda _: PartitionSpec(), tuple(whole))),
        out_specs=out,
        check_vma=False,
    )(*volumes, *whole)


def with_halo(slab: jax.Array, width: int) -> jax.Array:
    """Adds the neighbours' slices to a slab, beyond the volume zeros.

    Args:
        slab: [b, x, ...], x at least `width`.
        width: slices on either side.

    Returns:
        [b, x + 2 width, ...].
    """
    count = lax.axis_size(SPACE)
    # Who has no neighbour receives zeros.
    up = [(i, i + 1) for i in range(count - 1)]
    down = [(i + 1, i) for i in range(count - 1)]
    size = slab.shape[1]
    low = lax.ppermute(lax.slice_in_dim(slab, size - width, size, axis=1), SPACE, up)
    high = lax.ppermute(lax.slice_in_dim(slab, 0, width, axis=1), SPACE, down)
    return jnp.concatenate([low, slab, high], axis=1)


def _spec(volume: Any) -> PartitionSpec:
    """Batch over `data` where it divides, X over `space`."""
    count = jax.sharding.get_abstract_mesh().shape[DATA]
    return PartitionSpec(DATA if volume.shape[0] % count == 0 else None, SPACE)
