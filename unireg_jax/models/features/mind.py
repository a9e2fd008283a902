"""MIND self-similarity as a learning-free feature backend (UniReg, section 5)."""

import jax
import jax.numpy as jnp

from unireg_jax.ops import mind, resample


def extract(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Descriptors at two scales, centred so that a cosine tells them apart.

    MIND is positive everywhere; without its mean removed, every cosine is near 1.

    Args:
        image: [B, X, Y, Z, 1] float32 in [-1, 1]; X, Y, Z multiples of 4.

    Returns:
        fine [B, X/2, Y/2, Z/2, 12] and coarse [B, X/4, Y/4, Z/4, 12], float32.
    """
    half = resample.downsample_mean(image, 2)
    quarter = resample.downsample_mean(half, 2)
    return _centred(half), _centred(quarter)


def _centred(image: jax.Array) -> jax.Array:
    descriptor = mind.mind_ssc(image, radius=1, dilation=1)
    mean = descriptor.mean(axis=-1, keepdims=True)
    return descriptor - jnp.broadcast_to(mean, descriptor.shape)
