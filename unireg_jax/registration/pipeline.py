"""One pair of scans -> displacement in mm on the fixed scan's own grid.

Preprocess, pre-align, predict, compose, and back to the original grid. The moving scan
is interpolated once for the network and once for the result, each time from its own
voxels.
"""

import functools
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np

from unireg_jax.errors import NUMERICAL, USAGE, UserError, bad_file
from unireg_jax.imaging import (
    grids,
    mapping,
    nifti,
    orientation,
    preprocess,
    scans,
    transforms,
)
from unireg_jax.imaging.grids import Grid
from unireg_jax.imaging.nifti import Volume
from unireg_jax.ops import resample, warp
from unireg_jax.registration import affine as prealign
from unireg_jax.registration import feature_affine, matcher, prediction, tiles
from unireg_jax.registration import region as regions
from unireg_jax.registration.compiled import (
    Compiled,
    Described,
    compile_register,
    judge_field,
)
from unireg_jax.registration.kept import Kept
from unireg_jax.registration.memory import check_memory
from unireg_jax.registration.network import Model, load_model
from unireg_jax.registration.refine import (
    Plan,
    Refiner,
    check_plan,
    compile_refine,
    steps,
)
from unireg_jax.tasks import OUTSIDE_HU, TASKS, PairType, Region

NO_TASK = "none"
AUTO_TASK = "auto"
AFFINES = ("auto", *prealign.KINDS, "features", "coarse")
_RANGE_MM = 1000.0  # no field between two aligned scans of a body is longer
_COSTS = ("refine_before", "refine_after")
_ARRAYS = (np.ndarray, jax.Array)
_LPS = "voxel -> LPS mm (of nibabel: orientation.lps_from_ras(image.affine))"
_SLAB_VOXELS = 2**21  # native voxels per step, about: 100 MB of scratch
_SLAB_PROGRAMS = 16  # some 4 MiB each, of the last sizes of scans


class Registration(NamedTuple):
    """What `register` found: moving is read at x + disp_mm(x), x in LPS mm.

    Attributes:
        disp_mm: [X, Y, Z, 3] float32, LPS mm; the whole map, pre-alignment included,
            on the grid of `fixed`.
        vox2world: [4, 4] float64, voxel of disp_mm -> LPS mm.
        affine: [4, 4] float64, fixed world -> moving world, LPS mm: the pre-alignment.
        network_disp: [x, y, z, 3] float32, voxels of `network_grid`: the part of the
            network, of "coarse" and of `refine`, which acts before `affine`.
        network_grid: shape and vox2world of the network's grid, or of the finer one
            of `refine`; of all windows, where there are several.
        warped: [X, Y, Z], moving on the grid of `fixed`, in moving's dtype; air (or the
            smallest value, where that is not air) beyond the moving scan.
        settings: task, region, pair_type, affine: asked and used; fov asked and used,
            windows, body_covered, the share of the fixed body on network_grid, and
            seen, the body region that each scan shows; with the network, passes and
            symmetric; with `refine`, its plan.
        qc: of network_disp, on its grid: finite; max_mm_network, p99_mm_network, length
            anywhere; over the fixed body fold_percent_network, sdlogj_network (see
            ops/jacobian.py), ncc_before, ncc_after (global, signed, windowed
            intensities, after the pre-alignment and after network_disp); with `refine`
            also refine_before, refine_after, its cost. None where undefined.
        timings: seconds per stage. compile is that of the network; other stages compile
            in the first pair of a shape.
        warnings: what a person should know of the files and of how it came about, one
            line each.
    """

    disp_mm: np.ndarray
    vox2world: np.ndarray
    affine: np.ndarray
    network_disp: np.ndarray
    network_grid: Grid
    warped: np.ndarray
    settings: dict[str, Any]
    qc: dict[str, Any]
    timings: dict[str, float]
    warnings: tuple[str, ...] = ()


