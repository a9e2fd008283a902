"""Static head: the twin of `dynamic` without generated kernels (Table 6, ablation).

Same pre-head, same three 1x1x1 layers, same start; the kernels are parameters and the
condition is ignored.
"""

import flax.linen as nn
import jax

from unireg_jax.models.conditioning import dynamic


class Head(nn.Module):
    """One head for every task."""

    @nn.compact
    def __call__(
        self, features: jax.Array, cond: tuple[jax.Array, jax.Array], *, train: bool
    ) -> jax.Array:
        """Maps E [B, X, Y, Z, 8] to a field [B, X, Y, Z, 3] in [-1, 1] units."""
        del cond, train
        omega = self.param("kernels", dynamic.base_head)
        return jax.vmap(lambda e: dynamic.apply_head(e, omega))(features)
