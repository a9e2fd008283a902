"""`unireg doctor`: is this installation whole, and does it compute right?"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unireg_jax import registration
from unireg_jax.errors import CHECKPOINT, PARTLY, UserError
from unireg_jax.registration import weights
from unireg_jax.verbs import options, versions
from unireg_jax.verbs.messages import one_line, progress

HELP = "checks versions, devices and weights, and registers a test pair"

SCHEMA = 1
EXAMPLES = """examples:
  unireg doctor
  unireg doctor --quick --json

Exit code 0 when nothing is broken; a warning breaks nothing.
"""
OK, WARN, FAIL = "ok", "warning", "broken"
# Extra -> its package, and what it is for.
EXTRAS = {
    "itk": ("SimpleITK", "reads NRRD and MetaImage"),
    "dicom": ("pydicom", "reads DICOM series"),
    "report": ("matplotlib", "draws pictures and reports"),
    "eval": ("surface_distance", "surface metrics of another make, for comparison"),
    "export": ("flatbuffers", "writes the network as StableHLO"),
    "ray": ("ray", "shares a list of pairs out to a cluster"),
}
_BROKEN_JAX = "0.10.2"  # wrong numbers of a jitted vmap of 3 x 3 products, on CPUs
_LEAST_GIB = 4.0
_LEAST_FREE_GIB = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    text = (
        "Checks versions, devices, weights, the cache of compiled programs, memory and "
        "optional packages, and registers a small body to itself, moved by 25 mm."
    )
    parser.description = textwrap.fill(text, 79)
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--quick", action="store_true", help="without the test registration"
    )
    options.add_weights(parser)
    options.add_device(parser)
    options.add_messages(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    say = progress(args.quiet)
    say("versions, weights, memory")
    checks = [
        _versions(),
        *_network(args.weights),
        _file(
            "embedding", weights.default_embedding, "sam", weights.EMBEDDING_VARIABLE
        )[0],
        _memory(),
        *_extras(),
    ]
    say("devices")
    try:
        registration.describe_devices()
    except UserError as error:  # nothing can be computed
        checks.append(_check("devices", FAIL, str(error), reason=error.reason))
    else:
        options.use_device(args)
        checks += [_devices(), _cache()]
        if not args.quick:
            say("test registration, some 20 s")
            checks.append(_self_test(args.weights))
    broken = [check["name"] for check in checks if check["status"] == FAIL]
    if args.json:
        report = {"schema": SCHEMA, "healthy": not broken, "checks": checks}
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        width = max(len(check["name"]) for check in checks)
        for check in checks:
            name = check["name"].ljust(width)
            print(f"{check['status']:8} {name}  {check['told']}")
    sys.stdout.flush()
    verdict = f"broken: {', '.join(broken)}" if broken else "nothing is broken"
    say(verdict)
    return PARTLY if broken else 0


def _check(name: str, status: str, told: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "status": status, "told": one_line(told), **more}


def _versions() -> dict[str, Any]:
    found = {name: versions.version(name) for name in versions.PACKAGES}
    python = ".".join(map(str, sys.version_info[:3]))
    told = f"unireg {versions.version()}, Python {python}"
    told += "".join(f", {name} {number}" for name, number in found.items())
    status = OK
    if found["jax"] == _BROKEN_JAX or found["jaxlib"] == _BROKEN_JAX:
        told, status = f"{told}: jax {_BROKEN_JAX} computes wrong numbers", FAIL
    if "not installed" in found.values():
        status = FAIL
    return _check("versions", status, told, python=python, packages=found)


def _network(named: str | None) -> list[dict[str, Any]]:
    """Of the network's file, and of the embedding it was trained on, if on one."""
    check, spec = _file("weights", lambda: weights.find_weights(named), "unireg")
    if spec.get("features") != "sam":
        return [check]
    path = weights.find_weights(named)
    return [check, _file("features", lambda: weights.find_own(spec, path), "sam")[0]]


