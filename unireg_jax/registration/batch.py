"""Many pairs, one compiled network: files and arithmetic of neighbours overlap."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from unireg_jax.errors import UserError
from unireg_jax.imaging.nifti import Volume
from unireg_jax.registration import pipeline, prediction
from unireg_jax.registration.network import Model, load_model
from unireg_jax.registration.pipeline import Registration
from unireg_jax.registration.refine import Plan
from unireg_jax.registration.threads import in_threads


class Pair(NamedTuple):
    """One pair to register; see `register` for what the fields mean.

    Attributes:
        fixed: path of a scan (see imaging/scans.py), or Volume.
        moving: the same.
        task: name in tasks.TASKS.
        pair_type: "inter", "intra", or None for the task's own.
        affine: pre-alignment.
        fixed_mask: [X, Y, Z] bool on the LPS+ axes of the fixed Volume, or None.
        name: for the caller.
    """

    fixed: Volume | str | os.PathLike
    moving: Volume | str | os.PathLike
    task: str
    pair_type: str | None = None
    affine: str | np.ndarray = "auto"
    fixed_mask: np.ndarray | None = None
    name: str = ""


class Outcome(NamedTuple):
    """How one pair ended: with a value or with an error.

    Attributes:
        pair: as given.
        value: Registration, or what `finish` returned; None after an error.
        error: UserError, or None.
    """

    pair: Pair
    value: Any
    error: UserError | None


Finish = Callable[[Pair, Registration, Volume, Volume], Any]


def register_many(
    pairs: Iterable[Pair],
    *,
    weights: Model | str | os.PathLike | None = None,
    finish: Finish | None = None,
    workers: int = 3,
    keep: int = 4,
    passes: int = prediction.PASSES,
    symmetric: bool = prediction.SYMMETRIC,
    refine: Plan | None = None,
) -> Iterator[Outcome]:
    """Registers pairs one after the other while their neighbours read and write.

    Each of `workers` threads takes one pair from file to result. The device serves one
    at a time; reading, decoding, resampling and `finish` of the others go on meanwhile.
    The network is compiled once, before the first pair. A scan that comes back while
    `keep` others have not is read once, and as fixed scan described once (an atlas that
    many scans are brought to; as moving scan it lies on another grid in every pair).

    Args:
        pairs: taken one by one, at most workers + 1 ahead of what was yielded.
        weights: Model, or as in `load_model`.
        finish: called in the worker's thread with pair, registration, fixed and moving
            volume; writes files, say. Its result is yielded instead of the
            registration, whose arrays are then freed.
        workers: threads; each holds one pair in memory.
        keep: scans remembered, with their image on the network's grid and its features.
        passes, symmetric: of the network, see `register`.
        refine: instance optimisation of every pair's field; None for none.

    Yields:
        Outcome per pair, in the order of `pairs`.

    Raises:
        ValueError: workers or keep below 1, passes or a plan that cannot be carried
            out, or a pair whose arguments do not fit.
        UserError: weights that cannot be used (exit code 9). That of a pair is yielded;
            anything else ends the batch. Then, as when the caller stops, pairs in work
            are finished, no other is begun, and no thread is left.
    """
    if workers < 1 or keep < 1:
        raise ValueError(f"workers and keep must be at least 1, got {workers}, {keep}")
    model = weights if isinstance(weights, Model) else load_model(weights)
    # A generator of its own: what is wrong above is raised by the call itself.
    session = pipeline.Session(
        model, keep=keep, passes=passes, symmetric=symmetric, refine=refine
    )
    ends = in_threads(pairs, lambda p, _: _one(session, p, finish), workers=workers)
    return (end.value for end in ends)


def _one(session, pair, finish) -> Outcome:
    """One pair from file to result; its own mistakes end nothing else."""
    try:
        clock = pipeline.Clock()
        settings = pipeline.check_settings(pair.task, pair.pair_type, pair.affine)
        fixed, moving = session.read(pair.fixed), session.read(pair.moving)
        clock.lap("read")
        result = session.run(
            fixed,
            moving,
            settings,
            affine=pair.affine,
            mask=pair.fixed_mask,
            clock=clock,
        )
        value = finish(pair, result, fixed, moving) if finish else result
    except UserError as error:
        # Rebuilt without its trace, whose frames hold the volumes.
        bare = UserError(error.reason, str(error), error.exit_code)
        return Outcome(pair, None, bare)
    return Outcome(pair, value, None)
