"""Instance optimisation: a pair's own similarity, followed from any displacement.

The greedy algorithm (Yushkevich et al., greedy; the optimiser of ANTs' "greedy SyN" and
of its like): in every step the gradient of the similarity is smoothed, scaled to a
fixed length and composed with the displacement, which is smoothed in turn, on a
pyramid of grids. The network's parameters are not touched. Not the paper's "UniReg +
IO" (Table 3): docs/paper.md.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unireg_jax.models import features
from unireg_jax.models.features import Extractor
from unireg_jax.ops import intensity, mind, ncc, resample, smoothness, stencil, warp
from unireg_jax.registration.compiled import Described, check_shape
from unireg_jax.registration.embedding import load_extractor
from unireg_jax.registration.memory import check_program
from unireg_jax.registration.network import Model

# Where each similarity is measured: voxels of the network's grid per voxel of its own.
LEVELS = {"mind": 1, "sam": 2, "image": 1}
# HU that "image" compares, each range by itself. The network's -800 HU as the lowest
# would leave the vessels of a lung out; and where a window holds bone or air, they
# alone decide about its correlation, unless soft tissue is looked at apart.
HU_RANGES = ((-1000.0, 1500.0), (-150.0, 250.0))
# Of "mind", which is for other scans, too: no upper end but that of their grid.
_MIND_RANGE = (-1000.0, 32767.0)
# A grid coarser than a quarter is added while it has so many voxels along each axis: on
# the grids of 384 mm, voxels of 16 mm, where one vertebra is not taken for the next.
_LEAST_VOXELS = 20
_LEAST_FACTOR = 4
MOST_SMOOTHNESS = 20.0  # passes over the field in every step
FINER = (1, 2, 4)  # voxels of the grid of `refine` per voxel of the network's
# Edges of the boxes that smooth a step, one after another: a Gaussian of 1.6 voxels.
_STEP_BOXES = (5, 3)
_FIELD_BOX = 3
# Edge of the cube about a descriptor, voxels of its own grid, that must be in the scan:
# air beyond an end describes nothing. It is all that "mind" is made of, a patch and
# those beside it; "sam" sees further, but what is near decides.
_REACH = 5


class Plan(NamedTuple):
    """How to optimise; a static argument, so a change compiles anew.

    Defaults chosen on head-neck scans at 4 mm, see experiments/benchmark_refine.py.

    Attributes:
        iterations: steps on the second of three or more grids; twice as many before on
            the coarsest, a fifth after on the full one, which "sam" does not reach,
            see `steps`. 0 leaves the displacement as it is.
        features: "image", squared local correlation of HU, the mean over `HU_RANGES`;
            "mind", squared difference of unit self-similarities, for scans of unlike
            contrasts; "sam" the same of the embedding, down to half resolution, the
            fine map of models/features.
        smoothness: how often the displacement becomes the mean of its 3^3 neighbours in
            every step; a fraction counts in part. 1 is a Gaussian of 0.8 voxels.
        step: greatest length of a step, voxels of its grid.
        window: edge of the window of "image", voxels of its grid.
        finer: voxels of the finest grid per voxel of the network's, along each axis; of
            `FINER`. The grid of the result.
    """

    iterations: int = 50
    features: str = "image"
    smoothness: float = 0.5
    step: float = 0.5
    window: int = 3
    finer: int = 1


class View(NamedTuple):
    """What the cost compares, on its own grid; see `LEVELS` and `Plan.finer`.

    Attributes:
        values: [B, X', Y', Z', C] float32; intensities in [-1, 1], of each range of
            `HU_RANGES`, or unit features.
        valid: [B, X', Y', Z', 1] float32, share of the voxel inside the scan.
    """

    values: jax.Array
    valid: jax.Array


class Refined(NamedTuple):
    """Result of `refine`.

    Attributes:
        disp: [B, f X, f Y, f Z, 3] float32, voxels; f is `Plan.finer`.
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
    """Follows the similarity of a pair from a displacement to a better one.

    u <- S2 (s + u(x + s)),   s = step * S1 g / max |S1 g|

    g is the gradient of the similarity, S1 and S2 are box means, u the whole
    displacement on the grid of a level; what it gained there is up-sampled and added to
    the finer start. Steps well below the smoothing make folds rare; nothing forbids
    them. The result is compared with the start on the finest grid, and the start kept
    unless the result is better.

    cost = 1 - similarity, its mean where the whole window or descriptor lies in both
    scans: air beyond an end is not matched, and what lies there follows by smoothing
    alone. On grids where the fixed scan is too thin for any, all windows count. Where
    nothing counts, as in a moving scan of 3 voxels or less, nothing moves.

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels; a network's, or zeros. X, Y, Z multiples
            of 4; f below is `plan.finer`.
        fixed: from `view`, B volumes of [f X, f Y, f Z] voxels.
        moving: the same, pre-aligned on the fixed grid.
        mask: [B, f X, f Y, f Z] bool, where to compare; None is the whole fixed scan.
        plan: static.

    Returns:
        Refined. No gradient flows through it.

    Raises:
        ValueError: the plan is not as above, or shapes do not fit.
    """
    check_plan(plan)
    finest = LEVELS[plan.features]
    disp = resample.upsample_disp(disp, plan.finer)
    _check(disp, fixed, moving, mask, finest, plan.finer)
    disp, fixed, moving = jax.lax.stop_gradient((disp, fixed, moving))
    if plan.features != "image":
        fixed, moving = _described(fixed, moving)
    weight = None
    if mask is not None:
        weight = mask[..., None].astype(jnp.float32)

    gain, before = None, 0
    for factor, count in _pyramid(plan, disp.shape[1:4]):
        start = resample.downsample_disp(disp, factor)
        whole = start
        if gain is not None:
            whole = start + resample.upsample_disp(gain, before // factor)
        costs = _costs_at(factor, finest, fixed, moving, weight, plan)
        whole = jax.lax.fori_loop(0, count, _stepper(costs, plan), whole)
        gain, before = whole - start, factor

    cost_before, cost_after = costs(start), costs(whole)
    # Neither a start without a cost nor an end no better: NaN is below nothing.
    better = cost_after < cost_before
    gain = resample.upsample_disp(gain, finest)
    where = jnp.broadcast_to(jnp.expand_dims(better, (1, 2, 3, 4)), disp.shape)
    return Refined(
        jnp.where(where, disp + gain, disp),
        cost_before,
        jnp.where(better, cost_after, cost_before),
    )


def steps(plan: Plan, shape: Sequence[int]) -> list[tuple[float, int]]:
    """Says on which grids `refine` works, coarsest first, and how long.

    Args:
        plan: see Plan.
        shape: (X, Y, Z) voxels of the network's grid.

    Returns:
        Voxels of that grid per voxel of the level, along an axis, and steps there: 2,
        1, 0.4 for all between, and 0.2 times `plan.iterations`. 100, 50 and 10 at
        96x96x80, 100, 50, 20 and 10 at 192x192x160 or with `plan.finer` 2; of "sam"
        not the last.
    """
    fine = tuple(plan.finer * n for n in shape)
    return [(factor / plan.finer, count) for factor, count in _pyramid(plan, fine)]


def _pyramid(plan, shape):
    """`steps`, by voxels of the finest grid."""
    coarsest = _LEAST_FACTOR * plan.finer
    while all(
        n % (2 * coarsest) == 0 and n // (2 * coarsest) >= _LEAST_VOXELS for n in shape
    ):
        coarsest *= 2
    factors = [coarsest]
    while factors[-1] > 1:
        factors.append(factors[-1] // 2)
    shares = (2.0, 1.0, *[0.4] * (len(factors) - 3), 0.2)
    return [
        (factor, math.ceil(share * plan.iterations))
        for factor, share in zip(factors, shares, strict=True)
        if factor >= LEVELS[plan.features]
    ]


def view(
    scan: Described, extractor: Extractor, *, plan: Plan, described: bool = False
) -> View:
    """Prepares a described volume for `refine`; traced, as part of a program.

    Args:
        scan: B volumes on the finest grid of the plan.
        extractor: of the embedding that "sam" compares; the others read none.
        plan: static.
        described: the scan's own features are of this extractor, and serve again.

    Returns:
        View on the cost's grid.

    Raises:
        ValueError: see `check_plan`; or for "sam" the extractor is of others.
    """
    check_plan(plan)
    valid = intensity.valid(scan.hu).astype(jnp.float32)
    if plan.features == "image":
        parts = [
            intensity.window(scan.hu, low=low, high=high) for low, high in HU_RANGES
        ]
        return View(jnp.concatenate(parts, axis=-1), valid)
    if plan.features == "mind":
        low, high = _MIND_RANGE
        image = intensity.window(scan.hu, low=low, high=high)
        # Neighbours two voxels away tell less: of a grid of 4 mm they are 8 mm apart.
        found = mind.mind_ssc(image, radius=1, dilation=1)
        return View(features.normalize(found), valid)
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
        ValueError: unknown features, or a number out of range.
    """
    if plan.features not in LEVELS:
        raise ValueError(
            f"features must be one of {sorted(LEVELS)}, got {plan.features!r}"
        )
    for name in ("iterations", "window", "finer"):
        if not isinstance(getattr(plan, name), int):
            raise ValueError(f"{name} must be an int, got {getattr(plan, name)!r}")
    if plan.iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {plan.iterations}")
    if not 0 < plan.step < np.inf:
        raise ValueError(f"step must be positive, got {plan.step}; see Plan")
    if plan.window < 3 or plan.window % 2 == 0:
        raise ValueError(f"window must be odd and at least 3, got {plan.window}")
    if plan.finer not in FINER:
        raise ValueError(f"finer must be one of {FINER}, got {plan.finer}")
    if not 0 <= plan.smoothness <= MOST_SMOOTHNESS:
        raise ValueError(
            f"smoothness must be 0 to {MOST_SMOOTHNESS}, got {plan.smoothness}"
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Refiner:
    """`refine` compiled for one grid and plan, from `compile_refine`.

    Attributes:
        plan: as compiled.
        shape: (X, Y, Z) voxels of the grid where scans are compared.
        extractor: of the embedding that "sam" compares; the others read none.
        described: whether it compares those of `Compiled.describe`.
    """

    plan: Plan
    shape: tuple[int, int, int]
    extractor: Extractor
    described: bool
    _program: jax.stages.Compiled

    def __call__(
        self, fixed: Described, moving: Described, body: np.ndarray, disp: jax.Array
    ) -> Refined:
        """Optimises the displacement of one pair.

        Args:
            fixed: on `shape`; from `Compiled.describe`, or without features where
                `described` is False.
            moving: the same, pre-aligned on the fixed grid.
            body: [X, Y, Z] bool, where to compare.
            disp: [1, x, y, z, 3] float32, voxels, from a call of `Compiled`.

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
        if not self.described:
            fixed, moving = (scan._replace(features=None) for scan in (fixed, moving))
        return self._program(fixed, moving, self.extractor, body, disp)


def compile_refine(
    model: Model,
    plan: Plan,
    shape: tuple[int, int, int] | None = None,
) -> Refiner:
    """Compiles `refine` for volumes as a model describes them.

    Args:
        model: from `load_model`; its parameters are not read.
        plan: static.
        shape: (X, Y, Z) voxels of the displacement, multiples of 16; None for the
            model's grid.

    Returns:
        Refiner. "sam" is the model's own embedding where it has one, else the default
        one, see `load_extractor`.

    Raises:
        ValueError: shape or plan are not as above.
        UserError: no embedding for "sam", exit code 9; a grid that takes more memory
            than there is, exit code 7.
    """
    check_plan(plan)
    shape = check_shape(model.preprocess.shape if shape is None else shape)
    own = extractor = model.extractor
    if plan.features == "sam" and own.backend != "sam":
        extractor = load_extractor("sam", window=own.window)
    # The network's own features serve again where they are those that are compared.
    described = plan.features == "sam" and extractor is own and plan.finer == 1
    of = jax.ShapeDtypeStruct
    fine = tuple(plan.finer * n for n in shape)
    hu = of((1, *fine, 1), np.int16)
    maps = jax.eval_shape(features.describe, hu, own) if described else None
    scan = Described(hu, maps)
    program = (
        jax.jit(_refine_described, static_argnames=("plan", "described"))
        .lower(
            scan,
            scan,
            extractor,
            of((1, *fine), bool),
            of((1, *shape, 3), jnp.float32),
            plan=plan,
            described=described,
        )
        .compile()
    )
    check_program(
        program,
        f"instance optimisation on {'x'.join(map(str, fine))} voxels",
        "use a lower --io-finer, or --io-iterations 0",
    )
    return Refiner(plan, fine, extractor, described, program)


def _refine_described(fixed, moving, extractor, body, disp, *, plan, described):
    """From volumes as the network's own program has them."""
    views = (
        view(scan, extractor, plan=plan, described=described)
        for scan in (fixed, moving)
    )
    return refine(disp, *views, body, plan=plan)


def _costs_at(factor, finest, fixed, moving, weight, plan):
    """Cost of displacements on the grid of one level, as a function: [B]."""
    fixed, moving = (_coarser(scan, factor // finest) for scan in (fixed, moving))
    share = fixed.valid[..., 0]
    edge = plan.window if plan.features == "image" else 1
    thin = _too_thin(share, edge)
    if weight is not None:
        share = share * resample.downsample_mean(weight, factor)[..., 0]
    scanned = jnp.concatenate([moving.values, moving.valid], axis=-1)

    def counted(both):
        return share * _whole(both, edge, thin)

    def costs(disp):
        return 1.0 - _likeness(fixed, moving, scanned, counted, disp, plan)

    return costs


def _coarser(scan: View, factor: int) -> View:
    """Means over blocks of what lies inside the scan, 0 where nothing does."""
    if factor == 1:
        return scan
    valid = resample.downsample_mean(scan.valid, factor)
    inside = scan.values * jnp.broadcast_to(scan.valid, scan.values.shape)
    total = resample.downsample_mean(inside, factor)
    share = jnp.broadcast_to(valid, total.shape)
    return View(total / jnp.where(share > 0.0, share, 1.0), valid)


def _stepper(costs, plan):
    """Body of a level's loop."""
    slope_of = jax.grad(lambda disp: costs(disp).sum())
    passes = math.ceil(plan.smoothness)
    part = plan.smoothness / max(passes, 1)

    def step(_, disp):
        downhill = -slope_of(disp)
        for edge in _STEP_BOXES:
            downhill = smoothness.box_mean(downhill, edge)
        longest = jnp.sqrt(jnp.max(jnp.sum(downhill**2, axis=-1), axis=(1, 2, 3)))
        scale = plan.step / jnp.where(longest > 0.0, longest, jnp.inf)
        scale = jnp.expand_dims(scale, (1, 2, 3, 4))
        moved = warp.compose(downhill * jnp.broadcast_to(scale, downhill.shape), disp)
        for _ in range(passes):
            moved = moved + part * (smoothness.box_mean(moved, _FIELD_BOX) - moved)
        # Where nothing pulls, smoothing alone would wear the start away.
        pulled = jnp.expand_dims(longest > 0.0, (1, 2, 3, 4))
        return jnp.where(pulled, moved, disp)

    return step


def _likeness(fixed, moving, scanned, counted, disp, plan):
    """Similarity of the warped moving view, [B], at most 1, 0 without common voxels.

    Windows that hold the end of a scan would match the end itself: the longest step is
    of one length, however little pulls. `counted` says what counts, from the share of
    each voxel inside both.
    """
    if plan.features == "image":
        reached = jax.lax.stop_gradient(warp.warp(moving.valid, disp))
        both = (reached * fixed.valid)[..., 0] * warp.inside(disp)
        share = counted(both)
        # Each range warped by itself: 0.9 of the time of both at once on two cores.
        ranges = (
            jnp.split(v, v.shape[-1], axis=-1) for v in (fixed.values, moving.values)
        )
        found = [
            ncc.local_ncc(one, warp.warp(other, disp), window=plan.window, mask=share)
            for one, other in zip(*ranges, strict=True)
        ]
        return sum(found) / len(found)
    # One gather of rows for features and validity.
    warped = warp.warp(scanned, disp)
    reached = jax.lax.stop_gradient(warped[..., -1]) * warp.inside(disp)
    # Half the squared difference of unit vectors is 1 - cosine.
    distance = 0.5 * jnp.sum(jnp.square(warped[..., :-1] - fixed.values), axis=-1)
    share = counted(reached)
    total = jnp.sum(share, axis=(1, 2, 3))
    summed = jnp.sum(share * (1.0 - distance), axis=(1, 2, 3))
    return summed / jnp.where(total > 0.0, total, 1.0)


def _described(fixed, moving):
    """Both views, valid where all that decides about a feature lies in its scan.

    Unchanged where the fixed scan is too thin for any.
    """
    thin = _too_thin(fixed.valid[..., 0], _REACH)
    return [
        scan._replace(valid=_whole(scan.valid[..., 0], _REACH, thin)[..., None])
        for scan in (fixed, moving)
    ]


def _too_thin(inside, edge):
    """Whether no window fits into a scan: [B, X, Y, Z] -> [B, 1, 1, 1] bool."""
    return jnp.max(_whole(inside, edge), axis=(1, 2, 3), keepdims=True) == 0.0


def _whole(inside, edge, thin=False):
    """1 where the window about a voxel, cut at the border, is 1 all over, else 0.

    [B, X, Y, Z] float32 in [0, 1] -> the same shape; unchanged in `thin` examples.
    """
    outside = 1.0 - inside
    for axis in (1, 2, 3):
        outside = stencil.box_sum(outside, edge, axis)
    return jnp.where(thin, inside, jnp.where(outside < 1e-3, 1.0, 0.0))


def _check(disp, fixed, moving, mask, finest, finer):
    """Shapes of everything, on the finest grid and on the cost's."""
    warp.check_disp(disp)
    grid = disp.shape[:4]
    least = _LEAST_FACTOR * finer
    if any(n % least for n in grid[1:]):
        raise ValueError(
            f"the finest grid must have multiples of {least} voxels along each axis, "
            f"got {disp.shape}; pad disp"
        )
    expected = (grid[0], *(n // finest for n in grid[1:]))
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