def _file(
    name: str, find: Callable[[], Path], kind: str, variable: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file of parameters: there, of its kind, its digest the one it came with.

    Returns:
        The check; the file's description, empty when it is broken.
    """
    try:
        path = find()
        _, spec = weights.load_weights(path)
        if (got := spec.get("kind", "unireg")) != kind:
            line = f"{path.name}: parameters of kind {kind!r} expected, got {got!r}"
            raise UserError("checkpoint_other", line, CHECKPOINT)
    except UserError as error:
        named = f"${variable}: " if os.environ.get(variable) else ""
        return _check(name, FAIL, f"{named}{error}", reason=error.reason), {}
    told = f"{path.name}, sha256 {spec['sha256'][:16]}..., verified"
    return _check(name, OK, told, file=path.name, sha256=spec["sha256"]), spec


def _memory() -> dict[str, Any]:
    """Of the machine, as far as the system says."""
    try:
        page = os.sysconf("SC_PAGE_SIZE") / 2**30
        total = os.sysconf("SC_PHYS_PAGES") * page
        free = os.sysconf("SC_AVPHYS_PAGES") * page
    except (AttributeError, ValueError, OSError):
        return _check("memory", OK, "the system does not say")
    status = WARN if total < _LEAST_GIB else OK
    told = (
        f"{total:.1f} GiB, {free:.1f} GiB of them unused, {os.cpu_count()} processors"
    )
    if status == WARN:
        told += f"; {_LEAST_GIB:g} GiB are needed for scans of usual size"
    return _check("memory", status, told, total_gib=round(total, 1))


def _extras() -> list[dict[str, Any]]:
    checks = []
    for extra, (package, purpose) in EXTRAS.items():
        there = importlib.util.find_spec(package) is not None
        told = (
            purpose if there else f"absent: {purpose}: pip install unireg-jax[{extra}]"
        )
        checks.append(_check(f"extra {extra}", OK, told, installed=there))
    return checks


def _devices() -> dict[str, Any]:
    found, used = registration.describe_devices(), registration.device()
    told = "; ".join(
        f"{d['platform']}:{d['id']} {d['kind']}"
        + (f" {d['memory_gib']} GiB" if d["memory_gib"] else "")
        for d in found
    )
    told = f"{told}; used: {used['platform']}"
    idle = shutil.which("nvidia-smi") and all(d["platform"] == "cpu" for d in found)
    if idle:
        told += (
            "; an NVIDIA driver, and JAX without CUDA: pip install unireg-jax[cuda12]"
        )
    return _check("devices", WARN if idle else OK, told, devices=found, used=used)


def _cache() -> dict[str, Any]:
    folder = registration.use_compilation_cache()
    if folder is None:
        told = "no folder of yours: every start compiles anew; set UNIREG_CACHE"
        return _check("compilation cache", WARN, told)
    try:
        files = [p.stat().st_size for p in folder.glob("*") if p.is_file()]
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:  # of $JAX_COMPILATION_CACHE_DIR, which JAX makes when used
        told = f"{folder.name}: {error.strerror}: made when JAX first compiles"
        return _check("compilation cache", WARN, told)
    told = f"{len(files)} files, {sum(files) / 2**20:.0f} MiB, {free:.1f} GiB free"
    status = WARN if free < _LEAST_FREE_GIB else OK
    return _check("compilation cache", status, told, files=len(files))


def _self_test(path: str | None) -> dict[str, Any]:
    try:
        found = registration.self_test(registration.load_model(path))
    except UserError as error:
        return _check("test registration", FAIL, str(error), reason=error.reason)
    told = (
        f"{found['error_mm']:.2f} mm from the known answer (at most "
        f"{found['expected_mm']:g}), {found['seconds']:.0f} s"
    )
    return _check("test registration", OK if found["passed"] else FAIL, told, **found)
