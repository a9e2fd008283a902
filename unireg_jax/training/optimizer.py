"""Gradient transformations from plain numbers."""

import math

import jax
import optax

OPTIMIZERS = ("sgd", "adam")


def make_optimizer(
    name: str,
    *,
    lr: float,
    momentum: float = 0.99,
    clip_norm: float = 0.0,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    head_scale: float = 1.0,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """SGD with momentum (paper, section 4.3) or Adam.

    Args:
        name: "sgd" or "adam".
        lr: peak learning rate.
        momentum: of SGD.
        clip_norm: bound of the global gradient norm; 0 leaves gradients alone.
        warmup_steps: linear rise from 0 to lr.
        decay_steps: cosine fall to 2 % of lr at this step; 0 keeps lr constant,
            since the paper names no schedule. A function of the step alone.
        head_scale: factor on the updates of the module `head`. Its output is in
            [-1, 1] units, (n - 1) / 2 voxels each; Adam's steps ignore that scale, so
            that about 2 / (n - 1) gives it the steps of a head in voxels.
        weight_decay: times the parameter, added to the gradient of SGD (as PyTorch
            does) or to the step of Adam (AdamW).

    Returns:
        An optax transformation.

    Raises:
        ValueError: unknown name, or a rate that is not positive and finite.
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    schedule = make_schedule(lr, warmup_steps, decay_steps)
    if name == "sgd":
        rule = optax.sgd(schedule, momentum=momentum)
        if weight_decay:
            rule = optax.chain(optax.add_decayed_weights(weight_decay), rule)
    elif name == "adam":
        rule = optax.adam(schedule)
        if weight_decay:
            rule = optax.adamw(schedule, weight_decay=weight_decay)
    else:
        raise ValueError(f"optimizer must be one of {OPTIMIZERS}, got {name!r}")
    stages = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    stages.append(rule)
    if head_scale != 1:
        stages.append(optax.masked(optax.scale(head_scale), _head_mask))
    return optax.chain(*stages)


def _head_mask(params):
    """True for the parameters of the top-level module `head`."""
    return {
        name: jax.tree.map(lambda _, on=name == "head": on, tree)
        for name, tree in params.items()
    }


def make_schedule(
    lr: float, warmup_steps: int = 0, decay_steps: int = 0
) -> optax.Schedule:
    """The learning rate as a function of the steps done; see `make_optimizer`."""
    if decay_steps:
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup_steps else lr, lr, warmup_steps, decay_steps, 0.02 * lr
        )
    if warmup_steps:
        return optax.linear_schedule(0.0, lr, warmup_steps)
    return optax.constant_schedule(lr)
