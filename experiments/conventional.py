"""Conventional registration tools, each from two images on one grid to a field.

    python -m experiments.conventional NAME FOLDER THREADS

is what experiments/compare_peers.py starts, a process per pair, so that seconds and
memory are the tool's own: no JAX in here. FOLDER holds fixed.nii.gz and moving.nii.gz
on one grid, air where there is no scan, and masks of where there is; field.npz and
measured.json are written there.

Every function of `PEERS` imports what it needs and returns another, which registers
once, from the two files to a displacement in memory, x -> x + disp_mm(x), x in LPS mm.
It raises ImportError where the tool is missing.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from unireg_jax.imaging import grids, mapping, nifti
from unireg_jax.imaging.grids import Field, Grid
from unireg_jax.tasks import OUTSIDE_HU

FIXED, MOVING = "fixed.nii.gz", "moving.nii.gz"
MASKS = ("fixed_mask.nii.gz", "moving_mask.nii.gz")
FIELD, MEASURED = "field.npz", "measured.json"
_AIR_HU = np.int16(mapping.AIR_HU)
_ROUNDING_VOXELS = 1e-3  # of places that a tool interpolated in float32
# As its documentation has it; without -wp 0 its fields are rounded to 0.1 voxel.
GREEDY = "-m NCC 2x2x2 -n 100x50x10 -wp 0"


class Peer(NamedTuple):
    """A tool.

    Attributes:
        prepare: folder, threads -> what registers once.
        settings: how, in its own words.
        package: distribution that brings it; None for programs.
        programs: that must be on PATH; the first one tells its version.
    """

    prepare: Callable[[Path, int], Callable[[], Field]]
    settings: str
    package: str | None = None
    programs: tuple[str, ...] = ()


def greedy(folder: Path, threads: int, more: str = "") -> Callable[[], Field]:
    """Greedy: local correlation, three resolutions."""
    from picsl_greedy import Greedy3D

    def run():
        tool = Greedy3D()
        fixed, moving, out = (folder / n for n in (FIXED, MOVING, "greedy.nii.gz"))
        tool.execute(
            f"-d 3 {GREEDY} -i {fixed} {moving} -o {out} -threads {threads} -V 0{more}"
        )
        return mapping.read(out).fields[0]

    return run


def greedy_masked(folder: Path, threads: int) -> Callable[[], Field]:
    """The same, told where the scans end."""
    fixed, moving = (folder / name for name in MASKS)
    return greedy(folder, threads, f" -gm {fixed} -mm {moving}")


def convex_adam(folder: Path, threads: int) -> Callable[[], Field]:
    """convexAdam on MIND features; voxels along the array's axes."""
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt

    torch.set_num_threads(threads)

    def run():
        fixed, moving = (nifti.read_image(folder / n) for n in (FIXED, MOVING))
        images = [torch.from_numpy(v.data.astype(np.float32)) for v in (fixed, moving)]
        disp = convex_adam_pt(*images, device=torch.device("cpu"))
        return from_voxels(disp, fixed.vox2world)

    return run


def ants_syn(folder: Path, threads: int) -> Callable[[], Field]:
    """ANTs SyN with local correlation, otherwise at ANTsPy's defaults."""
    import ants

    del threads  # of ITK, from the environment

    def run():
        fixed, moving = (ants.image_read(str(folder / n)) for n in (FIXED, MOVING))
        found = ants.registration(
            fixed,
            moving,
            type_of_transform="SyNOnly",
            initial_transform="Identity",
            outprefix=str(folder / "ants"),
            syn_metric="CC",
            syn_sampling=4,  # radius, voxels
        )
        (path,) = (p for p in found["fwdtransforms"] if p.endswith("Warp.nii.gz"))
        return mapping.read(path).fields[0]

    return run


def elastix(folder: Path, threads: int) -> Callable[[], Field]:
    """elastix, its default map "bspline"."""
    import itk

    # Its modules are loaded when first named. Threads come from the environment: asked
    # for a number of them, elastix 0.25.4 ended with a segmentation fault.
    _ = itk.ElastixRegistrationMethod, itk.TransformixFilter
    del threads

    def run():
        fixed, moving = (itk.imread(str(folder / n), itk.F) for n in (FIXED, MOVING))
        parameters = itk.ParameterObject.New()
        parameters.AddParameterMap(parameters.GetDefaultParameterMap("bspline"))
        _, found = itk.elastix_registration_method(
            fixed,
            moving,
            parameter_object=parameters,
            log_to_console=False,
        )
        disp = itk.transformix_deformation_field(moving, found)
        disp = np.transpose(itk.array_from_image(disp), (2, 1, 0, 3))
        return Field(disp.astype(np.float32), _grid(folder).vox2world)

    return run


