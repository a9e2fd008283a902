"""The training objective: similarity, smoothness and overlap of one batch of pairs.

UniReg, section 3.2, eq. 6; the smoothness weight follows the body region of each
sample (Table 8).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unireg_jax.models import features
from unireg_jax.models.features import Extractor
from unireg_jax.ops import dice, intensity, ncc, resample, smoothness, warp
from unireg_jax.tasks import OUTSIDE_HU, PairBatch

_AIR_HU = -1024.0  # the least HU that a network sees
REG_UNITS = ("normalized", "voxel")


class Pair(NamedTuple):
    """One batch on the fixed grid, ready for the network; no gradient flows into it.

    Attributes:
        fixed: [B, X, Y, Z, 1] float32 in [-1, 1].
        moving: as fixed, pre-aligned.
        corr: [B, X/2, Y/2, Z/2, 27] float32.
        fixed_valid, moving_valid: [B, X, Y, Z, 1] float32, 1 inside the scan.
        fixed_labels, moving_labels: [B, X, Y, Z] uint8.
        fixed_more, moving_more: [B, L, X, Y, Z] uint8, further layers of them.
        region, pair_type: [B] int32.
    """

    fixed: jax.Array
    moving: jax.Array
    corr: jax.Array
    fixed_valid: jax.Array
    moving_valid: jax.Array
    fixed_labels: jax.Array
    moving_labels: jax.Array
    fixed_more: jax.Array
    moving_more: jax.Array
    region: jax.Array
    pair_type: jax.Array


class Weights(NamedTuple):
    """Plain numbers of the objective.

    Attributes:
        smoothness: per Region, in the order of the enum (lambda, Table 8).
        dice: of (1 - mean soft Dice); 0 leaves labels out.
        reg_units: "normalized" differentiates the field in [-1, 1] units, which the
            paper does not name but its lambda fits; "voxel" in voxels. One is the other
            times about (n - 1)^2 / 4, some 9000 at 192: never mix them.
        ncc_window: edge of the similarity's window, voxels.
        ncc_scales: on how many grids it is measured, each of half the resolution of
            the one before, with the same window; the mean counts.
        num_labels: label ids including background; static.
        dice_counting: see `dice.soft_dice`.
    """

    smoothness: tuple[float, ...]
    dice: float = 1.0
    reg_units: str = "normalized"
    ncc_window: int = 9
    ncc_scales: int = 1
    num_labels: int = 2
    dice_counting: str = "scatter"


def prepare(
    batch: PairBatch, extractor: Extractor, disp: jax.Array | None = None
) -> Pair:
    """Windows, pre-aligns and describes a batch on the device.

    Args:
        batch: HU volumes and labels, see tasks.PairBatch.
        extractor: of the features; its HU window becomes [-1, 1] (section 4.3).
        disp: [B, X, Y, Z, 3] float32, voxels; the moving scans as warped by it, as
            `registration.prediction.prewarp` does: they end half a voxel beyond the
            centres of the last ones, of either grid. None: as the pre-alignment has
            them.

    Returns:
        The pair on the fixed grid; outside either scan images are air and not valid,
        outside the moving one, as where it is cut short, without labels.
    """
    coords = moving_coords(batch, disp)
    margin = 0.0 if disp is None else 0.5
    within = warp.within(coords, batch.moving.shape[1:4], margin=margin)
    if disp is not None:
        shape = disp.shape[1:4]
        led = jnp.broadcast_to(warp.identity_coords(shape), disp.shape) + disp
        within &= warp.within(led, shape, margin=margin)
    valid = intensity.valid(batch.moving).astype(jnp.float32)
    valid = warp.sample(valid, coords) * within[..., None]
    # The marker of what lies outside is no HU to interpolate: air, then the marker.
    moving = jnp.maximum(batch.moving.astype(jnp.float32), _AIR_HU)
    moving = jnp.where(valid > 0.5, warp.sample(moving, coords), OUTSIDE_HU)
    labels, more = sample_labels(batch, coords, valid[..., 0] > 0.5)
    low, high = extractor.window
    maps = (features.describe(hu, extractor) for hu in (batch.fixed, moving))
    pair = Pair(
        fixed=intensity.window(batch.fixed, low=low, high=high),
        moving=intensity.window(moving, low=low, high=high),
        corr=features.correlate(*maps, combine=extractor.combine),
        fixed_valid=intensity.valid(batch.fixed).astype(jnp.float32),
        moving_valid=valid,
        fixed_labels=batch.fixed_labels,
        moving_labels=labels,
        fixed_more=batch.fixed_more,
        moving_more=more,
        region=batch.region,
        pair_type=batch.pair_type,
    )
    return jax.lax.stop_gradient(pair)


def moving_coords(batch: PairBatch, disp: jax.Array | None = None) -> jax.Array:
    """Where the moving scans are read: the pre-alignment of x + disp(x).

    Args:
        batch: of B pairs.
        disp: [B, X, Y, Z, 3] float32, voxels of the fixed grid; None: 0.

    Returns:
        [B, X, Y, Z, 3] float32, voxels of the moving grid.
    """
    shape = batch.fixed.shape[1:4]
    if disp is None:
        return warp.affine_coords(batch.align, shape)
    coords = jnp.broadcast_to(warp.identity_coords(shape), disp.shape) + disp
    linear, offset = batch.align[:, :3, :3], batch.align[:, :3, 3]
    coords = jnp.einsum(
        "bxyzi,bji->bxyzj", coords, linear, precision=jax.lax.Precision.HIGHEST
    )
    return coords + offset[:, None, None, None, :]


def sample_labels(
    batch: PairBatch, coords: jax.Array, where: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Reads all layers of the moving labels at some positions, nearest neighbour.

    Args:
        batch: moving_labels and moving_more count.
        coords: [B, X, Y, Z, 3] float32, voxels of the moving grid.
        where: [B, X, Y, Z] bool; elsewhere all labels are 0.

    Returns:
        labels: [B, X, Y, Z], as batch.moving_labels.
        more: [B, L, X, Y, Z], as batch.moving_more.
    """
    layers = jnp.concatenate([batch.moving_labels[:, None], batch.moving_more], axis=1)
    found = warp.sample(jnp.moveaxis(layers, 1, -1), coords, order=0)
    found = jnp.where(where[..., None], found, 0).astype(found.dtype)
    return found[..., 0], jnp.moveaxis(found[..., 1:], -1, 1)


