"""What the anatomical embedding learns: the same point of two views looks alike.

InfoNCE on the fine and on the coarse map with hard negatives (SAM, Yan et al., IEEE TMI
2022). Points are picked by masks and products with one-hot rows: the backward pass
holds no scatter.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unireg_jax.ops import resample, space
from unireg_jax.tasks import ViewBatch

_NEVER = -1e9
_LARGEST = 2.001  # of a sum of two cosines
_HALVINGS = 12  # to within 0.001


class Recipe(NamedTuple):
    """Numbers of the objective; defaults are those of the released `SAM.pth`.

    Attributes:
        temperature: divides every cosine.
        anchors: fine points per view.
        positive_mm: farthest that a fine positive may lie from its anchor.
        ignore_mm: nearer than this, nothing is a fine negative.
        hard: hardest fine negatives per anchor ...
        negatives: ... of which about so many are used, picked at random.
        coarse_positive_mm: farthest that a coarse positive may lie.
        coarse_axial_mm: the same along z.
        coarse_ignore_mm: nearer than this, nothing is a coarse negative.
        coarse_hard, coarse_negatives: as `hard` and `negatives`.
        others: coarse negatives from the other volumes, about.
    """

    temperature: float = 0.5
    anchors: int = 100
    positive_mm: float = 2.0
    ignore_mm: float = 20.0
    hard: int = 2000
    negatives: int = 500
    coarse_positive_mm: float = 25.0
    coarse_axial_mm: float = 8.0
    coarse_ignore_mm: float = 5.0
    coarse_hard: int = 250
    coarse_negatives: int = 200
    others: int = 1000


class _Cells(NamedTuple):
    """Cells of one map of both views of one volume, flattened.

    Attributes:
        features: [2, N, C].
        mm: [2, N, 3], centres.
        body: [2, N] bool.
        match: [2, N] int32, cell of the other view whose centre is nearest.
        gap_mm: [2, N, 3], from a cell's centre to that of its match; infinite where the
            match would lie outside the view or the body.
    """

    features: jax.Array
    mm: jax.Array
    body: jax.Array
    match: jax.Array
    gap_mm: jax.Array


def loss(
    fine: jax.Array,
    coarse: jax.Array,
    batch: ViewBatch,
    key: jax.Array,
    *,
    recipe: Recipe,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Contrastive loss of a batch of view pairs, fine plus coarse.

    -log(exp(s+ / t) / (exp(s+ / t) + sum exp(s- / t))), s cosines, mean over anchors

    Args:
        fine: [B, 2, X/2, Y/2, Z/2, C] float32, of unit length.
        coarse: [B, 2, X', Y', Z', C] float32, of unit length.
        batch: the views.
        key: of anchors and negatives.
        recipe: static.

    Returns:
        loss: scalar float32.
        scalars: loss, fine, coarse, and fine_hit and coarse_hit, the share of anchors
            that are nearer to their positive than to every negative; NaN where there
            is no anchor, as on the coarse map of views without a common point.
    """
    keys = jax.random.split(key, (fine.shape[0], 2))
    wide = jax.vmap(lambda maps: resample.resize_volume(maps, fine.shape[2:5]))(coarse)
    near = jax.vmap(_cells)(fine, batch)
    far = jax.vmap(_cells)(coarse, batch)
    wide = wide.reshape(*near.features.shape[:3], -1)
    fine_loss, fine_hit = jax.vmap(lambda c, w, k: _fine(c, w, k, recipe))(
        near, jax.lax.stop_gradient(wide), keys[:, 0]
    )
    coarse_loss, coarse_hit = _coarse(far, keys[:, 1], recipe)
    parts = {
        "fine": fine_loss.mean(),
        "coarse": coarse_loss.mean(),
        "fine_hit": jnp.nanmean(fine_hit),
        "coarse_hit": jnp.nanmean(coarse_hit),
    }
    total = parts["fine"] + parts["coarse"]
    return total, {"loss": total, **parts}


