"""Two scans and released parameters -> displacement."""


def __getattr__(name: str):
    # On first use, so that listing weights does not wait for JAX.
    if name in ("register", "load_model", "residual_mm", "Model", "Registration"):
        from unireg_jax.registration import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
