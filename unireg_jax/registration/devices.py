"""Which device computes, as the user asked; never another one in silence."""

import os

import jax

from unireg_jax.errors import USAGE, UserError

_NO_BACKEND = (RuntimeError, AssertionError)  # of jax.devices


def use_device(name: str = "auto", *, allow_cpu: bool = False) -> str:
    """Makes JAX compute on a device; called by `main` functions, before any work.

    Args:
        name: "auto" for JAX's own choice, an accelerator where there is one; "cpu";
            "gpu"; or "gpu:N", the N-th of them from 0.
        allow_cpu: take the CPU where the GPU asked for is not there.

    Returns:
        What is used: "cpu:0", "gpu:1".

    Raises:
        ValueError: another name.
        UserError: `device`, exit code 2: the GPU is not there.
    """
    kind, _, number = name.partition(":")
    known = kind == "gpu" or name in ("auto", "cpu")
    if not known or (":" in name and not (number.isascii() and number.isdecimal())):
        raise ValueError(f"device must be auto, cpu, gpu or gpu:N, got {name!r}")
    if name == "auto":
        return _named(default_device())
    found, why = _devices(kind)
    if int(number or 0) >= len(found) and kind == "gpu" and allow_cpu:
        found, number = _devices("cpu")[0], ""
    if int(number or 0) >= len(found):
        there = sorted({d.platform for d in _all()})
        seen = f"{len(found)} of them" if found else f"only {', '.join(there)}{why}"
        raise UserError(
            "device",
            f"--device {name}: that GPU expected, got {seen}; install "
            "unireg-jax[cuda12] and a driver, or pass --allow-cpu or --device auto",
            USAGE,
        )
    chosen = found[int(number or 0)]
    jax.config.update("jax_default_device", chosen)
    return _named(chosen)


def default_device() -> jax.Device:
    """The device that JAX computes on by default."""
    chosen = jax.config.jax_default_device
    return chosen if isinstance(chosen, jax.Device) else _all(chosen)[0]


def _devices(kind: str) -> tuple[list[jax.Device], str]:
    """Devices of one kind, and why there are none."""
    try:
        return jax.devices(kind), ""
    except _NO_BACKEND as error:
        return [], f" ({_line(error)})"


def _all(kind: str | None = None) -> list[jax.Device]:
    """What JAX computes on; where it cannot start, what it was told is amiss."""
    try:
        return jax.devices(kind)
    except _NO_BACKEND as error:
        told = os.environ.get("JAX_PLATFORMS")
        remedy = f"JAX_PLATFORMS is {told}; unset it" if told else "see `unireg doctor`"
        raise UserError(
            "device",
            f"device: one that JAX can use expected, got none ({_line(error)}); "
            f"{remedy}",
            USAGE,
        ) from error


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:120]


def _named(device: jax.Device) -> str:
    return f"{device.platform}:{device.id}"


def describe_devices() -> list[dict[str, object]]:
    """Lists the devices that JAX sees.

    Returns:
        platform, id, kind, and memory_gib where the device says it.
    """
    found = []
    for device in _all():
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        found.append(
            {
                "platform": device.platform,
                "id": device.id,
                "kind": device.device_kind,
                "memory_gib": None if limit is None else round(limit / 2**30, 1),
            }
        )
    return found
