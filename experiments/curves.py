"""Loss and validation overlap over the steps of one training or of several.

    python -m experiments.curves --run=runs/fold1/first,runs/fold1/varied \
        --run=runs/fold2/first,runs/fold2/varied --plot=docs/curves.png

A run is a work folder, or those of its stages in their order with commas between; the
steps of a stage go on where the one before ended. Prints a table, one row per
validation: training loss of the steps since the last one, per task, and the overlap
of the task that has labels; means over the runs. --plot draws each run, and a line
where a stage ends: the next one may weigh the parts of its loss differently.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from experiments import cli, figures
from unireg_jax.errors import USAGE, UserError
from unireg_jax.training import log

_LOSS = "train/loss/"
_DSC = "val/mean_dsc/"


class Run(NamedTuple):
    """What a training logged.

    Attributes:
        name: its first work folder, and the one that holds it.
        loss: task -> (steps, values), one per logged step.
        dsc: task -> (steps, values in percent), one per validation.
        ends: step at which each stage ended.
    """

    name: str
    loss: dict[str, tuple[list[int], list[float]]]
    dsc: dict[str, tuple[list[int], list[float]]]
    ends: list[int]


def read(folders: Sequence[Path]) -> Run:
    """Joins the logs of the stages of a training.

    Args:
        folders: work folders, in their order.

    Raises:
        UserError: exit code 2, a folder without a log.
    """
    loss, dsc, ends, begin = {}, {}, [], 0
    for folder in folders:
        path = folder / log.NAME
        if not path.is_file():
            raise UserError("not_found", f"--run: {path} is not there", USAGE)
        step = 0
        for line in path.read_text().splitlines():
            row = json.loads(line)
            step = row["step"]
            for prefix, found, scale in ((_LOSS, loss, 1), (_DSC, dsc, 100)):
                for key, value in row.items():
                    if key.startswith(prefix) and value is not None:
                        steps, values = found.setdefault(
                            key.removeprefix(prefix), ([], [])
                        )
                        steps.append(begin + step)
                        values.append(scale * value)
        begin += step
        ends.append(begin)
    return Run("/".join(folders[0].parts[-2:]), loss, dsc, ends)


def table(runs: Sequence[Run]) -> str:
    """Markdown: one row per validation that all runs have."""
    tasks = sorted(set.intersection(*(set(run.loss) for run in runs)))
    known = sorted(set.intersection(*(set(run.dsc) for run in runs)))
    lines = [
        "| step | "
        + " | ".join(
            [f"loss, {task}" for task in tasks]
            + [f"DSC % unseen, {task} (each run)" for task in known]
        )
        + " |",
        "|" + "---|" * (1 + len(tasks) + len(known)),
    ]
    at = [steps for run in runs for steps, _ in (run.dsc[task] for task in known)]
    shared = sorted(set.intersection(*map(set, at or [run.ends for run in runs])))
    for before, step in zip([-1, *shared], shared, strict=False):
        cells = []
        for task in tasks:
            values = [
                value
                for run in runs
                for when, value in zip(*run.loss[task], strict=True)
                if before < when <= step
            ]
            cells.append(f"{np.mean(values):.3f}" if values else "-")
        for task in known:
            # A stage begins at the step where the one before ended: the later counts.
            each = [dict(zip(*run.dsc[task], strict=True))[step] for run in runs]
            told = ", ".join(f"{value:.1f}" for value in each)
            cells.append(f"**{np.mean(each):.1f}** ({told})")
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def smoothed(values: Sequence[float], share: float = 0.05) -> np.ndarray:
    """Running median, so that a curve shows through the pairs' differences.

    Args:
        values: [N].
        share: of all values, in each median.

    Returns:
        [N], ends over what there is.
    """
    half = max(1, round(share * len(values) / 2))
    return np.array(
        [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    )


def staged(
    curve: tuple[Sequence[int], Sequence[float]], ends: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A curve smoothed within each stage, with a gap between two.

    Args:
        curve: (steps, values).
        ends: last step of each stage.
    """
    steps, values = map(np.asarray, curve)
    parts = []
    for begin, end in zip([-1, *ends], ends, strict=False):
        mine = (begin < steps) & (steps <= end)
        parts += [(steps[mine], smoothed(values[mine])), ([np.nan], [np.nan])]
    steps, values = map(np.concatenate, zip(*parts, strict=True))
    return steps, values


def main(argv) -> None:
    del argv
    runs = [read([Path(p) for p in one.split(",")]) for one in flags.FLAGS.run]
    print(table(runs))
    if path := flags.FLAGS.plot:
        task = flags.FLAGS.task
        if any(task not in run.loss or task not in run.dsc for run in runs):
            raise UserError(
                "schema",
                f"--task: one with a loss and an overlap in every run expected, got "
                f"{task}; see the table",
                USAGE,
            )
        loss = {run.name: staged(run.loss[task], run.ends) for run in runs}
        panels = {
            f"training loss, {task}": loss,
            f"DSC of unseen {task} pairs, %": {r.name: r.dsc[task] for r in runs},
        }
        between = sorted({end for run in runs for end in run.ends[:-1]})
        figures.save_curves(path, panels, marks=between)


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_multi_string("run", None, "Work folders of one training.")
    flags.mark_flags_as_required(["run"])
    flags.DEFINE_string("plot", "", "Picture to write.")
    flags.DEFINE_string("task", "headneck", "That the picture shows.")
    cli.run(main)
