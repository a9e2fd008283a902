"""The devices of a run and what lies on which: batch along `data`, X along `space`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unireg_jax.errors import USAGE, UserError
from unireg_jax.ops.spatial import DATA, SPACE
from unireg_jax.tasks import PairBatch

PRECISIONS = ("default", "tensorfloat32", "float32")


def make_mesh(devices: list[jax.Device] | None = None, *, space: int = 1) -> Mesh:
    """Arranges devices as [data, space].

    Args:
        devices: of all processes; None: every one there is.
        space: how many share a volume; divides the devices of one process, so that a
            process reads whole volumes and neighbours are on one machine.

    Returns:
        The mesh, with the data axis as long as the devices allow.

    Raises:
        UserError: `schema`, exit code 2: the devices cannot be shared so, or the
            platform that JAX_PLATFORMS names is not there.
    """
    devices = all_devices() if devices is None else devices
    local = sum(d.process_index == devices[0].process_index for d in devices)
    if local % space:
        raise UserError(
            "schema",
            f"config.train.space_devices: a divisor of the {local} devices of a "
            f"process expected, got {space}; set another number, or use as many "
            "devices",
            USAGE,
        )
    # Auto: XLA propagates the shardings, as for the slices and reshapes in ops.
    return jax.make_mesh(
        (len(devices) // space, space),
        (DATA, SPACE),
        (AxisType.Auto, AxisType.Auto),
        devices=devices,
    )


def all_devices() -> list[jax.Device]:
    """Devices of all processes.

    Raises:
        UserError: `schema`, exit code 2: the platform that JAX_PLATFORMS names is not
            there.
    """
    try:
        return jax.devices()
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        raise UserError(
            "schema",
            f"devices: a {jax.config.jax_platforms} device expected, none found "
            f"({text}); set JAX_PLATFORMS=cpu to run on the CPU",
            USAGE,
        ) from error


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over the data axis."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    """Parameters and optimiser state live on every device."""
    return NamedSharding(mesh, PartitionSpec())


def pair_sharding(mesh: Mesh, *leading: None) -> PairBatch:
    """Of a PairBatch: pairs over the data axis, X of its volumes over the space axis.

    `leading` stands for axes before the batch that are not split.
    """
    volume = NamedSharding(mesh, PartitionSpec(*leading, DATA, SPACE))
    row = NamedSharding(mesh, PartitionSpec(*leading, DATA))
    layers = NamedSharding(mesh, PartitionSpec(*leading, DATA, None, SPACE))
    volumes = dict.fromkeys(
        ("fixed", "moving", "fixed_labels", "moving_labels"), volume
    ) | dict.fromkeys(("fixed_more", "moving_more"), layers)
    return PairBatch(**dict.fromkeys(PairBatch._fields, row) | volumes)


def put(batch: Any, sharding: Any) -> Any:
    """Puts this process's rows of a batch on its devices.

    Args:
        batch: pytree of NumPy arrays [B / processes, ...].
        sharding: NamedSharding, or a tree of them.

    Returns:
        The same tree of global arrays [B, ...].
    """
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, batch)
    return jax.tree.map(jax.make_array_from_process_local_data, sharding, batch)


def put_same(tree: Any, sharding: Any) -> Any:
    """Puts what every process holds whole on the devices: [B, ...] to [B, ...]."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)

    def one(array, sharding):
        array = np.asarray(array)
        return jax.make_array_from_callback(
            array.shape, sharding, lambda index: array[index]
        )

    return jax.tree.map(one, tree, sharding)


def local_rows(mesh: Mesh, batch_size: int, *, accumulate: int = 1) -> int:
    """Rows of a global batch that this process loads.

    Raises:
        UserError: `schema`, exit code 2: the batch does not divide.
    """
    count = mesh.shape[DATA]
    if batch_size % (count * accumulate):
        product = f"{count} devices along the data axis"
        if accumulate > 1:
            product += f" x config.train.accumulate {accumulate}"
        raise UserError(
            "schema",
            f"config.data.batch_size: a multiple of {count * accumulate} ({product}) "
            f"expected, got {batch_size}; it counts the pairs of one step over all "
            "devices: set a multiple, or use fewer devices",
            USAGE,
        )
    return batch_size // jax.process_count()


@contextlib.contextmanager
def traced_on(mesh: Mesh, *, precision: str = "default") -> Iterator[None]:
    """Within it, ops see the mesh, if volumes are split, and the precision.

    Args:
        mesh: from `make_mesh`.
        precision: of float32 convolutions and products on devices with matrix units:
            "float32" computes them so, "tensorfloat32" rounds factors to ten bits;
            "default" is what JAX is set to, on recent GPUs TF32. No effect on a CPU.
    """
    with contextlib.ExitStack() as stack:
        if mesh.shape[SPACE] > 1:
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        if precision != "default":
            stack.enter_context(jax.default_matmul_precision(precision))
        yield
