"""Conditioning schemes: one file each, one row here, nothing else to edit."""

from unireg_jax.models.conditioning import dynamic, static

HEADS = {"dynamic": dynamic.Head, "static": static.Head}