def _cells(maps: jax.Array, batch: ViewBatch) -> _Cells:
    """Flattens the maps [2, x, y, z, C] of one volume."""
    shape, full = maps.shape[1:4], batch.body.shape[1:]
    factor = np.array(full) // np.array(shape)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    voxel = (index.reshape(-1, 3) * factor + (factor - 1) / 2).astype(np.float32)
    share = resample.downsample_mean(
        batch.body[..., None].astype(jnp.float32), tuple(int(f) for f in factor)
    )
    body = share.reshape(2, -1) >= 0.5
    mm = jnp.stack([space.points_to_world(voxel, m) for m in batch.vox2mm])
    edges, first, last = (
        jnp.asarray(row, jnp.float32)[None]
        for row in (factor, (factor - 1) / 2, np.array(shape) - 1)
    )
    matches, gaps = [], []
    for view in range(2):
        # Cells of a view are an orthogonal lattice: the nearest one is found axis by
        # axis.
        there = space.points_to_voxel(mm[view], batch.vox2mm[1 - view])
        cell = jnp.round((there - first) / edges)
        inside = jnp.all((cell >= 0) & (cell <= last), axis=-1)
        cell = jnp.clip(cell, 0, last).astype(jnp.int32)
        match = (cell[:, 0] * shape[1] + cell[:, 1]) * shape[2] + cell[:, 2]
        gap = jnp.abs(mm[1 - view][match] - mm[view])
        good = (inside & body[1 - view][match])[:, None]
        matches.append(match)
        gaps.append(jnp.where(jnp.broadcast_to(good, gap.shape), gap, jnp.inf))
    features = maps.reshape(2, -1, maps.shape[-1])
    return _Cells(features, mm, body, jnp.stack(matches), jnp.stack(gaps))


