"""The paper's tables on prepared scans: 2, 3, 5 and 6, of weights as they are.

    python -m experiments.tables --data=PREPARED --weights=unireg_heldout --split=val
    python -m experiments.tables --data=PREPARED --conditions \
        --weights=runs/dynamic/weights.safetensors \
        --weights=runs/static/weights.safetensors

Judges the pairs of a split of any folder made by data_pipeline.prepare, from the
affines of experiments.prealign, as validation in training does (training/evaluate.py):
one pass one way on the network's grid, without instance optimisation. Prints Markdown,
with --json a report instead.

- Table 2: per task DSC of the affine ("initial") and of the network, SDlogJ, folds; per
  network parameters and multiply-adds. Table 3: the row of a task that the weights were
  not trained on, lung if by preset `paper`.
- Table 6: several --weights, as of the dynamic and of the static head, or of several
  lengths of training, have a row each.
- Table 5, with --conditions: all pairs again under every region and pair type.

Table 4 is not reproduced: it is the sweep of λ of another network, cLapIRN. The marks
of significance and the times of Tables 2 and 3 are not there, either.
"""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipeline import loader, store
from data_pipeline.pairs import SPLITS
from experiments import build, cli, launch, timing
from unireg_jax import registration
from unireg_jax.errors import USAGE, UserError, on_terminal, tell
from unireg_jax.registration import Model
from unireg_jax.registration.sweeps import CONDITIONS
from unireg_jax.tasks import TASKS, PairBatch, PairType, Task
from unireg_jax.training import evaluate, step


def measure(
    root: Path | str,
    names: Sequence[str],
    *,
    split: str = "test",
    pairs_per_task: int | None = None,
    conditions: bool = False,
) -> dict[str, dict[str, Any]]:
    """Judges weights on the pairs of a split.

    Args:
        root: prepared folder.
        names: of the weights, as `load_model` takes them.
        split: "train", "val" or "test".
        pairs_per_task: so many at most, see `loader.make_eval_batches`; None: all.
        conditions: whether under every region and pair type, too.

    Returns:
        By name of the weights: what `describe` gives, and "tasks", of `judge`.

    Raises:
        UserError: exit code 3, the split has no pair; 9, see `load_model`;
            `grid_mismatch`, 2, weights of another grid; and see `loader.Dataset`.
    """
    dataset = loader.Dataset(root)
    dataset.limit(launch.volumes_gib())
    loader.make_eval_batches(dataset, split)  # refuses a split without pairs
    models = {name: registration.load_model(name) for name in names}
    for name, model in models.items():
        _check_grid(name, model, dataset)
    pairs = dataset.pairs(split)
    dataset.tell_missing(pairs)
    inter = any(pair.pair_type == PairType.INTER for pair in pairs)
    if inter and not (dataset.root / store.ALIGN_NAME).exists():
        tell(
            f"warning: {dataset.root}: no {store.ALIGN_NAME}, so that in the pairs of "
            "two patients the middles of the bodies meet; run "
            f"`python -m experiments.prealign --data={dataset.root}`"
        )
    options = {"pairs_per_task": pairs_per_task, "conditions": conditions}
    return {
        name: describe(model) | {"tasks": judge(dataset, model, split, **options)}
        for name, model in models.items()
    }


def _check_grid(name: str, model: Model, dataset: loader.Dataset) -> None:
    spec = dataset.index["spec"]
    found = (dataset.shape, tuple(spec["spacing_mm"]))
    wanted = (model.preprocess.shape, model.preprocess.spacing_mm)
    if found != wanted:
        raise UserError(
            "grid_mismatch",
            f"{dataset.root}: {wanted[0]} voxels of {wanted[1]} mm expected by the "
            f"weights {name}, {found[0]} of {found[1]} mm found; prepare the scans "
            "with --shape and --spacing of the weights",
            USAGE,
        )