def register(
    fixed: Volume | nib.Nifti1Pair | np.ndarray | str | os.PathLike,
    moving: Volume | nib.Nifti1Pair | np.ndarray | str | os.PathLike,
    *,
    task: str,
    pair_type: str | None = None,
    weights: Model | str | os.PathLike | None = None,
    affine: str | np.ndarray = "auto",
    fixed_mask: np.ndarray | None = None,
    fixed_vox2world: np.ndarray | None = None,
    moving_vox2world: np.ndarray | None = None,
    passes: int = prediction.PASSES,
    symmetric: bool = prediction.SYMMETRIC,
    refine: Plan | None = None,
    fov: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> Registration:
    """Registers two CT scans of any orientation, spacing and size.

    moving is read at y(x) = affine (x + u(x)), u the network's displacement in mm, and
    disp_mm(x) = y(x) - x.

    Args:
        fixed: path of a scan (see imaging/scans.py), Volume, NIfTI image of nibabel,
            image of SimpleITK, or array [X, Y, Z] in HU, of NumPy or JAX. An image is
            read as its file is.
        moving: the same; shape and spacing may differ.
        task: name in tasks.TASKS: anatomical prior, and the usual pair type; "none"
            leaves the network out: pre-alignment, and `refine` from there, on the grid
            and with the features of the weights. "auto": by the body region that both
            scans show, see registration/region.py.
        pair_type: "inter" or "intra"; None for the task's own.
        weights: Model for many pairs; or as in `load_model`.
        affine: "auto", "none", "com", "rigid", "affine", "features", or a [4, 4]
            matrix, fixed world -> moving world, LPS mm. "auto": affine between
            patients; within one none, but rigid (chest: affine) when the scans' centres
            are over 30 mm apart or they share less than 30 % of the smaller one.
            "features": by matched features, see `feature_align` and `load_matcher`.
            "coarse": then also a coarse displacement through the matches, see
            `coarse_align`, on top of which the network acts.
        fixed_mask: [X, Y, Z] bool on the grid of `fixed`: where scans are compared, in
            pre-alignment and quality control; the body by default. Of a file or Volume
            along LPS+ axes, as `scans.read_labels` gives it; of an image along its own,
            x, y, z.
        fixed_vox2world: [4, 4], voxel -> LPS mm; with arrays only. nibabel's affine
            leads to RAS mm: `orientation.lps_from_ras(image.affine)`.
        moving_vox2world: [4, 4], voxel -> LPS mm; with arrays only.
        passes: how often the network acts, 1 to 8, each time on the moving scan as
            warped so far; the paper has 1, and task "none" takes no other.
        symmetric: whether each pass averages the map there with the inverse of the map
            back, see registration/prediction.py; the paper's does not. Not with task
            "none".
        refine: instance optimisation of the network's field; None for none.
        fov: what the network looks at where the fixed body is larger than its window:
            "crop", "tiles", "whole" or "auto", see `tiles.lay_out`.
        progress: called with one line per stage.

    Returns:
        Registration, on the grid of `fixed`: the own axes of an array or image,
        otherwise the LPS+ axes of the Volume. No array of it is one of the caller's.

    Raises:
        ValueError: shapes, names or numbers that do not fit.
        UserError: a file that cannot be read, a Volume with NaN or infinity, scans
            without common space (exit code 4), task "auto" and scans that do not tell
            it (exit code 2), weights that cannot be used (exit code 9), scans larger
            than the memory that is free (exit code 7), a field that is not finite or
            longer than 1 m (exit code 8).
    """
    say = progress or (lambda line: None)
    clock = Clock()
    target = as_volume(fixed, fixed_vox2world, "fixed")
    source = as_volume(moving, moving_vox2world, "moving")
    settings = check_settings(task, pair_type, affine)
    asked = (passes, symmetric)
    if task == NO_TASK and asked != (prediction.PASSES, prediction.SYMMETRIC):
        raise ValueError(
            "passes and symmetric need a network, got them with task 'none'; name a "
            "task"
        )
    mask = own_mask(fixed_mask, fixed, target)
    clock.lap("read")
    model = weights if isinstance(weights, Model) else load_model(weights)
    clock.lap("weights")

    session = Session(
        model,
        passes=passes,
        symmetric=symmetric,
        refine=refine,
        network=task != NO_TASK,
        fov=fov,
    )
    clock.lap("compile")
    result = session.run(
        target, source, settings, affine=affine, mask=mask, say=say, clock=clock
    )
    if not _has_own_axes(fixed):
        return result
    return result._replace(
        disp_mm=nifti.to_native(result.disp_mm, target),
        warped=nifti.to_native(result.warped, target),
        vox2world=target.native.vox2world,
    )


class Session:
    """A model with its compiled programs, and what its last scans had in common.

    A scan is known by the identity of its Volume: its network grid, its image there and
    its features are made once while it keeps coming back; a mask is read anew. `run`
    may be called from several threads: host work runs side by side, the device serves
    one at a time.
    """

    def __init__(
        self,
        model: Model,
        *,
        keep: int = 4,
        passes: int = prediction.PASSES,
        symmetric: bool = prediction.SYMMETRIC,
        refine: Plan | None = None,
        network: bool = True,
        fov: str = "auto",
    ):
        """Compiles the model for its own grid.

        Args:
            model: from `load_model`.
            keep: scans remembered: their voxels, their image and its features.
            passes, symmetric: of the network, see `register`.
            refine: instance optimisation of every pair; None for none.
            network: False for pairs of task "none" only.
            fov: see `register`.

        Raises:
            ValueError: see `refine.check_plan` and `register`; an unknown fov.
        """
        passes = prediction.check(passes)
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        if refine is not None:
            check_plan(refine)
        if fov not in tiles.FOVS:
            raise ValueError(f"fov must be one of {tiles.FOVS}, got {fov!r}")
        self.model = model
        self._plan, self._network, self._fov = refine, network, fov
        self._passes, self._symmetric = passes, symmetric
        self.refiner: Refiner | None = None
        if refine is not None and refine.iterations:
            self.refiner = compile_refine(model, refine)
        self.programs = compile_register(model, network=network)
        self._device = threading.Lock()
        self._grids, self._bodies, self._described, self._read, self._seen = (
            Kept(keep) for _ in range(5)
        )
        # A window of `finer` has many times the voxels.
        self._fine, self._fine_bodies = Kept(1), Kept(1)
        self._larger = Kept(1)
        self._slabs = Kept(_SLAB_PROGRAMS)
        self._matcher = matcher.Matcher(
            model, self._device, keep=keep, describe=self._describe
        )

    def read(self, scan: Volume | str | os.PathLike) -> Volume:
        """Reads a file, or finds the Volume that it gave before.

        Args:
            scan: see imaging/scans.py; a Volume is returned as it is.

        Returns:
            Volume.

        Raises:
            ValueError: neither a path nor a Volume.
            UserError: the file is not a readable 3-D image; the same one for every
                pair that names it.
        """
        if isinstance(scan, Volume):
            return scan
        if not isinstance(scan, (str, os.PathLike)):
            raise ValueError(
                "fixed and moving of a pair must be a path or Volume, got "
                f"{type(scan).__name__}; pass its file, or registration.as_volume("
                f"scan, vox2world, name): vox2world None for an image, else {_LPS}"
            )
        key = os.path.realpath(scan)
        return self._read.get(key, lambda: scans.read_scan(scan))

    def run(
        self,
        target: Volume,
        source: Volume,
        settings: dict[str, str],
        *,
        affine: str | np.ndarray = "auto",
        mask: np.ndarray | None = None,
        clock: "Clock",
        say: Callable[[str], None] = lambda line: None,
    ) -> Registration:
        """Registers two volumes; `register` says how.

        Args:
            target: fixed, on LPS+ axes.
            source: moving, on LPS+ axes.
            settings: from `check_settings`.
            affine: see `register`.
            mask: [X, Y, Z] bool on target's LPS+ axes, or None.
            clock: gets one lap per stage.
            say: called with one line per stage.

        Returns:
            Registration on the grid of `target`.

        Raises:
            ValueError, UserError: see `register`.
        """
        check_memory(target.data.shape, source.data.shape)
        pair = self.prepare(
            target, source, settings, affine=affine, mask=mask, clock=clock, say=say
        )
        layout, settings, warnings = pair.layout, pair.settings, list(pair.warnings)
        size = "x".join(map(str, layout.window))
        what = "none" if settings["region"] is None else settings["region"]
        count = f"{len(layout.starts)} windows of " if len(layout.starts) > 1 else ""
        how = ""
        if settings["region"] is not None:
            settings |= {"passes": self._passes, "symmetric": self._symmetric}
            how = f", {self._passes} passes" if self._passes > 1 else ""
            how += ", both ways" if self._symmetric else ""
        say(f"network: {what}, {count}{size}, {settings['pair_type']}-patient{how}")
        if self.refiner:
            plan = self.refiner.plan
            settings = settings | {"refine": plan._asdict()}
            if plan.features == "sam":
                settings |= {"refined_by": self.refiner.extractor.label}
                known = self.refiner.extractor.spacing_mm
                own = tuple(s / plan.finer for s in self.model.preprocess.spacing_mm)
                if known not in (None, own):
                    warnings.append(
                        f"refinement: voxels of {known} mm expected, as the embedding "
                        f"was trained on, the grid has {own}"
                    )
            counts = [str(count) for _, count in steps(plan, layout.window)]
            say(f"refinement: {plan.features}, {' + '.join(counts)} steps")
        pair = pair._replace(settings=settings)
        programs, refiner = self._programs_for(layout.window)
        disp = self._predicted(pair, programs, say)
        clock.lap("network")
        fine = self._finer(pair, source, mask)
        clock.lap("preprocess")
        costs = {}
        if refiner:
            with self._device:
                if len(layout.starts) == 1:
                    disp, found = self._refined(fine, programs, refiner, disp)
                else:
                    disp, found = self._refined_windows(pair, fine, disp, say)
            costs, doubts = _costs(found)
            warnings += doubts
            clock.lap("refine")
        with self._device:
            disp, scores = jax.device_get((disp, self._judge(programs, fine, disp)))
        disp, scores = disp[0], {k: float(v[0]) for k, v in scores.items()} | costs
        grid, matrix = fine.layout.grid, pair.matrix
        qc = _quality(disp, scores, orientation.spacing_mm(grid.vox2world))
        clock.lap("quality")

        size = "x".join(map(str, target.data.shape))
        say(f"field and warped image on the fixed grid: {size}")
        with self._device:
            disp_mm, warped = _to_native(
                target, source, matrix, disp, grid, self._slabs
            )
        clock.lap("native")
        return Registration(
            disp_mm,
            # Others keep theirs: the caller, and this session.
            target.vox2world.copy(),
            matrix,
            disp,
            grid._replace(vox2world=grid.vox2world.copy()),
            warped,
            settings,
            qc,
            clock.seconds(),
            tuple(warnings),
        )

    def prepare(
        self,
        target: Volume,
        source: Volume,
        settings: dict[str, str],
        *,
        affine: str | np.ndarray = "auto",
        mask: np.ndarray | None = None,
        clock: "Clock",
        say: Callable[[str], None] = lambda line: None,
    ) -> "Prepared":
        """Brings two volumes onto the network's grid, pre-aligned.

        Args:
            target, source, settings, affine, mask, clock, say: see `run`.

        Returns:
            Prepared.

        Raises:
            ValueError, UserError: see `register`.
        """
        if mask is not None:
            _check_mask(mask, target.data.shape)
        for name, scan in (("fixed", target), ("moving", source)):
            _check_extent(scan.path or name, scan.data, scan.vox2world)
        _check_finite(fixed=target, moving=source)
        spec = self.model.preprocess
        settings, lines = self._resolve(target, source, settings, say)
        warnings = nifti.told_of({"fixed": target, "moving": source}) + lines
        clock.lap("region")
        layout, fixed_hu = self._on_own_grid(target)
        grid = layout.grid
        settings |= {
            "fov": self._fov,
            "fov_used": layout.fov,
            "windows": len(layout.starts),
            "body_covered": round(layout.covered, 4),
        }
        body = _body(self._bodies, mask, target, grid, fixed_hu)
        clock.lap("preprocess")
        matrix, used, why = _choose(target, source, settings, affine)
        coarse = None
        if used in ("features", "coarse"):
            found, matched_by = self._matcher.align(target, source, mask)
            settings = settings | {"matched_by": matched_by}
            if used == "coarse" and found.kind == "features":
                if why_not := feature_affine.coarse_fault(found):
                    warnings.append(f"pre-alignment: coarse: {why_not}; affine alone")
                else:
                    with self._device:
                        coarse = feature_affine.coarse_align(
                            found, grid.vox2world, shape=grid.shape
                        )
                        # Its seconds are those of the pre-alignment.
                        coarse = jax.block_until_ready(coarse)
            matrix = found.matrix
            used = found.kind if coarse is None else "coarse"
            why = f"{why}: {found.fit.points} matches, {found.fit.kind} map"
            if found.warning:
                warnings.append(f"pre-alignment: {found.warning}")
        elif matrix is None:
            other, image = self._on_own_grid(source)
            with self._device:
                matrix = prealign.affine_align(
                    fixed_hu,
                    image,
                    fixed_vox2world=grid.vox2world,
                    moving_vox2world=other.grid.vox2world,
                    kind=used,
                    fixed_mask=None if mask is None else body,
                )
        settings = settings | {"affine_used": used}
        say(f"pre-alignment: {used} ({why})")
        clock.lap("affine")

        moving_hu = preprocess.prepare_image(source, grid, spec, matrix=matrix)
        clock.lap("preprocess")
        reached = moving_hu != OUTSIDE_HU
        if not (reached & (fixed_hu != OUTSIDE_HU)).any():
            raise UserError(
                "no_overlap",
                "fixed and moving: scans that share some space expected, none shared "
                f"after pre-alignment {used!r}; use --affine com or affine",
            )
        if not (reached & body).any():
            what = "body" if mask is None else "mask"
            warnings.append(
                f"overlap: nothing of the fixed {what} is in the moving scan"
            )
        for name, hu in (("fixed", fixed_hu), ("moving", moving_hu)):
            if why_not := preprocess.contrast_fault(hu):
                warnings.append(f"contrast: {name}: {why_not}")
        return Prepared(
            target,
            layout,
            fixed_hu,
            moving_hu,
            body,
            matrix,
            coarse,
            settings,
            tuple(warnings),
        )

    def _resolve(self, target, source, settings, say) -> tuple[dict, list[str]]:
        """The task, where it is to be found, and whether the scans agree with it."""
        settings = dict(settings)
        if settings["task"] == NO_TASK:
            return settings, []
        volumes = {"fixed": target, "moving": source}
        seen = {name: self.seen(volume) for name, volume in volumes.items()}
        settings["seen"] = {name: one.record() for name, one in seen.items()}
        if settings["task"] == AUTO_TASK:
            given = settings["pair_type"]
            task = regions.choose_task(list(seen.values()), given)
            kept = {"affine": settings["affine"], "task_asked": AUTO_TASK}
            settings |= check_settings(task, given, "auto") | kept
            why = "; ".join(f"{name} {one.why}" for name, one in seen.items())
            say(f"task: auto: {task}, {settings['pair_type']}-patient ({why})")
            return settings, []
        told = (
            (name, regions.mismatch(one, settings["region"]))
            for name, one in seen.items()
        )
        return settings, [f"task: {name}: {line}" for name, line in told if line]

    def seen(self, volume: Volume) -> regions.Seen:
        """Says which part of the body a scan shows.

        Args:
            volume: on LPS+ axes.

        Returns:
            Seen, kept while the scan comes back.
        """
        return self._seen.get(
            id(volume), lambda: regions.estimate_region(volume), volume
        )

    def _describe(self, volume, hu) -> Described:
        """Features of a scan on its own grid, kept while it comes back."""
        return self._described.get(
            id(volume), lambda: self.programs.describe(hu), volume
        )

    def _on_own_grid(self, volume: Volume) -> tuple[tiles.Layout, np.ndarray]:
        """The network's windows over a scan, and the scan's image on their grid."""

        def lay():
            spec = self.model.preprocess
            layout = tiles.lay_out(volume, spec, self._fov)
            return layout, preprocess.prepare_image(volume, layout.grid, spec)

        return self._grids.get(id(volume), lay, volume)

    def _finer(self, pair, source, mask) -> "Prepared":
        """The pair on the grid of the refinement, its own or a finer one."""
        if self.refiner is None or self.refiner.plan.finer == 1:
            return pair
        layout = pair.layout.finer(self.refiner.plan.finer)
        spec, target = self.model.preprocess, pair.target

        fixed_hu = self._fine.get(
            id(target),
            lambda: preprocess.prepare_image(target, layout.grid, spec),
            target,
        )
        body = _body(self._fine_bodies, mask, target, layout.grid, fixed_hu)
        moving_hu = preprocess.prepare_image(
            source, layout.grid, spec, matrix=pair.matrix
        )
        return pair._replace(
            layout=layout, fixed_hu=fixed_hu, moving_hu=moving_hu, body=body
        )

    def _programs_for(self, shape) -> tuple[Compiled, Refiner | None]:
        """Programs for one window; a larger one than usual is compiled now."""
        if shape == self.programs.shape:
            return self.programs, self.refiner

        def build():
            programs = compile_register(
                self.model,
                shape,
                network=self._network,
                unit_shape=self.model.preprocess.shape,
            )
            refiner = None
            if self.refiner:
                refiner = compile_refine(self.model, self._plan, shape)
            return programs, refiner

        return self._larger.get(shape, build)

    def _predicted(self, pair, programs, say) -> prediction.Field:
        """Displacement before refinement, [1, X, Y, Z, 3]."""
        layout = pair.layout
        if pair.settings["region"] is None:
            if pair.coarse is not None:
                return pair.coarse
            return jnp.zeros((1, *layout.grid.shape, 3), jnp.float32)
        codes = [
            Region[pair.settings["region"].upper()],
            PairType[pair.settings["pair_type"].upper()],
        ]

        def in_window(fixed, moving):
            there = programs(fixed, moving, *codes)
            if not self._symmetric:
                return there
            back = programs(moving, fixed, *codes)
            return jax.jit(prediction.mean_of_ways)(there, back)

        def in_one(fixed, _, moving_hu):
            return in_window(fixed, programs.describe(moving_hu))

        def in_windows(number, moving_hu):
            # The device holds one window at a time: the fixed scan's, too, are
            # described anew in every pass.
            blend = tiles.Blend(layout)
            for k, start in enumerate(layout.starts, 1):
                which = f"pass {number}: " if self._passes > 1 else ""
                say(f"network: {which}window {k} of {len(layout.starts)}")
                part = layout.part(start)
                fixed, moving = (
                    programs.describe(np.ascontiguousarray(hu[part]))
                    for hu in (pair.fixed_hu, moving_hu)
                )
                blend.add(start, np.asarray(in_window(fixed, moving)[0]))
            return blend.disp[None]

        with self._device:
            one_pass = in_windows
            if len(layout.starts) == 1:
                fixed = self._described_fixed(pair, programs)
                one_pass = functools.partial(in_one, fixed)
            return prediction.in_passes(
                pair.moving_hu, one_pass, passes=self._passes, start=pair.coarse
            )

    def _described_fixed(self, pair, programs) -> Described:
        """Features of a fixed scan in one window, kept where that is the usual one."""
        if programs is self.programs:
            return self._describe(pair.target, pair.fixed_hu)
        return programs.describe(pair.fixed_hu)

    def _refined(self, fine, programs, refiner, disp):
        """Displacement on the grid of `fine`, [1, X, Y, Z, 3], and its cost."""
        if refiner.described:
            fixed = self._described_fixed(fine, programs)
            scans = fixed, programs.describe(fine.moving_hu)
        else:
            scans = _undescribed(fine.fixed_hu, fine.moving_hu)
        disp, *cost = jax.block_until_ready(refiner(*scans, fine.body, disp))
        return disp, [(*(float(c[0]) for c in cost), 1.0)]

    def _refined_windows(self, pair, fine, disp, say):
        """The same, blended from overlapping windows of the usual size.

        And of each that holds body the cost before and after, and how much.
        """
        programs, refiner, disp = self.programs, self.refiner, np.asarray(disp)
        blend, costs = tiles.Blend(fine.layout), []
        windows = zip(pair.layout.starts, fine.layout.starts, strict=True)
        for number, (start, fine_start) in enumerate(windows, 1):
            say(f"refinement: window {number} of {len(pair.layout.starts)}")
            part = fine.layout.part(fine_start)
            body = np.ascontiguousarray(fine.body[part])
            found = jnp.asarray(disp[(slice(None), *pair.layout.part(start))])
            if body.any():
                scans = (fine.fixed_hu[part], fine.moving_hu[part])
                if refiner.described:
                    scans = (programs.describe(np.ascontiguousarray(s)) for s in scans)
                else:
                    scans = _undescribed(*scans)
                found, *cost = refiner(*scans, body, found)
                costs.append((*(float(c[0]) for c in cost), float(body.sum())))
            else:
                found = resample.upsample_disp(found, refiner.plan.finer)
            blend.add(fine_start, np.asarray(found[0]))
        return blend.disp[None], costs

    def _judge(self, programs, pair, disp) -> dict[str, jax.Array]:
        """Scores of a displacement on the pair's grid, [1] each."""
        if disp.shape[1:4] == programs.shape:
            scans = _undescribed(pair.fixed_hu, pair.moving_hu)
            return programs.judge(*scans, pair.body, jnp.asarray(disp))
        spec = self.model.preprocess
        return judge_field(
            pair.fixed_hu,
            pair.moving_hu,
            pair.body,
            disp[0],
            window=(spec.hu_low, spec.hu_high),
        )


class Prepared(NamedTuple):
    """A pair on the network's grid.

    Attributes:
        target: fixed Volume.
        layout: windows of the network, and the grid of what follows.
        fixed_hu, moving_hu: [X, Y, Z] int16, moving pre-aligned.
        body: [X, Y, Z] bool, where to compare.
        matrix: [4, 4] float64, fixed world -> moving world, LPS mm.
        coarse: [1, X, Y, Z, 3] displacement in voxels found by matching, or None.
        settings: see `check_settings`; what was used.
        warnings: one line each.
    """

    target: Volume
    layout: tiles.Layout
    fixed_hu: np.ndarray
    moving_hu: np.ndarray
    body: np.ndarray
    matrix: np.ndarray
    coarse: Any
    settings: dict[str, Any]
    warnings: tuple[str, ...]


def _costs(found) -> tuple[dict[str, float], list[str]]:
    """Mean cost over the windows, by how much body each holds, and what to warn of."""
    # Without anything in common the similarity is 0.
    compared = [one for one in found if one[:2] != (1.0, 1.0)]
    doubts = []
    if len(compared) < len(found):
        some = f"{len(found) - len(compared)} of {len(found)} windows: "
        doubts.append(
            f"refinement: {some if len(found) > 1 else ''}nothing to compare: in the "
            "fixed body no piece of the moving scan is large enough, or nothing has "
            "contrast; the displacement is as before there"
        )
    if not found:
        return {}, doubts
    *both, weight = np.array(compared or found).T
    means = (float((cost * weight).sum() / weight.sum()) for cost in both)
    return dict(zip(_COSTS, means, strict=True)), doubts


def _undescribed(*images: np.ndarray) -> tuple[Described, ...]:
    """Volumes on the device, without features."""
    return tuple(
        Described(jax.device_put(np.ascontiguousarray(hu)[None, ..., None]), None)
        for hu in images
    )


def residual_mm(registration: Registration, *, copy: bool = True) -> np.ndarray:
    """Gives the map without its pre-alignment: u in y = affine (x + u(x)).

    u(x) = A^-1 (disp_mm(x) - (affine x - x)), A the linear part of affine

    Args:
        registration: from `register`.
        copy: False: where the pre-alignment is the identity, disp_mm itself.

    Returns:
        [X, Y, Z, 3] float32, LPS mm, on the grid of disp_mm; an array of its own.
    """
    matrix = registration.affine
    if np.array_equal(matrix, np.eye(4)):
        return registration.disp_mm.copy() if copy else registration.disp_mm
    inverse = np.linalg.inv(matrix[:3, :3])
    rigid = (matrix - np.eye(4)) @ registration.vox2world
    out = np.empty_like(registration.disp_mm)
    shape = out.shape[:3]

    def work(part: slice) -> None:
        shift = grids.positions(Grid(shape, rigid), part)
        vectors = registration.disp_mm[part].reshape(-1, 3).T - shift
        out[part] = (inverse @ vectors).T.reshape(out[part].shape)

    grids.slabs(work, shape, None)
    return out


class Clock:
    """Seconds per stage, in the order of their first lap; waiting counts."""

    def __init__(self):
        self._start = self._last = time.perf_counter()
        self._stages: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._stages[stage] = self._stages.get(stage, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        total = {"total": self._last - self._start}
        return {k: round(v, 3) for k, v in (self._stages | total).items()}


def as_volume(scan, vox2world, name) -> Volume:
    """Makes a Volume on LPS+ axes of whatever the caller has.

    Args:
        scan: path, Volume, image (see `scans.is_image`), or array [X, Y, Z] in HU, of
            NumPy or JAX.
        vox2world: [4, 4], voxel -> LPS mm, of an array; else None.
        name: for messages.

    Returns:
        Volume; that of an array has a copy of its grid.

    Raises:
        ValueError: none of these, an array without grid, not 3-D, not of real numbers
            or not finite; a grid that is singular, or with a file or image.
        UserError: the file or image cannot be read; `fov`, `spacing`: no volume of a
            body.
    """
    if isinstance(scan, _ARRAYS):
        scan = np.asarray(scan)
        if vox2world is None:
            raise ValueError(
                f"{name}_vox2world must be (4, 4) for an array, got None; pass it, "
                f"{_LPS}"
            )
        if scan.ndim != 3 or not scan.size:
            raise ValueError(
                f"{name} must be (X, Y, Z) in HU, got {scan.shape}; drop batch and "
                "channel"
            )
        if scan.dtype.kind not in "iuf":
            raise ValueError(
                f"{name} must be real numbers, HU, got {scan.dtype}; "
                "pass the scan itself"
            )
        if not np.isfinite(scan).all():
            raise ValueError(
                f"{name} must be finite, got NaN or infinity; use -1000 HU"
            )
        vox2world = transforms.check_affine(vox2world, f"{name}_vox2world").copy()
        data, turned = orientation.reorient(scan, vox2world)
        _check_extent(name, data, turned)
        return Volume(data, turned, native=nifti.Native(scan.shape, vox2world))
    held = scans.is_image(scan)
    if not held and not isinstance(scan, (Volume, str, os.PathLike)):
        raise ValueError(
            f"{name} must be a path, Volume, image of nibabel (NIfTI) or SimpleITK, or "
            f"array (X, Y, Z) in HU, got {type(scan).__name__}; pass its file, or its "
            f"array and {name}_vox2world, {_LPS}"
        )
    if vox2world is not None:
        raise ValueError(f"{name}_vox2world must be None: the file has its own")
    if held:
        return scans.take_image(scan, name)
    if isinstance(scan, Volume):
        transforms.check_affine(scan.vox2world, f"vox2world of {name}")
        return scan
    return scans.read_scan(scan)


def _check_extent(name, data, vox2world) -> None:
    """As readers of files do: no grid has a voxel in a slice thinner than its own."""
    if data.ndim == 3:
        spacing = np.array(orientation.spacing_mm(vox2world))
        nifti.check_extent(name, data.shape, spacing)


def check_settings(
    task: str, pair_type: str | None, affine: str | np.ndarray
) -> dict[str, str]:
    """Says what was asked for, in names.

    Args:
        task, pair_type, affine: see `register`.

    Returns:
        task, region (None without a network, and with "auto" until the scans are seen),
        pair_type, affine ("given" for a matrix).

    Raises:
        UserError: unknown task or pair type, exit code 2.
        ValueError: unknown name of a pre-alignment.
    """
    if task not in (*TASKS, NO_TASK, AUTO_TASK):
        raise UserError(
            "task_unknown",
            f"task must be one of {sorted(TASKS)}, {AUTO_TASK!r} or {NO_TASK!r}, got "
            f"{task!r}",
            USAGE,
        )
    kinds = [kind.name.lower() for kind in PairType]
    if pair_type is not None and pair_type not in kinds:
        raise UserError(
            "task_unknown", f"type must be one of {kinds}, got {pair_type!r}", USAGE
        )
    if isinstance(affine, str) and affine not in AFFINES:
        raise ValueError(f"affine must be one of {AFFINES} or (4, 4), got {affine!r}")
    named = TASKS.get(task)
    usual = PairType.INTER if named is None else named.pair_type
    if task != AUTO_TASK:  # which says it with the task
        pair_type = pair_type or usual.name.lower()
    return {
        "task": task,
        "region": None if named is None else named.region.name.lower(),
        "pair_type": pair_type,
        "affine": affine if isinstance(affine, str) else "given",
    }


def own_mask(mask, fixed, target) -> np.ndarray | None:
    """Brings a mask onto the axes of the fixed Volume.

    Args:
        mask: [X, Y, Z] bool on the grid of `fixed`, or None.
        fixed: as the caller has it, see `register`.
        target: Volume that `as_volume` made of it.

    Returns:
        [X, Y, Z] bool on target's LPS+ axes, or None.

    Raises:
        ValueError: of another shape than an array or image `fixed`.
    """
    if mask is None or not _has_own_axes(fixed):
        return mask
    _check_mask(mask, target.native.shape)
    return orientation.reorient(mask, target.native.vox2world)[0]


def _has_own_axes(scan) -> bool:
    """Whether the caller sees its voxels: then masks and results lie along them."""
    return isinstance(scan, _ARRAYS) or scans.is_image(scan)


def _check_mask(mask, shape) -> None:
    if mask.shape != shape:
        raise ValueError(
            f"fixed_mask must be {shape} like fixed, got {mask.shape}; resample it "
            "first"
        )


def _check_finite(**volumes) -> None:
    """Refuses NaN and infinity, which would pass for water on the network's grid."""
    for name, volume in volumes.items():
        data = volume.data
        if not np.issubdtype(data.dtype, np.inexact):
            continue
        if not np.isfinite((data.min(), data.max())).all():  # no mask of a large scan
            raise bad_file(
                volume.path or name,
                "nonfinite",
                "finite voxels",
                "NaN or infinity",
                "replace them with air (-1000 HU)",
            )


def _body(kept, mask, target, grid, hu) -> np.ndarray:
    """Where to compare; a mask may be changed in place, so only the body is kept."""

    def make():
        return matcher.body(mask, target, grid, hu)

    return kept.get(id(target), make, target) if mask is None else make()


def _choose(target, source, settings, affine):
    """The pre-alignment: matrix (None when it is to be found), its kind, and why."""
    if not isinstance(affine, str):
        matrix = np.array(affine, np.float64)
        # Products and powers of matrices leave a rounded last row.
        if matrix.shape == (4, 4) and np.allclose(matrix[3], [0, 0, 0, 1], atol=1e-9):
            matrix[3] = 0, 0, 0, 1
        transforms.check_affine(matrix, "affine")
        if abs(np.linalg.det(matrix[:3, :3])) < 1e-6:  # no reader of it would take it
            raise ValueError(f"affine must be invertible, got {matrix.tolist()}")
        return matrix, "given", "as given"
    kind, why = affine, "as asked"
    if kind == "auto":
        boxes = [
            prealign.scan_box(v.vox2world, (0, 0, 0), np.array(v.data.shape) - 1)
            for v in (target, source)
        ]
        kind, why = prealign.choose_kind(
            *boxes,
            region=settings["region"] and Region[settings["region"].upper()],
            pair_type=PairType[settings["pair_type"].upper()],
        )
        why = f"auto: {why}"
    return np.eye(4) if kind == "none" else None, kind, why


def _quality(disp, scalars, spacing) -> dict[str, Any]:
    """QC numbers; refuses a field that no file may hold."""
    if not np.isfinite(disp).all():
        count = int((~np.isfinite(disp)).any(axis=-1).sum())
        raise UserError(
            "field_nonfinite",
            f"the network's field: finite vectors expected, got {count} of "
            f"{disp[..., 0].size} with NaN or infinity; check the two scans and the "
            "weights",
            NUMERICAL,
        )
    length = np.sqrt(sum(np.square(disp[..., i] * spacing[i]) for i in range(3)))
    longest = float(length.max())
    if longest > _RANGE_MM:
        raise UserError(
            "field_range",
            f"the network's field: vectors within {_RANGE_MM:g} mm expected, got "
            f"{longest:.4g} mm; check the two scans and the weights",
            NUMERICAL,
        )
    qc = {
        "finite": True,
        "max_mm_network": longest,
        "p99_mm_network": float(np.percentile(length, 99)),
        **scalars,
    }
    return {k: None if v != v else v for k, v in qc.items()}


def _to_native(target, source, matrix, disp, grid, programs):
    """Total displacement in mm and the warped image, both on target's grid.

    y = M (x + u), hence y - x = (M - I) x + A u, which keeps float32 exact where world
    coordinates are large.
    """
    shape = target.data.shape
    to_moving = np.linalg.inv(source.vox2world) @ matrix
    to_grid = np.linalg.inv(grid.vox2world) @ target.vox2world
    spread = matrix[:3, :3] @ grid.vox2world[:3, :3]
    place = (
        to_grid,
        (matrix - np.eye(4)) @ target.vox2world,
        spread,
        to_moving @ target.vox2world,
        np.linalg.inv(source.vox2world)[:3, :3] @ spread,
        np.array(source.data.shape) - 0.5,
    )
    place = tuple(np.asarray(m, np.float32) for m in place)
    wide = tuple(_bucket(n, 32) for n in shape[1:])
    slabs = -(-shape[0] * wide[0] * wide[1] // _SLAB_VOXELS)
    slab = (_bucket(-(-shape[0] // slabs), 8), *wide)
    # Repeating the edge changes nothing within the outer faces.
    pads = [(0, _bucket(n, 32) - n) for n in source.data.shape]
    padded = np.pad(source.data, pads, mode="edge")
    given = (
        jnp.asarray(disp[None]),
        jnp.asarray(padded[None, ..., None], jnp.float32),
        place,
        np.float32(mapping.fill_of(source.data)),
    )
    # Not `jax.jit` alone, which would keep the programs of all sizes there ever were.
    step = programs.get(
        (slab, padded.shape, disp.shape),
        lambda: (
            jax.jit(_slab, static_argnames="shape")
            .lower(*given, np.float32(0), shape=slab)
            .compile()
        ),
    )
    whole = np.issubdtype(source.data.dtype, np.integer)
    disp_mm = np.empty((*shape, 3), np.float32)
    warped = np.empty(shape, source.data.dtype)
    # A slab may reach beyond the volume, so that all have one shape. The device makes
    # the next one while this one is copied.
    made = step(*given, np.float32(0))
    for start in range(0, shape[0], slab[0]):
        ready, here = made, slice(start, min(start + slab[0], shape[0]))
        if here.stop < shape[0]:
            made = step(*given, np.float32(here.stop))
        inside = (slice(here.stop - start), slice(shape[1]), slice(shape[2]))
        field, image = (np.asarray(x)[inside] for x in ready)
        disp_mm[here] = field
        warped[here] = np.rint(image) if whole else image
    return disp_mm, warped


def _bucket(count: int, step: int) -> int:
    """Next multiple: scans of nearly the same size share a program."""
    return -(-count // step) * step


def _slab(disp, moving, place, fill, start, *, shape):
    """Total displacement in mm and warped image of one slab of native slices."""
    to_grid, rigid, spread, to_moving, turn, limit = place
    coords = warp.identity_coords(shape) + jnp.broadcast_to(
        jnp.stack([start, jnp.zeros_like(start), jnp.zeros_like(start)]), (*shape, 3)
    )
    # Beyond the network's grid its outermost vector holds.
    u = warp.sample(disp, _apply(to_grid, coords)[None])[0]
    read = _apply(to_moving, coords) + _apply(turn, u)
    return _apply(rigid, coords) + _apply(spread, u), _read(moving, read, limit, fill)


def _read(moving, coords, limit, fill):
    """Moving image at voxel positions [..., 3], `fill` beyond its outer faces."""
    limit = jnp.broadcast_to(limit, coords.shape)
    inside = jnp.all((coords >= -0.5) & (coords <= limit), axis=-1)
    image = warp.sample(moving, coords[None])[0, ..., 0]
    return jnp.where(inside, image, fill)


def _apply(matrix, vectors):
    """Matrix, 3 x 3 or homogeneous, times vectors [..., 3], in full precision."""
    out = jnp.einsum(
        "...j,ij->...i", vectors, matrix[:3, :3], precision=jax.lax.Precision.HIGHEST
    )
    if matrix.shape == (4, 4):
        out = out + jnp.broadcast_to(matrix[:3, 3], out.shape)
    return out
