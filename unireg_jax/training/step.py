"""The two functions that are compiled for training: one step, one evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from unireg_jax.models.features import Extractor
from unireg_jax.ops import dice, intensity, jacobian, ncc, warp
from unireg_jax.tasks import PairBatch
from unireg_jax.training import objective
from unireg_jax.training.mesh import pair_sharding, replicated, traced_on
from unireg_jax.training.state import TrainState


def make_train_step(
    loss_fn: Callable,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    accumulate: int = 1,
    ema: float = 0.0,
    precision: str = "default",
    skip_nonfinite: bool = False,
) -> Callable:
    """Compiles step(state, batch, extractor) -> (state, scalars); donates the state.

    The extractor's parameters are an argument because they may be many: as constants
    they would be part of the program.

    Args:
        loss_fn: loss(params, batch, extractor) -> (scalar, dict of scalars).
        tx: gradient transformation.
        mesh: from `mesh.make_mesh`; the batch size is a multiple of its data axis times
            `accumulate`.
        accumulate: parts of the batch that come one after another, in the memory of
            one. A loop of its own, not `optax.MultiSteps`: a step stays one update, for
            schedules, checkpoints and data alike, and nothing more is saved.
        ema: decay d of the running mean of the parameters, whose state then has one:
            ema <- e ema + (1 - e) params, e = min(d, (1 + n) / (10 + n)) after n steps,
            so that the first parameters are soon forgotten. 0: none.
        precision: see `mesh.traced_on`.
        skip_nonfinite: see `keep_finite`.

    Returns:
        The jitted step. `scalars` adds to those of the loss grad_norm and param_norm,
        of the parameters after the step: finite if and only if they can be used. Of an
        accumulated batch they are means over its parts, all but the loss without those
        that are NaN.
    """

    def step(state: TrainState, batch: PairBatch, extractor: Extractor):
        with traced_on(mesh, precision=precision):
            grads, scalars = _gradient(
                loss_fn, state.params, batch, extractor, mesh, accumulate
            )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        scalars["grad_norm"] = optax.tree.norm(grads)
        scalars["param_norm"] = optax.tree.norm(params)
        mean = _running_mean(state, params, ema) if ema else None
        after = TrainState(state.step + 1, params, opt_state, state.key, mean)
        if skip_nonfinite:
            return keep_finite(state, after, scalars)
        return after, scalars

    keep = replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(keep, pair_sharding(mesh), keep),
        out_shardings=(keep, keep),
        donate_argnums=0,
    )


def keep_finite(
    before: TrainState, after: TrainState, scalars: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes a step only if all its numbers are finite; else its count alone goes on.

    Args:
        before: state before the step.
        after: state after it.
        scalars: with loss, grad_norm and param_norm.

    Returns:
        The state, and the scalars with skipped, 1 or 0.
    """
    norms = jnp.stack([scalars[k] for k in ("loss", "grad_norm", "param_norm")])
    finite = jnp.isfinite(norms).all()
    kept = before._replace(step=after.step)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, kept)
    return state, {**scalars, "skipped": 1 - finite.astype(jnp.float32)}