def _fine(cells: _Cells, wide: jax.Array, key, recipe: Recipe):
    """Loss of one volume, and hits [2] of both directions."""
    everything = cells.features.reshape(-1, cells.features.shape[-1])
    context = wide.reshape(-1, wide.shape[-1])
    norm = jnp.sum(context**2, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.maximum(norm, 1e-12))
    context = context * jnp.broadcast_to(scale, context.shape)
    places = cells.mm.reshape(-1, 3)
    count = cells.body.shape[1]

    def one_way(view, key):
        keys = jax.random.split(key, 2)
        gap = jnp.sum(jnp.square(cells.gap_mm[view]), axis=-1)
        shown = cells.body[view] & (gap <= recipe.positive_mm**2)
        overlap = jnp.any(shown)
        # Views apart: each point against itself, so that its negatives still teach.
        shown = jnp.where(overlap, shown, cells.body[view])
        draw = jnp.where(shown, jax.random.uniform(keys[0], (count,)), -1.0)
        draw, some = jax.lax.top_k(draw, recipe.anchors)
        use = draw >= 0
        here = some + count * view
        match = cells.match[view][some] + count * (1 - view)
        match = jnp.where(overlap, match, here)
        anchors = _pick(here, everything)
        positive = jnp.sum(anchors * _pick(match, everything), axis=-1)
        cosines = _product(anchors, everything)
        far = _squared_mm(cells.mm[view][some], places) >= recipe.ignore_mm**2
        score = jax.lax.stop_gradient(cosines) + _product(context[here], context)
        # Views apart: only the own view's, as there is no telling what is the same.
        same_view = (jnp.arange(2 * count) // count == view)[None]
        allowed = far & (overlap | same_view)
        hard = _hardest(score, allowed, recipe.hard, recipe.negatives, keys[1])
        return _info_nce(positive, [(cosines, hard)], use, recipe.temperature)

    keys = jax.random.split(key, 2)
    losses, hits = zip(*(one_way(v, keys[v]) for v in range(2)), strict=True)
    return jnp.stack(losses).mean(), jnp.stack(hits)


def _coarse(cells: _Cells, keys, recipe: Recipe):
    """Losses [B] and hits [B, 2]; negatives from the other volumes, too."""
    batch, _, count, _ = cells.features.shape
    everything = cells.features.reshape(batch * 2 * count, -1)
    owner = jnp.arange(batch * 2 * count) // (2 * count)

    def one_way(view, which, cells, key):
        keys = jax.random.split(key, 2)
        anchors = cells.features[view]
        gap = cells.gap_mm[view]
        near = jnp.sum(jnp.square(gap), axis=-1) <= recipe.coarse_positive_mm**2
        use = cells.body[view] & near & (gap[:, 2] < recipe.coarse_axial_mm)
        positive = _pick(cells.match[view], cells.features[1 - view])
        positive = jnp.sum(anchors * positive, axis=-1)
        both = cells.features.reshape(2 * count, -1)
        cosines = _product(anchors, both)
        distance = _squared_mm(cells.mm[view], cells.mm.reshape(-1, 3))
        hard = _hardest(
            jax.lax.stop_gradient(cosines),
            distance >= recipe.coarse_ignore_mm**2,
            recipe.coarse_hard,
            recipe.coarse_negatives,
            keys[0],
        )
        negatives = [(cosines, hard)]
        if batch > 1:
            share = recipe.others / ((batch - 1) * 2 * count)
            some = jax.random.uniform(keys[1], owner.shape) < share
            strange = jnp.expand_dims(some & (owner != which), 0)
            cosines = _product(anchors, everything)
            negatives.append((cosines, jnp.broadcast_to(strange, cosines.shape)))
        return _info_nce(positive, negatives, use, recipe.temperature)

    def both_ways(which, cells, key):
        keys = jax.random.split(key, 2)
        pairs = (one_way(v, which, cells, keys[v]) for v in range(2))
        losses, hits = zip(*pairs, strict=True)
        return jnp.stack(losses).mean(), jnp.stack(hits)

    return jax.vmap(both_ways)(jnp.arange(batch), cells, keys)


def _info_nce(positive, negatives, use, temperature):
    """Mean over the anchors in use, and the share that hits; without any 0 and NaN."""
    logits = [jnp.where(mask, s / temperature, _NEVER) for s, mask in negatives]
    rest = jnp.concatenate(logits, axis=1)
    best = positive / temperature
    whole = jax.nn.logsumexp(
        jnp.concatenate([jnp.expand_dims(best, 1), rest], axis=1), axis=1
    )
    total = jnp.maximum(use.sum(), 1)
    loss = jnp.sum(jnp.where(use, whole - best, 0.0)) / total
    hit = jnp.sum(use & (best >= rest.max(axis=1))) / total
    return loss, jnp.where(use.any(), hit, jnp.nan)


def _hardest(score, allowed, hard, negatives, key):
    """Mask of about `negatives` of the `hard` allowed entries of highest score.

    The threshold is found by bisection: sorting 2000 of 33 000 took longer than the
    network. Which entries are left out is drawn once for all rows.
    """
    hard = min(hard, score.shape[1])
    # Forbidden ones count as zero among the others, as in the released program.
    score = jnp.where(allowed, score, 0.0)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        over = jnp.sum(score >= jnp.broadcast_to(middle, score.shape), axis=1)
        many = jnp.expand_dims(over >= hard, 1)
        return jnp.where(many, middle, low), jnp.where(many, high, middle)

    full = jnp.full((score.shape[0], 1), _LARGEST)
    least, _ = jax.lax.fori_loop(0, _HALVINGS, halve, (-full, full))
    some = jax.random.uniform(key, (1, score.shape[1])) < negatives / hard
    hardest = score >= jnp.broadcast_to(least, score.shape)
    return allowed & hardest & jnp.broadcast_to(some, score.shape)


def _pick(index, rows):
    """rows[index], whose gradient is a product and no scatter."""
    return _product(jax.nn.one_hot(index, rows.shape[0], dtype=rows.dtype), rows.T)


def _product(a, b):
    """a b^T."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())))


def _squared_mm(a, b):
    """[len(a), len(b)], by components: a product would cancel in float32."""
    gaps = (a[:, None, i] - b[None, :, i] for i in range(3))
    return sum(jnp.square(gap) for gap in gaps)