def niftyreg(folder: Path, threads: int) -> Callable[[], Field]:
    """reg_f3d at its defaults."""
    _require("reg_f3d", "reg_resample")

    def run():
        names = (FIXED, MOVING, "cpp.nii.gz", "f3d.nii.gz")
        fixed, moving, points, result = (str(folder / n) for n in names)
        _call(
            ["reg_f3d", "-ref", fixed, "-flo", moving, "-cpp", points]
            + ["-res", result, "-omp", str(threads), "-voff"]
        )
        common = ["reg_resample", "-ref", fixed, "-trans", points, "-inter", "1"]
        return by_coordinates(
            folder,
            lambda image, out: _call(
                [*common, "-flo", image, "-res", out, "-pad", "nan", "-voff"]
            ),
        )

    return run


def deeds(folder: Path, threads: int) -> Callable[[], Field]:
    """deedsBCV at its defaults."""
    _require("deedsBCV", "applyBCVfloat")
    del threads  # of OpenMP, from the environment

    def run():
        names = (FIXED, MOVING, "deeds")
        fixed, moving, out = (str(folder / n) for n in names)
        _call(["deedsBCV", "-F", fixed, "-M", moving, "-O", out])
        return by_coordinates(
            folder,
            lambda image, warped: _call(
                ["applyBCVfloat", "-M", image, "-O", out, "-D", warped]
            ),
        )

    return run


PEERS = {
    "greedy": Peer(greedy, GREEDY, "picsl_greedy"),
    "greedy with masks": Peer(greedy_masked, f"{GREEDY} -gm -mm", "picsl_greedy"),
    "convexAdam": Peer(convex_adam, "MIND, its defaults", "convexadam"),
    "ANTs SyN": Peer(ants_syn, "SyNOnly, CC radius 4, 40x20x0", "antspyx"),
    "elastix": Peer(elastix, 'default map "bspline"', "itk-elastix"),
    "NiftyReg": Peer(
        niftyreg, "reg_f3d, its defaults", None, ("reg_f3d", "reg_resample")
    ),
    "deeds": Peer(deeds, "deedsBCV, its defaults", None, ("deedsBCV", "applyBCVfloat")),
}


def version(peer: Peer) -> str | None:
    """Version of a tool, of one that has none its digest; None if not installed."""
    if peer.package:
        try:
            return importlib.metadata.version(peer.package)
        except importlib.metadata.PackageNotFoundError:
            return None
    if not all(shutil.which(name) for name in peer.programs):
        return None
    said = subprocess.run(
        [peer.programs[0], "--version"], capture_output=True, text=True, check=False
    )
    # The whole answer: numbers stand in a help text, too.
    if number := re.fullmatch(r"\D*(\d+\.[\d.]+)\s*", said.stdout):
        return number[1]
    programs = b"".join(Path(shutil.which(p)).read_bytes() for p in peer.programs)
    return f"sha256 {hashlib.sha256(programs).hexdigest()[:8]}"


# --- conventions --------------------------------------------------------------------


def from_voxels(disp: np.ndarray, vox2world: np.ndarray) -> Field:
    """Field of a displacement in voxels along the array's axes.

    Args:
        disp: [X, Y, Z, 3] float, voxels of its own grid.
        vox2world: [4, 4], voxel -> LPS mm.

    Returns:
        Field.
    """
    return Field((disp @ vox2world[:3, :3].T).astype(np.float32), vox2world)


def by_coordinates(folder: Path, warp: Callable[[str, str], Any]) -> Field:
    """Field of a tool whose files need not be understood.

    It warps three images whose values are the places of their own voxels, so the
    results say where it reads. Beyond them they say nothing: NaN, or the border again.

    Args:
        folder: with the pair's images, which have one grid, its axes along LPS.
        warp: path of an image in the moving scan's place, path of the result.

    Returns:
        Field; where the tool read beyond the images, or at their outermost voxels, that
        of the nearest voxel where it did not. Zero or a cut would be counted as folds.

    Raises:
        ValueError: it read nothing but what lies beyond.
    """
    grid = _grid(folder)
    places = grids.positions(grid, slice(None)).reshape(3, *grid.shape)
    disp = np.empty((*grid.shape, 3), np.float32)
    beyond = np.zeros(grid.shape, bool)
    for axis, values in enumerate(places):
        image, out = (folder / f"{n}{axis}.nii.gz" for n in ("place", "read"))
        values = values.astype(np.float32)
        nifti.write_volume(image, values, grid.vox2world)
        warp(str(image), str(out))
        read = _values(out)
        disp[..., axis] = read - values
        margin = _ROUNDING_VOXELS * abs(grid.vox2world[axis, axis])
        inside = (read > values.min() + margin) & (read < values.max() - margin)
        beyond |= ~inside
    if beyond.all():
        raise ValueError("a warped image must show some of it, got nothing but border")
    nearest = ndimage.distance_transform_edt(
        beyond, return_distances=False, return_indices=True
    )
    return Field(disp[tuple(nearest)], grid.vox2world)