def _gradient(loss_fn, params, batch, extractor, mesh, accumulate):
    """Gradient and scalars of a batch, in `accumulate` parts."""
    gradient = jax.grad(loss_fn, has_aux=True)
    if accumulate == 1:
        return gradient(params, batch, extractor)
    count = mesh.shape["data"]

    def divide(rows):
        # Every device goes through its own rows: none moves to another.
        size = len(rows) // accumulate  # not -1: of no layers there are no elements
        rows = rows.reshape(count, accumulate, size // count, *rows.shape[1:])
        return rows.swapaxes(0, 1).reshape(accumulate, size, *rows.shape[3:])

    parts = jax.lax.with_sharding_constraint(
        jax.tree.map(divide, batch), pair_sharding(mesh, None)
    )

    def add(total, part):
        grads, scalars = gradient(params, part, extractor)
        return jax.tree.map(jnp.add, total, grads), scalars

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, scalars = jax.lax.scan(add, zeros, parts)
    grads = jax.tree.map(lambda g: g / accumulate, total)
    return grads, objective.mean_scalars(scalars)


def _running_mean(state: TrainState, params: Any, decay: float) -> Any:
    """The mean of the parameters with those of this step."""
    steps = state.step.astype(jnp.float32)
    keep = jnp.minimum(decay, (1 + steps) / (10 + steps))
    return jax.tree.map(lambda old, new: new + keep * (old - new), state.ema, params)


def make_eval_step(
    apply_fn: Callable,
    *,
    num_labels: int,
    mesh: Mesh | None = None,
    precision: str = "default",
    planes: bool = False,
) -> Callable:
    """Compiles evaluate(params, batch, extractor) -> dict of arrays per sample.

    Labels are read once from the moving volume through field and pre-alignment
    together, nearest neighbour.

    Args:
        apply_fn: apply(params, fixed, moving, corr, region, pair_type) -> disp.
        num_labels: label ids including background.
        mesh: devices that share a batch, as in training; None: wherever it lies.
        precision: see `mesh.traced_on`.
        planes: whether the result also holds `planes`, see `mid_planes`.

    Returns:
        A jitted function; its result holds dsc and dsc_before [B, K - 1] (NaN for a
        label that one of the two scans lacks, which no field can mend, 0 for one that
        the field loses), ncc and ncc_before [B] where both scans are, sdlogj,
        sdlogj_l2r and folding_fraction [B] over the fixed scan's field of view.
    """

    def evaluate(params: Any, batch: PairBatch, extractor: Extractor):
        pair = objective.prepare(batch, extractor)
        disp = apply_fn(
            params, pair.fixed, pair.moving, pair.corr, pair.region, pair.pair_type
        )
        result = judge(disp, batch, pair, num_labels=num_labels)
        return result | {"planes": mid_planes(disp, pair)} if planes else result

    if mesh is None:
        return jax.jit(evaluate)

    def on_mesh(params: Any, batch: PairBatch, extractor: Extractor):
        with traced_on(mesh, precision=precision):
            return evaluate(params, batch, extractor)

    keep = replicated(mesh)
    return jax.jit(
        on_mesh, in_shardings=(keep, pair_sharding(mesh), keep), out_shardings=keep
    )


def judge(
    disp: jax.Array, batch: PairBatch, pair: objective.Pair, *, num_labels: int
) -> dict[str, jax.Array]:
    """Metrics of a field for one batch; see `make_eval_step`."""
    fixed = (batch.fixed_labels, batch.fixed_more)
    moving = (batch.moving_labels, batch.moving_more)

    def dsc(one, other):
        return dice.dsc(
            one[0],
            other[0],
            num_labels=num_labels,
            fixed_more=one[1],
            warped_more=other[1],
        )

    # A map with itself: NaN where it lacks the label.
    undefined = jnp.isnan(dsc(fixed, fixed)) | jnp.isnan(dsc(moving, moving))
    after, before = (
        jnp.where(undefined, jnp.nan, dsc(fixed, _moving_labels(field, batch)))
        for field in (disp, jnp.zeros_like(disp))
    )
    body = intensity.valid(batch.fixed)[..., 0]
    ncc_after, ncc_before = (
        ncc.local_ncc(
            pair.fixed,
            warp.warp(pair.moving, field),
            mask=objective.in_both(pair, field)[..., 0],
        )
        for field in (disp, jnp.zeros_like(disp))
    )
    return {
        "dsc": after,
        "dsc_before": before,
        "ncc": ncc_after,
        "ncc_before": ncc_before,
        "sdlogj": jacobian.sdlogj(disp, mask=body),
        "sdlogj_l2r": jacobian.sdlogj_l2r(disp, mask=body),
        "folding_fraction": jacobian.folding_fraction(disp, mask=body),
    }


def mid_planes(disp: jax.Array, pair: objective.Pair) -> dict[str, list[jax.Array]]:
    """The planes through the middle of a pair, for pictures; a field costs far more.

    Args:
        disp: [B, X, Y, Z, 3] voxels.
        pair: from `objective.prepare`.

    Returns:
        fixed, moving, warped [B, n, m]; fixed_labels, moving_labels, warped_labels
        [B, n, m]; disp [B, n, m, 3]: each a list of the planes across X, Y and Z.
    """
    identity = warp.identity_coords(disp.shape[1:4])
    coords = jnp.broadcast_to(identity, disp.shape) + disp
    labels = pair.moving_labels[..., None]
    whole = {
        "fixed": pair.fixed[..., 0],
        "moving": pair.moving[..., 0],
        "fixed_labels": pair.fixed_labels,
        "moving_labels": pair.moving_labels,
        "disp": disp,
    }
    planes: dict[str, list] = {k: [] for k in (*whole, "warped", "warped_labels")}
    for axis in (1, 2, 3):
        middle = disp.shape[axis] // 2
        for name, volume in whole.items():
            planes[name].append(volume.take(middle, axis))
        places = jax.lax.slice_in_dim(coords, middle, middle + 1, axis=axis)
        for name, volume, order in (
            ("warped", pair.moving, 1),
            ("warped_labels", labels, 0),
        ):
            found = warp.sample(volume, places, order=order)
            planes[name].append(found.squeeze(axis)[..., 0])
    return planes


def _moving_labels(disp: jax.Array, batch: PairBatch) -> tuple[jax.Array, jax.Array]:
    """All layers of moving labels at align(x + disp(x)), 0 beyond the moving grid."""
    coords = objective.moving_coords(batch, disp)
    within = warp.within(coords, batch.moving_labels.shape[1:4], margin=0.5)
    return objective.sample_labels(batch, coords, within)