def describe(model: Model) -> dict[str, Any]:
    """What Tables 2 and 6 tell of a network.

    Args:
        model: from `load_model`.

    Returns:
        sha256; features, what the network joined; head, row of HEADS; steps, of its
        last training, if told; parameters; macs, multiply-adds of one pair on `shape`,
        voxels (the paper's "FLOPs" count these; features are not in them, there and
        here).
    """
    shape = model.preprocess.shape
    of = jax.ShapeDtypeStruct
    image, code = of((1, *shape, 1), jnp.float32), of((1,), jnp.int32)
    corr = of((1, *(n // 2 for n in shape), 27), jnp.float32)
    apply = functools.partial(build.apply, model.module.clone(conv_impl="direct"))
    traced = jax.make_jaxpr(apply)(model.params, image, image, corr, code, code)
    return {
        "sha256": model.spec.get("sha256"),
        "features": model.extractor.label,
        "head": model.module.conditioner,
        "steps": model.spec.get("training", {}).get("steps"),
        "parameters": sum(p.size for p in jax.tree.leaves(model.params)),
        "macs": timing.count_macs(traced.jaxpr),
        "shape": shape,
    }


def judge(
    dataset: loader.Dataset,
    model: Model,
    split: str,
    *,
    pairs_per_task: int | None = None,
    conditions: bool = False,
) -> dict[str, dict[str, Any]]:
    """Judges one network, as validation in training does.

    Args:
        dataset: prepared volumes on the network's grid.
        model: from `load_model`.
        split, pairs_per_task, conditions: see `measure`.

    Returns:
        By task: pairs, how many; judged, of how many there is a DSC; better, of how
        many of these the network raises it; the means of `evaluate.summarize`; dsc,
        mean by label. With conditions also "conditions", the same means by "region,
        pair type". None where undefined, as DSC without labels. DSC and
        folding_fraction in [0, 1], sdlogj of voxel units.
    """
    vocabularies = [task["labels"] for task in dataset.index["tasks"].values()]
    module = model.module.clone(conv_impl=build.conv_impl())
    eval_step = step.make_eval_step(
        functools.partial(build.apply, module),
        num_labels=1 + max([1, *map(len, vocabularies)]),
    )

    def rows_of(tasks=None, condition=None):
        batches = loader.make_eval_batches(
            dataset, split, tasks=tasks, pairs_per_task=pairs_per_task
        )
        batches = tqdm(batches, disable=not on_terminal())
        asked = ((pair, _ask(batch, condition)) for pair, batch in batches)
        return evaluate.evaluate(eval_step, model.params, model.extractor, asked)

    rows = rows_of()
    means = evaluate.summarize(rows)
    labels = evaluate.per_label(rows, dataset.label_names)
    found = {}
    for task, values in means.items():
        mine = [row for row in rows if row["task"] == task]
        found[task] = {"pairs": len(mine), **_better(mine), **_defined(values)}
        found[task]["dsc"] = _defined(labels[task])
    for condition in CONDITIONS if conditions else ():
        others = [task for task in found if TASKS[task] != condition]
        # That of the task itself is there already.
        asked = evaluate.summarize(rows_of(others, condition)) if others else {}
        for task, values in (means | asked).items():
            here = found[task].setdefault("conditions", {})
            here[_named(condition)] = _defined(values)
    return found


def _better(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many pairs have an overlap, and of how many the network's is the larger."""
    judged = [row for row in rows if math.isfinite(row["mean_dsc"])]
    better = sum(row["mean_dsc"] > row["mean_dsc_before"] for row in judged)
    return {"judged": len(judged), "better": better}


def _ask(batch: PairBatch, condition: Task | None) -> PairBatch:
    """The pairs of a batch, under another region and pair type if one is given."""
    fields = zip(("region", "pair_type"), condition or (), strict=False)
    return batch._replace(
        **{name: np.full_like(getattr(batch, name), code) for name, code in fields}
    )


def _named(condition: Task) -> str:
    return ", ".join(part.name.lower() for part in condition)


def _defined(values: dict[str, float]) -> dict[str, float | None]:
    return {k: v if math.isfinite(v) else None for k, v in values.items()}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown of Tables 2, 3 and 6: a row per task and weights.

    Args:
        results: of `measure`.
    """
    lines = [
        "| task | pairs | labels | weights | DSC % initial | network | pairs better | "
        "SDlogJ | folds % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in next(iter(results.values()))["tasks"]:
        for name, result in results.items():
            here = result["tasks"][task]
            labels = sum(value is not None for value in here["dsc"].values())
            better = f"{here['better']} of {here['judged']}" if labels else "–"
            dsc, *regular = _told(here)
            cells = [
                *(task, here["pairs"], labels, name),
                *(_percent(here["mean_dsc_before"]), dsc, better, *regular),
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def table_of_networks(results: dict[str, dict[str, Any]]) -> str:
    """Markdown of the last columns of Table 2 and the first of Table 6."""
    lines = [
        "| weights | features | head | steps of its last training | parameters, M | "
        "GMACs |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        shape = "×".join(map(str, result["shape"]))
        size, cost = result["parameters"] / 1e6, result["macs"] / 1e9
        lines.append(
            f"| {name} | {result['features']} | {result['head']} | "
            f"{result['steps'] or '–'} | {size:.2f} | {cost:.1f} at {shape} |"
        )
    return "\n".join(lines)


def table_of_conditions(tasks: dict[str, dict[str, Any]]) -> str:
    """Markdown of Table 5: a row per region and pair type, the right one in bold.

    Args:
        tasks: of one network, from `judge`.
    """
    lines = [
        "| region, type | "
        + " | ".join(f"{task}: DSC %, SDlogJ, folds %" for task in tasks)
        + " |",
        "|" + "---|" * (1 + len(tasks)),
    ]
    for name in map(_named, CONDITIONS):
        cells = [name]
        for task, found in tasks.items():
            text = ", ".join(_told(found["conditions"][name]))
            cells.append(f"**{text}**" if name == _named(TASKS[task]) else text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(means: dict[str, Any]) -> tuple[str, str, str]:
    """DSC in %, SDlogJ and folds in %."""
    sdlogj = means["sdlogj"]
    regular = "–" if sdlogj is None else f"{sdlogj:.2f}"
    return _percent(means["mean_dsc"]), regular, _percent(means["folding_fraction"])


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def main(argv) -> None:
    del argv
    cli.setup()
    options = flags.FLAGS
    results = measure(
        options.data,
        options.weights,
        split=options.split,
        pairs_per_task=options.pairs,
        conditions=options.conditions,
    )
    if options.json:
        print(json.dumps({"split": options.split, "weights": results}, indent=1))
        return
    print(f"{table(results)}\n\n{table_of_networks(results)}")
    for name, result in results.items() if options.conditions else ():
        print(f"\n{name}\n\n{table_of_conditions(result['tasks'])}")


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder made by data_pipeline.prepare.")
    flags.DEFINE_multi_string("weights", None, "Files, or names in the package.")
    flags.DEFINE_enum("split", "test", [*SPLITS], "Whose pairs are judged.")
    flags.DEFINE_integer("pairs", None, "Of each task at most.", lower_bound=1)
    flags.DEFINE_bool("conditions", False, "Every region and pair type, too: Table 5.")
    flags.DEFINE_bool("json", False, "A report instead of Markdown.")
    flags.mark_flags_as_required(["data", "weights"])
    cli.run(main)
