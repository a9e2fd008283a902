"""Instance optimisation: a few Adam steps on one pair, on top of any displacement.

The correction lives on a coarser grid than the network's and is smoothed in every step,
as in SAMConvex (Z. Li et al., MICCAI 2023) and convexAdam; the network's parameters are
not touched. One compiled loop; features are computed before it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unireg_jax.models import features
from unireg_jax.models.features import Extractor
from unireg_jax.ops import intensity, jacobian, ncc, resample, smoothness, warp
from unireg_jax.registration.compiled import Described, check_shape
from unireg_jax.registration.embedding import load_extractor
from unireg_jax.registration.network import Model

# Where each similarity is measured: voxels of the network's grid per voxel of its own.
LEVELS = {"mind": 2, "sam": 2, "image": 1}
# HU that "image" compares. A correlation within windows needs no contrast of its own,
# and the network's -800 HU as the lowest would leave the vessels of a lung out.
HU_RANGE = (-1000.0, 1500.0)
_LEAST_DETJ = 0.3  # a margin above 0, where a map folds
# [1, 1, 1] / 3 three times over, SAMConvex's three average pools along one axis.
_KERNEL = (1 / 27, 3 / 27, 6 / 27, 7 / 27, 6 / 27, 3 / 27, 1 / 27)


class Plan(NamedTuple):
    """How to optimise; a static argument, so a change compiles anew.

    Defaults chosen on head-neck scans at 4 mm, see experiments/benchmark_refine.py.

    Attributes:
        iterations: Adam steps; 0 leaves the displacement as it is.
        features: "image", squared local correlation of HU within `HU_RANGE`; "mind" or
            "sam", squared difference of unit feature vectors at half resolution, the
            fine map of models/features.
        smoothness: weight of the whole field's diffusion, of differences in voxels per
            voxel, against a similarity of at most 1. SAMConvex's 1000, on fields in
            [-1, 1] units, is about 1.3 at 96 voxels.
        folding: weight of the mean of max(0, 0.3 - detj) over the correction's grid,
            detj of the whole field there; keeps it from folding. 0 leaves it out.
        lr: learning rate, voxels of the correction's own grid.
        eps: of Adam, against the gradient of the cost's sum over voxels. Of the order
            of that gradient, flat places move less than edges.
        divisor: voxels of the network's grid per voxel of the correction, along an
            axis; a multiple of 2 with "mind" and "sam".
        window: edge of the window of "image", voxels.
    """

    iterations: int = 50
    features: str = "image"
    smoothness: float = 4.0
    folding: float = 10.0
    lr: float = 0.1
    eps: float = 1e-2
    divisor: int = 2
    window: int = 9


class View(NamedTuple):
    """What the cost compares, on its own grid; see `LEVELS`.

    Attributes:
        values: [B, X', Y', Z', C] float32; intensities in [-1, 1], or unit features.
        valid: [B, X', Y', Z', 1] float32, share of the voxel inside the scan.
    """

    values: jax.Array
    valid: jax.Array


class Refined(NamedTuple):
    """Result of `refine`.

    Attributes:
        disp: [B, X, Y, Z, 3] float32, voxels.
        cost_before: [B] float32, no unit; of the start.
        cost_after: [B] float32, never above cost_before.
    """

    disp: jax.Array
    cost_before: jax.Array
    cost_after: jax.Array


def refine(
    disp: jax.Array,
    fixed: View,
    moving: View,
    mask: jax.Array | None = None,
    *,
    plan: Plan,
) -> Refined:
    """Lowers the cost of a displacement by Adam steps on a smooth correction.

    out = disp + upsample(S d),   S the smoothing, d from 0
    cost = 1 - similarity + smoothness * diffusion + folding * mean max(0, 0.3 - detj)
    of the whole displacement

    The cost is that of the correction on the cost's own grid. The best correction seen
    is returned, `disp` itself if none is better.

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels; a network's, or zeros. X, Y, Z multiples
            of plan.divisor.
        fixed: from `view`, B volumes.
        moving: the same, pre-aligned on the fixed grid.
        mask: [B, X, Y, Z] bool, where to compare; None is the whole fixed scan.
        plan: static.

    Returns:
        Refined. No gradient flows through it.

    Raises:
        ValueError: the plan is not as above, or shapes do not fit.
    """
    check_plan(plan)
    level = LEVELS[plan.features]
    _check(disp, fixed, moving, mask, plan)
    disp, fixed, moving = jax.lax.stop_gradient((disp, fixed, moving))
    start = resample.downsample_disp(disp, level) if level > 1 else disp
    coarse = resample.downsample_disp(disp, plan.divisor)
    weight = fixed.valid[..., 0]
    if mask is not None:
        share = mask[..., None].astype(jnp.float32)
        weight = weight * resample.downsample_mean(share, level)[..., 0]
    scanned = jnp.concatenate([moving.values, moving.valid], axis=-1)

    def costs(correction):
        """[B], of a smoothed correction."""
        whole = correction
        if plan.divisor > level:
            whole = resample.upsample_disp(correction, plan.divisor // level)
        whole = start + whole
        likeness = _likeness(fixed.values, moving, scanned, weight, whole, plan)
        cost = 1.0 - likeness + plan.smoothness * smoothness.diffusion(whole)
        if plan.folding:
            detj = jacobian.determinant(coarse + correction)
            narrow = jnp.mean(jnp.maximum(_LEAST_DETJ - detj, 0.0), axis=(1, 2, 3))
            cost = cost + plan.folding * narrow
        return cost

    def summed(correction):
        values = costs(correction)
        return values.sum(), values

    optimizer = optax.adam(plan.lr, eps=plan.eps)
    count = float(np.prod(start.shape[1:4]))

    def step(_, carry):
        d, state, best, least, before = carry
        correction = _smooth(d)
        (_, values), slope = jax.value_and_grad(summed, has_aux=True)(correction)
        best, least = _better(correction, values, best, least)
        before = jnp.where(jnp.isfinite(before), before, values)
        # S is its own adjoint.
        update, state = optimizer.update(_smooth(slope) * count, state)
        return d + update, state, best, least, before

    shape = (*(n // plan.divisor for n in disp.shape[1:4]), 3)
    still = jnp.zeros((disp.shape[0], *shape), jnp.float32)
    none = jnp.full(disp.shape[0], jnp.inf)
    carry = (still, optimizer.init(still), still, none, none)
    d, _, best, least, before = jax.lax.fori_loop(0, plan.iterations, step, carry)
    correction = _smooth(d)
    values = costs(correction)
    best, least = _better(correction, values, best, least)
    before = jnp.where(jnp.isfinite(before), before, values)
    # A start that is not finite has no cost: it stays as it is.
    least = jnp.where(jnp.isfinite(before), least, before)
    return Refined(disp + resample.upsample_disp(best, plan.divisor), before, least)


def view(
    scan: Described, extractor: Extractor, *, plan: Plan, described: bool = False
) -> View:
    """Prepares a described volume for `refine`; traced, as part of a program.

    Args:
        scan: B volumes on the network's grid.
        extractor: of the features that the plan compares; "image" needs none of its
            own.
        plan: static.
        described: the scan's own features are of this extractor, and serve again.

    Returns:
        View on the cost's grid.

    Raises:
        ValueError: see `check_plan`; or the extractor is not of the plan's features.
    """
    check_plan(plan)
    valid = intensity.valid(scan.hu).astype(jnp.float32)
    if plan.features == "image":
        low, high = HU_RANGE
        return View(intensity.window(scan.hu, low=low, high=high), valid)
    if extractor.backend != plan.features:
        raise ValueError(
            f"extractor must be of {plan.features!r}, got {extractor.backend!r}; see "
            "registration.load_extractor"
        )
    maps = scan.features if described else features.describe(scan.hu, extractor)
    return View(maps.fine, resample.downsample_mean(valid, LEVELS[plan.features]))


def check_plan(plan: Plan) -> None:
    """Refuses a plan that cannot be carried out.

    Args:
        plan: see Plan.

    Raises:
        ValueError: unknown features, a number out of range, or a divisor that is no
            multiple of the level of the features.
    """
    if plan.features not in LEVELS:
        raise ValueError(
            f"features must be one of {sorted(LEVELS)}, got {plan.features!r}"
        )
    if plan.iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {plan.iterations}")
    for name in ("lr", "eps"):
        if not 0 < getattr(plan, name) < np.inf:
            raise ValueError(
                f"{name} must be positive, got {getattr(plan, name)}; see Plan"
            )
    for name in ("smoothness", "folding"):
        if not 0 <= getattr(plan, name) < np.inf:
            raise ValueError(f"{name} must be at least 0, got {getattr(plan, name)}")
    if plan.divisor not in (1, 2, 4, 8) or plan.divisor % LEVELS[plan.features]:
        raise ValueError(
            f"divisor must be 1, 2, 4 or 8 and a multiple of {LEVELS[plan.features]} "
            f"with {plan.features!r}, got {plan.divisor}"
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Refiner:
    """`refine` compiled for one grid and plan, from `compile_refine`.

    Attributes:
        plan: as compiled.
        shape: (X, Y, Z) voxels of the grid.
        extractor: of the features that are compared.
    """

    plan: Plan
    shape: tuple[int, int, int]
    extractor: Extractor
    _program: jax.stages.Compiled

    def __call__(
        self, fixed: Described, moving: Described, body: np.ndarray, disp: jax.Array
    ) -> Refined:
        """Optimises the displacement of one pair.

        Args:
            fixed: from `Compiled.describe`.
            moving: from `Compiled.describe`, pre-aligned on the fixed grid.
            body: [X, Y, Z] bool, where to compare.
            disp: [1, X, Y, Z, 3] float32, voxels, from a call of `Compiled`.

        Returns:
            Refined, on the device.

        Raises:
            ValueError: body has another shape or dtype.
        """
        if body.shape != self.shape or body.dtype != bool:
            raise ValueError(
                f"body must be {self.shape} bool, got {body.shape} {body.dtype}"
            )
        body = jax.device_put(body[None])
        return self._program(fixed, moving, self.extractor, body, disp)


def compile_refine(
    model: Model,
    plan: Plan,
    shape: tuple[int, int, int] | None = None,
    *,
    dtype: Any = np.int16,
    extractor: Extractor | None = None,
) -> Refiner:
    """Compiles `refine` for volumes as a model describes them.

    Args:
        model: from `load_model`; its parameters are not read.
        plan: static.
        shape: (X, Y, Z) voxels, multiples of 16; None for the model's grid.
        dtype: of the HU volumes, int16 or float32.
        extractor: of plan.features; None for the model's own, or else the default one
            of that name, see `load_extractor`.

    Returns:
        Refiner.

    Raises:
        ValueError: shape or plan are not as above.
        UserError: no embedding for "sam", exit code 9.
    """
    check_plan(plan)
    shape = check_shape(model.preprocess.shape if shape is None else shape)
    own = model.extractor
    if extractor is None:
        extractor = own
        if plan.features not in ("image", own.backend):
            extractor = load_extractor(plan.features, window=own.window)
    of = jax.ShapeDtypeStruct
    hu = of((1, *shape, 1), dtype)
    scan = Described(hu, jax.eval_shape(features.describe, hu, own))
    program = jax.jit(_refine_described, static_argnames=("plan", "described")).lower(
        scan,
        scan,
        extractor,
        of((1, *shape), bool),
        of((1, *shape, 3), jnp.float32),
        plan=plan,
        described=extractor is own,
    )
    return Refiner(plan, shape, extractor, program.compile())


def _refine_described(fixed, moving, extractor, body, disp, *, plan, described):
    """From volumes as the network's own program has them."""
    views = (
        view(scan, extractor, plan=plan, described=described)
        for scan in (fixed, moving)
    )
    return refine(disp, *views, body, plan=plan)


def _likeness(fixed, moving, scanned, weight, disp, plan):
    """Similarity of the warped moving view, [B], at most 1, 0 without common voxels."""
    if plan.features == "image":
        warped = warp.warp(moving.values, disp)
        reached = jax.lax.stop_gradient(warp.warp(moving.valid, disp))[..., 0]
        inside = reached * warp.inside(disp)
        return ncc.local_ncc(fixed, warped, window=plan.window, mask=weight * inside)
    # One gather of rows for features and validity.
    warped = warp.warp(scanned, disp)
    reached = jax.lax.stop_gradient(warped[..., -1]) * warp.inside(disp)
    # Unit vectors: half the squared difference is 1 - cosine.
    distance = 0.5 * jnp.sum(jnp.square(warped[..., :-1] - fixed), axis=-1)
    share = weight * reached
    total = jnp.sum(share, axis=(1, 2, 3))
    summed = jnp.sum(share * (1.0 - distance), axis=(1, 2, 3))
    return summed / jnp.where(total > 0.0, total, 1.0)


def _smooth(field):
    """Three 3^3 means in one, zeros beyond the border: symmetric in place and weight.

    The barrier keeps XLA from computing the first axes again for each tap of the last.
    """
    half = len(_KERNEL) // 2
    for axis in (1, 2, 3):
        pads = [(half, half) if a == axis else (0, 0) for a in range(field.ndim)]
        padded, size = jnp.pad(field, pads), field.shape[axis]
        taps = (
            weight * jax.lax.slice_in_dim(padded, k, k + size, axis=axis)
            for k, weight in enumerate(_KERNEL)
        )
        field = jax.lax.optimization_barrier(sum(taps))
    return field


def _better(correction, values, best, least):
    """Keeps the cheaper correction of each example; NaN is never cheaper."""
    wins = values < least
    where = jnp.broadcast_to(jnp.expand_dims(wins, (1, 2, 3, 4)), best.shape)
    return jnp.where(where, correction, best), jnp.where(wins, values, least)


def _check(disp, fixed, moving, mask, plan):
    """Shapes of everything, on the network's grid and on the cost's."""
    warp.check_disp(disp)
    grid, level = disp.shape[:4], LEVELS[plan.features]
    if any(n % plan.divisor for n in grid[1:]):
        raise ValueError(
            f"disp must have multiples of {plan.divisor} voxels along each axis, got "
            f"{disp.shape}; pad it or use a smaller divisor"
        )
    expected = (grid[0], *(n // level for n in grid[1:]))
    for name, scan in (("fixed", fixed), ("moving", moving)):
        if scan.values.shape[:4] != expected or scan.valid.shape != (*expected, 1):
            raise ValueError(
                f"{name} must be on {expected}, got {scan.values.shape} and "
                f"{scan.valid.shape}; make it with `view` and the same plan"
            )
    if mask is not None and mask.shape != grid:
        raise ValueError(
            f"mask must be {grid}, got {mask.shape}; drop the channel axis"
        )
