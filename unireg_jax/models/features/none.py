"""No features: the correlation of the images' own 2x2x2 patches."""

import jax
import jax.numpy as jnp

from unireg_jax.ops import resample


def extract(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Patches of intensities at two scales.

    Args:
        image: [B, X, Y, Z, 1] float32 in [-1, 1]; X, Y, Z multiples of 4.

    Returns:
        fine [B, X/2, Y/2, Z/2, 8] and coarse [B, X/4, Y/4, Z/4, 8], float32.
    """
    return _patches(image), _patches(resample.downsample_mean(image, 2))


def _patches(image: jax.Array) -> jax.Array:
    b, x, y, z, _ = image.shape
    cells = image.reshape(b, x // 2, 2, y // 2, 2, z // 2, 2)
    return jnp.transpose(cells, (0, 1, 3, 5, 2, 4, 6)).reshape(
        b, x // 2, y // 2, z // 2, 8
    )
