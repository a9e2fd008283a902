"""The two functions that are compiled for training: one step, one evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unireg_jax.models.features import Extractor
from unireg_jax.ops import dice, intensity, jacobian, warp
from unireg_jax.tasks import PairBatch
from unireg_jax.training import objective
from unireg_jax.training.state import TrainState


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices along the data axis; the space axis has length 1."""
    count = len(devices or jax.devices())
    # Auto: XLA propagates the shardings, as for the slices and reshapes in ops.
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((count, 1), ("data", "space"), axis_types, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Parameters and optimiser state live on every device."""
    return NamedSharding(mesh, PartitionSpec())


def make_train_step(
    loss_fn: Callable, tx: optax.GradientTransformation, *, mesh: Mesh
) -> Callable:
    """Compiles step(state, batch, extractor) -> (state, scalars); donates the state.

    The extractor's parameters are an argument because they may be many: as constants
    they would be part of the program.

    Args:
        loss_fn: loss(params, batch, extractor) -> (scalar, dict of scalars).
        tx: gradient transformation.
        mesh: from `make_mesh`; the batch size is a multiple of its data axis.

    Returns:
        The jitted step. `scalars` adds to those of the loss grad_norm and param_norm,
        of the parameters after the step: finite if and only if they can be used.
    """

    def step(state: TrainState, batch: PairBatch, extractor: Extractor):
        gradient = jax.grad(loss_fn, has_aux=True)
        grads, scalars = gradient(state.params, batch, extractor)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        scalars["grad_norm"] = optax.tree.norm(grads)
        scalars["param_norm"] = optax.tree.norm(params)
        return TrainState(state.step + 1, params, opt_state, state.key), scalars

    keep, split = replicated(mesh), batch_sharding(mesh)
    return jax.jit(
        step,
        in_shardings=(keep, split, keep),
        out_shardings=(keep, keep),
        donate_argnums=0,
    )


def make_eval_step(apply_fn: Callable, *, num_labels: int) -> Callable:
    """Compiles evaluate(params, batch, extractor) -> dict of arrays per sample.

    Labels are read once from the moving volume through field and pre-alignment
    together, nearest neighbour.

    Returns:
        A jitted function; its result holds dsc and dsc_before [B, K - 1] (NaN where a
        label is absent in both maps), ncc and ncc_before, sdlogj, sdlogj_l2r and
        folding_fraction [B] over the fixed scan's field of view.
    """

    def evaluate(params: Any, batch: PairBatch, extractor: Extractor):
        pair = objective.prepare(batch, extractor)
        disp = apply_fn(
            params, pair.fixed, pair.moving, pair.corr, pair.region, pair.pair_type
        )
        return judge(disp, batch, pair, num_labels=num_labels)

    return jax.jit(evaluate)


def judge(
    disp: jax.Array, batch: PairBatch, pair: objective.Pair, *, num_labels: int
) -> dict[str, jax.Array]:
    """Metrics of a field for one batch; see `make_eval_step`."""
    after = _moving_labels(disp, batch)
    before = _moving_labels(jnp.zeros_like(disp), batch)
    body = intensity.valid(batch.fixed)[..., 0]
    mask = pair.fixed_valid[..., 0] * pair.moving_valid[..., 0]
    ncc_before = objective.ncc.local_ncc(pair.fixed, pair.moving, mask=mask)
    warped = warp.warp(pair.moving, disp)
    return {
        "dsc": dice.dsc(batch.fixed_labels, after, num_labels=num_labels),
        "dsc_before": dice.dsc(batch.fixed_labels, before, num_labels=num_labels),
        "ncc": objective.ncc.local_ncc(pair.fixed, warped, mask=mask),
        "ncc_before": ncc_before,
        "sdlogj": jacobian.sdlogj(disp, mask=body),
        "sdlogj_l2r": jacobian.sdlogj_l2r(disp, mask=body),
        "folding_fraction": jacobian.folding_fraction(disp, mask=body),
    }


def _moving_labels(disp: jax.Array, batch: PairBatch) -> jax.Array:
    """Moving labels at align(x + disp(x)), 0 beyond the moving grid: [B, X, Y, Z]."""
    shape = disp.shape[1:4]
    coords = jnp.broadcast_to(warp.identity_coords(shape), disp.shape) + disp
    linear, offset = batch.align[:, :3, :3], batch.align[:, :3, 3]
    coords = jnp.einsum(
        "bxyzi,bji->bxyzj", coords, linear, precision=jax.lax.Precision.HIGHEST
    )
    coords = coords + offset[:, None, None, None, :]
    limit = jnp.array(batch.moving_labels.shape[1:4], jnp.float32) - 0.5
    limit = jnp.broadcast_to(limit, coords.shape)
    within = ((coords >= -0.5) & (coords <= limit)).all(-1)
    labels = warp.sample(batch.moving_labels[..., None], coords, order=0)[..., 0]
    return jnp.where(within, labels, 0).astype(labels.dtype)
