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
        ema: running mean of the parameters, see step.make_train_step, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    ema: Any = None

    @property
    def weights(self) -> Any:
        """What is judged and released: the running mean, where there is one."""
        return self.params if self.ema is None else self.ema

    def start_from(self, params: Any) -> "TrainState":
        """The same state at other parameters."""
        params = jax.tree.map(jnp.asarray, params)
        return self._replace(params=params, ema=_mean_of(params, self.ema is not None))


def init_params(model: nn.Module, key: jax.Array) -> Any:
    """Parameters of a UniReg-like module; they do not depend on the volume size."""
    return jax.jit(network.initializer(model))(key)


def make_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    averaged: bool = False,
) -> TrainState:
    """State at step 0; `averaged` keeps a running mean of the parameters, too."""
    key = jax.random.key_data(jax.random.key(seed))
    params = init_params(model, jax.random.fold_in(jax.random.key(seed), 0))
    mean = _mean_of(params, averaged)
    opt_state = jax.jit(tx.init)(params)  # as one program, not one per array
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, key, mean)


def _mean_of(params: Any, averaged: bool) -> Any:
    """Of one step; in buffers of its own, because a step gives up those it is given."""
    return jax.tree.map(jnp.array, params) if averaged else None
