"""Two scans and released parameters -> displacement."""

import importlib

_HOME = {
    "Model": "network",
    "load_model": "network",
    "device": "network",
    "use_device": "devices",
    "default_device": "devices",
    "describe_devices": "devices",
    "self_test": "selftest",
    "cache_root": "compilation_cache",
    "load_extractor": "embedding",
    "compile_register": "compiled",
    "Outcome": "batch",
    "Pair": "batch",
    "register_many": "batch",
    "export_register": "export",
    "Plan": "refine",
    "Registration": "pipeline",
    "Session": "pipeline",
    "Clock": "pipeline",
    "check_memory": "memory",
    "check_settings": "pipeline",
    "register": "pipeline",
    "as_volume": "pipeline",
    "residual_mm": "pipeline",
    "Sweep": "sweeps",
    "sweep": "sweeps",
    "Seen": "region",
    "estimate_region": "region",
    "mismatch": "region",
    "choose_task": "region",
    "use_compilation_cache": "compilation_cache",
}


def __dir__() -> list[str]:
    return sorted(_HOME)


def __getattr__(name: str):
    # On first use, so that listing weights does not wait for JAX.
    if name in _HOME:
        module = importlib.import_module(f"{__name__}.{_HOME[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
