"""Everything that a training run carries from step to step."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from unireg_jax.registration import network


class TrainState(NamedTuple):
    """State of a run; restoring it continues the run exactly.

    Attributes:
        step: [] int32, steps done.
        params: parameters of the network.
        opt_state: state of the optimiser.
        key: root key, never advanced: the key of step n is fold_in(key, n).
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def init_params(model: nn.Module, key: jax.Array) -> Any:
    """Parameters of a UniReg-like module; they do not depend on the volume size."""
    return jax.jit(network.initializer(model))(key)


def make_state(
    model: nn.Module, tx: optax.GradientTransformation, *, seed: int
) -> TrainState:
    """State at step 0."""
    key = jax.random.key_data(jax.random.key(seed))
    params = init_params(model, jax.random.fold_in(jax.random.key(seed), 0))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), key)
