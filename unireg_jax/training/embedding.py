"""The training step of the anatomical embedding, and its judgement on views."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from unireg_jax.models.features import sam
from unireg_jax.registration import embedding
from unireg_jax.tasks import ViewBatch
from unireg_jax.training import contrastive
from unireg_jax.training.mesh import batch_sharding, replicated
from unireg_jax.training.state import TrainState
from unireg_jax.training.step import keep_finite


def make_state(
    network: sam.Sam, tx: optax.GradientTransformation, *, seed: int
) -> TrainState:
    """State at step 0.

    Args:
        network: with norm "batch".
        tx: gradient transformation of the parameters.
        seed: root of all keys.

    Returns:
        TrainState whose `params` holds params and batch_stats of the network; the
        optimiser sees the former.
    """
    key = jax.random.key_data(jax.random.key(seed))
    init = jax.jit(embedding.initializer(network))
    variables = init(jax.random.fold_in(jax.random.key(seed), 0))
    opt_state = jax.jit(tx.init)(variables["params"])
    return TrainState(jnp.zeros((), jnp.int32), variables, opt_state, key)


def make_train_step(
    network: sam.Sam,
    tx: optax.GradientTransformation,
    *,
    recipe: contrastive.Recipe,
    mesh: Mesh,
    skip_nonfinite: bool = False,
) -> Callable:
    """Compiles step(state, batch) -> (state, scalars); the state is donated.

    Normalisation and negatives reach over the whole batch, whatever devices hold it.

    Args:
        network: with norm "batch".
        tx: gradient transformation of the parameters.
        recipe: of the objective.
        mesh: from `step.make_mesh`; the batch size is a multiple of its data axis.
        skip_nonfinite: see `step.keep_finite`.

    Returns:
        The jitted step; `scalars` as of `contrastive.loss`, grad_norm and param_norm.
    """

    def loss(params, stats, batch, key):
        variables = {"params": params, "batch_stats": stats}
        (fine, coarse), updated = _embed(network, variables, batch, train=True)
        value, scalars = contrastive.loss(fine, coarse, batch, key, recipe=recipe)
        return value, (scalars, updated["batch_stats"])

    def step(state: TrainState, batch: ViewBatch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        params, stats = state.params["params"], state.params["batch_stats"]
        grads, (scalars, stats) = jax.grad(loss, has_aux=True)(
            params, stats, batch, key
        )
        updates, opt_state = tx.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        variables = {"params": params, "batch_stats": stats}
        scalars["grad_norm"] = optax.tree.norm(grads)
        scalars["param_norm"] = optax.tree.norm(variables)
        after = TrainState(state.step + 1, variables, opt_state, state.key)
        if skip_nonfinite:
            return keep_finite(state, after, scalars)
        return after, scalars

    keep, split = replicated(mesh), batch_sharding(mesh)
    return jax.jit(
        step,
        in_shardings=(keep, split),
        out_shardings=(keep, keep),
        donate_argnums=0,
    )


def make_eval_step(network: sam.Sam, *, recipe: contrastive.Recipe) -> Callable:
    """Compiles evaluate(variables, batch, key) -> scalars, by the running statistics.

    Args:
        network: with norm "batch".
        recipe: of the objective.

    Returns:
        A jitted function; scalars as of `contrastive.loss`.
    """

    def evaluate(variables: Any, batch: ViewBatch, key: jax.Array):
        fine, coarse = _embed(network, variables, batch, train=False)
        return contrastive.loss(fine, coarse, batch, key, recipe=recipe)[1]

    return jax.jit(evaluate)


def _embed(network, variables, batch, *, train):
    """Maps [B, 2, ...]; with the updated statistics when training."""
    views = batch.hu.reshape(-1, *batch.hu.shape[2:])
    mutable = ["batch_stats"] if train else False
    out = network.apply(variables, sam.scale(views), train=train, mutable=mutable)
    maps, updated = out if train else (out, None)
    pair = (*batch.hu.shape[:2],)
    maps = tuple(m.reshape(*pair, *m.shape[1:]) for m in maps)
    return (maps, updated) if train else maps
