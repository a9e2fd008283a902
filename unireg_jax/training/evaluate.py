"""Metrics over a dataset: per pair, per label, per task."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

PER_PAIR = ("ncc", "ncc_before", "sdlogj", "sdlogj_l2r", "folding_fraction")


def evaluate(
    eval_step: Callable,
    params: Any,
    extractor: Any,
    batches: Iterable[tuple[Any, Any]],
    *,
    at_once: int = 1,
) -> list[dict[str, Any]]:
    """Judges pairs, one by one or so many at once.

    Args:
        eval_step: from step.make_eval_step.
        params: of the network.
        extractor: features.Extractor of its features.
        batches: (pair, PairBatch of one sample), as loader.make_eval_batches yields.
        at_once: pairs per call of `eval_step`; the last call repeats its last pair.

    Returns:
        One dict per pair: task, fixed, moving (positions in the index), the numbers
        of PER_PAIR, dsc and dsc_before as lists over labels (NaN where undefined), and
        their means mean_dsc, mean_dsc_before; the first pair of a task also has
        `planes`, if eval_step gives them.
    """
    rows, seen = [], set()
    for pair, result, planes, i in _results(
        eval_step, params, extractor, batches, at_once
    ):
        row = {"task": pair.task, "fixed": pair.fixed, "moving": pair.moving}
        row |= {k: float(result[k]) for k in PER_PAIR}
        for name in ("dsc", "dsc_before"):
            row[name] = [float(x) for x in result[name]]
            row[f"mean_{name}"] = nanmean(row[name])
        if planes and pair.task not in seen:
            row["planes"] = {
                k: [np.asarray(p)[i] for p in v] for k, v in planes.items()
            }
        seen.add(pair.task)
        rows.append(row)
    return rows


def _results(eval_step, params, extractor, batches, at_once):
    """(pair, its numbers, planes of its batch, its place there) of every pair."""
    batches = iter(batches)
    while group := list(itertools.islice(batches, at_once)):
        examples = [batch for _, batch in group]
        examples += examples[-1:] * (at_once - len(group))
        batch = examples[0]
        if at_once > 1:
            batch = type(batch)(*map(np.concatenate, zip(*examples, strict=True)))
        scores = eval_step(params, batch, extractor)
        planes = scores.pop("planes", None)  # most stay on the device
        scores = {k: np.asarray(v) for k, v in scores.items()}
        for i, (pair, _) in enumerate(group):
            yield pair, {k: v[i] for k, v in scores.items()}, planes, i


def summarize(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means per task: mean_dsc, mean_dsc_before and the numbers of PER_PAIR."""
    summary = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        keys = ("mean_dsc", "mean_dsc_before", *PER_PAIR)
        summary[task] = {k: nanmean([row[k] for row in mine]) for k in keys}
    return summary


def per_label(
    rows: list[dict[str, Any]], labels: Callable[[str], Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Mean DSC per task and label name.

    Args:
        rows: from `evaluate`.
        labels: names of a task's labels, id i + 1 first, as loader.Dataset.label_names.

    Returns:
        {task: {label name: DSC}}; NaN where no pair of the task shows the label.
    """
    return {
        task: {
            label: nanmean([row["dsc"][i] for row in rows if row["task"] == task])
            for i, label in enumerate(labels(task))
        }
        for task in dict.fromkeys(row["task"] for row in rows)
    }


def nanmean(values: Iterable[float]) -> float:
    """Mean of the values that are defined; NaN when none is."""
    array = np.asarray(list(values), float)
    array = array[~np.isnan(array)]
    return float(array.mean()) if array.size else float("nan")