def objective(
    disp: jax.Array, pair: Pair, *, weights: Weights
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of a predicted field, averaged over the batch.

    loss = (1 - NCC(F, M o phi)) + lambda[region] * R(phi) + w (1 - Dice)

    NCC is the mean over `weights.ncc_scales` grids. Both count voxels that lie in the
    fixed scan and are led into the moving one: where a scan ends an organ is no stump
    that the other's is to be pressed into.

    Args:
        disp: [B, X, Y, Z, 3] float32, voxels.
        pair: from `prepare`.
        weights: plain numbers, static.

    Returns:
        loss: scalar float32.
        scalars: means over the batch: loss, ncc, smoothness (unweighted), dice (NaN
            where no sample has a common label).

    Raises:
        ValueError: `reg_units` is unknown, a region has no smoothness weight, or X, Y,
            Z cannot be halved for every further one of `ncc_scales`.
    """
    _check(weights, disp.shape[1:4])
    warped = warp.warp(pair.moving, disp)
    mask = in_both(pair, jax.lax.stop_gradient(disp))
    similarity = _similarity(pair.fixed, warped, mask, weights)
    field = disp
    if weights.reg_units == "normalized":
        # 1 unit is (n - 1) / 2 voxels (align-corners).
        units_per_voxel = 2 / (jnp.array(disp.shape[1:4], jnp.float32) - 1)
        field = disp * jnp.broadcast_to(units_per_voxel, disp.shape)
    rough = smoothness.diffusion(field)
    strength = jnp.array(weights.smoothness, jnp.float32)[pair.region]
    loss = 1 - similarity + strength * rough
    scalars = {"ncc": similarity.mean(), "smoothness": rough.mean()}
    if weights.dice:
        overlap, present = dice.soft_dice(
            pair.fixed_labels,
            pair.moving_labels,
            disp,
            num_labels=weights.num_labels,
            counting=weights.dice_counting,
            fixed_more=pair.fixed_more,
            moving_more=pair.moving_more,
            mask=mask[..., 0] > 0.5,
        )
        count = present.sum(-1)
        mean = (overlap * present).sum(-1) / jnp.maximum(count, 1)
        loss = loss + weights.dice * jnp.where(count > 0, 1 - mean, 0.0)
        labelled = (count > 0).sum()
        total = jnp.where(count > 0, mean, 0.0).sum()
        scalars["dice"] = jnp.where(
            labelled > 0, total / jnp.maximum(labelled, 1), jnp.nan
        )
    loss = loss.mean()
    return loss, {"loss": loss, **scalars}


def in_both(pair: Pair, disp: jax.Array) -> jax.Array:
    """Says how far voxels lie in the fixed scan and are led into the moving one.

    Args:
        pair: from `prepare`.
        disp: [B, X, Y, Z, 3] float32, voxels.

    Returns:
        [B, X, Y, Z, 1] float32, 0 to 1.
    """
    # Beyond its grid a warp repeats the last voxel, of the mask, too.
    reached = warp.warp(pair.moving_valid, disp) * warp.inside(disp)[..., None]
    return pair.fixed_valid * reached


def _similarity(fixed, warped, mask, weights):
    """NCC [B], the mean over the scales."""
    scales = []
    for scale in range(weights.ncc_scales):
        if scale:
            fixed, warped, mask = (
                resample.downsample_mean(volume, 2) for volume in (fixed, warped, mask)
            )
        scales.append(
            ncc.local_ncc(fixed, warped, window=weights.ncc_window, mask=mask[..., 0])
        )
    return sum(scales) / weights.ncc_scales


def make_loss(apply_fn: Callable, *, weights: Weights, passes: int = 1) -> Callable:
    """Binds everything static: loss(params, batch, extractor) -> (loss, scalars).

    Args:
        apply_fn: see `step.make_eval_step`, with train=True.
        weights: of the objective.
        passes: how often the network acts, each time on the moving scan as warped so
            far, as `registration.prediction` has it. The field of all passes so far is
            judged after each, and what came before gets no gradient; means count. Not
            in the paper.
    """

    def loss(params, batch: PairBatch, extractor: Extractor):
        given = pair = prepare(batch, extractor)
        total, found = None, []
        for _ in range(passes):
            if total is not None:
                total = jax.lax.stop_gradient(total)
                pair = prepare(batch, extractor, total)
            disp = apply_fn(
                params,
                pair.fixed,
                pair.moving,
                pair.corr,
                pair.region,
                pair.pair_type,
                train=True,
            )
            total = disp if total is None else warp.compose(disp, total)
            found.append(objective(total, given, weights=weights)[1])
        means = mean_scalars(jax.tree.map(lambda *each: jnp.stack(each), *found))
        return means["loss"], means

    return loss


def mean_scalars(scalars: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Means over the parts of a step, its passes or parts of its batch.

    A part without labels has no overlap; one without a loss is a fault, and shows.

    Args:
        scalars: name -> [N] float32, NaN where a part has none.

    Returns:
        name -> scalar; NaN only where every part is, or one of the losses.
    """
    means = {k: (jnp.mean if k == "loss" else jnp.nanmean) for k in scalars}
    return {k: means[k](v) for k, v in scalars.items()}


def _check(weights: Weights, shape: Sequence[int]) -> None:
    if weights.reg_units not in REG_UNITS:
        raise ValueError(
            f"reg_units must be one of {REG_UNITS}, got {weights.reg_units!r}"
        )
    if len(weights.smoothness) != 4:
        raise ValueError(
            "smoothness must hold one weight per region (headneck, chest, abdomen, "
            f"liver), got {len(weights.smoothness)}"
        )
    scales = weights.ncc_scales
    if scales < 1 or any(n % 2 ** (scales - 1) for n in shape):
        raise ValueError(
            f"ncc_scales must be 1 or more, and so few that {tuple(shape)} voxels can "
            f"be halved for each but the first, got {scales}"
        )
