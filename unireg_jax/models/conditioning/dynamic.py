"""Dynamic head: kernels generated from image, body region and pair type.

UniReg, sections 3.1.2 and 3.1.3, eq. 3-5. Where the text is silent, initialisation and
slopes follow the authors' own later implementation; so does the pooling, a plain mean:
nothing of the architecture is the "mean-field inference" that section 3.1.2 names.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from unireg_jax import tasks

LEAK = 0.2
HIDDEN = 8
# Input and output channels of the three generated 1x1x1 layers.
WIDTHS = (8, HIDDEN, HIDDEN, 3)
NUM_WEIGHTS = sum(a * b for a, b in zip(WIDTHS, WIDTHS[1:], strict=False))
# 8*8*2 + 8*3 weights and 8*2 + 3 biases = 171 (section 3.1.3).
NUM_GENERATED = NUM_WEIGHTS + sum(WIDTHS[1:])


def encode_condition(region: jax.Array, pair_type: jax.Array) -> jax.Array:
    """[T, e]: region one-hot (eq. 3) and pair type (eq. 4), [B, 6] float32."""
    t = jax.nn.one_hot(region, len(tasks.Region), dtype=jnp.float32)
    # inter = [0, 1], intra = [1, 0]
    e = jax.nn.one_hot(1 - pair_type, len(tasks.PairType), dtype=jnp.float32)
    return jnp.concatenate([t, e], axis=-1)


def base_head(key: jax.Array) -> jax.Array:
    """A head that every task starts from, [171]: the controller's initial bias.

    Layers 1 and 2 uniform with He bounds, the last N(0, 1e-5), biases 0: a field near
    zero, yet with a gradient (an all-zero head would have none and stay there).
    """
    parts = []
    for i, (n_in, n_out) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False)):
        key, sub = jax.random.split(key)
        if i == len(WIDTHS) - 2:
            parts.append(1e-5 * jax.random.normal(sub, (n_out * n_in,)))
        else:
            bound = (6 / ((1 + LEAK**2) * n_in)) ** 0.5
            shape = (n_out * n_in,)
            parts.append(jax.random.uniform(sub, shape, minval=-bound, maxval=bound))
    return jnp.concatenate([*parts, jnp.zeros(sum(WIDTHS[1:]))])


def apply_head(e: jax.Array, omega: jax.Array) -> jax.Array:
    """Three 1x1x1 layers with generated kernels for one sample (eq. 5).

    Args:
        e: [X, Y, Z, 8] features.
        omega: [171] all weights first, each layer (out, in), then all biases.

    Returns:
        [X, Y, Z, 3] field in [-1, 1] units.
    """
    weight_at, bias_at = 0, NUM_WEIGHTS
    for i, (n_in, n_out) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False)):
        weight = omega[weight_at : weight_at + n_out * n_in].reshape(n_out, n_in)
        bias = omega[bias_at : bias_at + n_out]
        weight_at, bias_at = weight_at + n_out * n_in, bias_at + n_out
        e = jnp.einsum("xyzi,oi->xyzo", e, weight)
        e = e + jnp.broadcast_to(bias, e.shape)
        if i < len(WIDTHS) - 2:
            e = nn.leaky_relu(e, LEAK)
    return e


class Head(nn.Module):
    """Controller (one dense layer) and the head it generates."""

    @nn.compact
    def __call__(
        self, features: jax.Array, cond: tuple[jax.Array, jax.Array], *, train: bool
    ) -> jax.Array:
        """Maps E [B, X, Y, Z, 8] and cond (region [B], pair_type [B]) to a field.

        Returns:
            [B, X, Y, Z, 3] in [-1, 1] units.
        """
        del train
        pooled = nn.relu(nn.GroupNorm(num_groups=WIDTHS[0], name="pool_norm")(features))
        pooled = pooled.mean(axis=(1, 2, 3))
        conditioning = jnp.concatenate([pooled, encode_condition(*cond)], axis=-1)
        omega = nn.Dense(
            NUM_GENERATED,
            kernel_init=nn.initializers.zeros,
            bias_init=lambda key, shape, dtype=None: base_head(key),
            name="controller",
        )(conditioning)
        return jax.vmap(apply_head)(features, omega)