def _values(path: Path) -> np.ndarray:
    """Voxels of an image on the pair's grid, NaN allowed."""
    import nibabel as nib

    return np.asarray(nib.load(path).dataobj, np.float32)


def _grid(folder: Path) -> Grid:
    return mapping.grid_of(nifti.read_image(folder / FIXED))


def _require(*programs: str) -> None:
    for name in programs:
        if not shutil.which(name):
            raise ImportError(f"{name} is not on PATH")


def _call(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"{words[0]}: exit code {done.returncode}: {last}")


# --- one measured run ---------------------------------------------------------------


def write_pair(
    folder: Path, fixed: np.ndarray, moving: np.ndarray, vox2world: np.ndarray
) -> None:
    """Writes two images on one grid, and their masks, for `register`.

    Args:
        folder: exists.
        fixed: [X, Y, Z] int16 HU; OUTSIDE_HU, where there is no scan, becomes air.
        moving: [X, Y, Z] the same, pre-aligned.
        vox2world: [4, 4], voxel -> LPS mm.
    """
    for name, mask, image in zip((FIXED, MOVING), MASKS, (fixed, moving), strict=True):
        nifti.write_volume(folder / name, np.maximum(image, _AIR_HU), vox2world)
        nifti.write_volume(folder / mask, image != OUTSIDE_HU, vox2world)


def register(name: str, folder: Path, threads: int) -> None:
    """Registers the pair of a folder with a tool, and measures that."""
    folder = folder.resolve()
    run = PEERS[name].prepare(folder, threads)
    with contextlib.chdir(folder):  # where some leave files of their own
        found, measured = measure(run)
    write_result(folder, found, measured)


def write_result(
    folder: Path,
    field: Field,
    measured: dict[str, float],
    affine: np.ndarray | None = None,
) -> None:
    """Writes what `read_result` reads; `affine` replaces the pair's own."""
    more = {} if affine is None else {"affine": affine}
    np.savez(folder / FIELD, disp_mm=field.disp_mm, vox2world=field.vox2world, **more)
    (folder / MEASURED).write_text(json.dumps(measured))


def read_result(
    folder: Path,
) -> tuple[Field, np.ndarray | None, dict[str, float]]:
    """Field, affine (None for the pair's own) and measures of a run."""
    with np.load(folder / FIELD) as found:
        field = Field(found["disp_mm"], found["vox2world"])
        affine = found["affine"] if "affine" in found else None
    return field, affine, json.loads((folder / MEASURED).read_text())


def measure(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Calls once: seconds of CPU, of this process and its children, and its memory.

    Args:
        run: what to measure.

    Returns:
        What it returned; and start_s, CPU seconds of the process before, cpu_s and
        wall_s of the call, peak_mib, the process's own resident memory at most.
    """
    start, clock = cpu_seconds(), time.perf_counter()
    out = run()
    wall, cpu = time.perf_counter() - clock, cpu_seconds() - start
    return out, {
        "start_s": start,
        "cpu_s": cpu,
        "wall_s": wall,
        "peak_mib": peak_mib(),
    }


def hold_to(threads: int) -> None:
    """Binds this process and its children to so many of its cores.

    Not every tool can be told: XLA takes as many threads as it has cores.
    """
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        cores = sorted(os.sched_getaffinity(0))
        first = os.getpid() % len(cores)  # not the same for two runs side by side
        os.sched_setaffinity(0, (cores[first:] + cores[:first])[:threads])


def cpu_seconds() -> float:
    """User and system seconds of this process and of its ended children."""
    used = (
        resource.getrusage(who)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return sum(one.ru_utime + one.ru_stime for one in used)


def peak_mib() -> float:
    """Most resident memory of this process, or of its largest child."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes or KiB
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit
    try:
        # ru_maxrss counts what the starting process held before this one's program was
        # loaded.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        own = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10
    except OSError:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return max(own, child)


def main() -> None:
    name, folder, threads = sys.argv[1:]
    for variable in ("OMP_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
        os.environ[variable] = threads  # before a library is loaded
    hold_to(int(threads))
    register(name, Path(folder), int(threads))


if __name__ == "__main__":
    main()
