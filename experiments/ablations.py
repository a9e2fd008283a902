"""What the ids, the pre-alignment and an unseen task change, on real scans.

    python -m experiments.ablations --data=FOLDER --out=runs/ablations
    python -m experiments.ablations --join=runs/ablations --join=runs/fold1/ablations

UniReg, Tables 5 and 3, with weights as they are: nothing is trained. The 12 ordered
head-neck pairs that training never saw, the liver and lung pairs of real_pairs, chest
and abdomen between patients that training saw, and an inter-patient liver, a task that
no training stream has: the CHAOS scan, seen by no training, with two others. Each pair
is predicted under every region and pair type in one pass of the backbone
(registration/sweeps.py; scores on the network's grid). Then all of them again with each
pre-alignment, as real_results measures them, on the scans' own grids; and the four
patients onto themselves. Writes a JSON file per part and prints Markdown. --split
takes the head-neck patients of another part, for weights that never saw those; --join
tells what the conditions change over the trainings of several --out.

Intervals: 95 %, over all equally likely draws of the patients with replacement (of
--join over 10 000 draws within each training's); a pair counts as often as both of its
patients were drawn. Four patients give a rough one.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import cli, conventional, real_pairs, real_results
from experiments.benchmark_quality import SCANS, Scans
from experiments.real_pairs import LANDMARKS, Truth
from unireg_jax import registration
from unireg_jax.errors import USAGE, UserError, on_terminal
from unireg_jax.evaluation.comparison import signed_rank
from unireg_jax.imaging import nifti, orientation, preprocess
from unireg_jax.imaging.mapping import Mapping
from unireg_jax.imaging.nifti import Volume
from unireg_jax.registration import sweeps
from unireg_jax.tasks import TASKS, PairType, Region, Task

RIGHT = {**TASKS, "liver_inter": Task(Region.LIVER, PairType.INTER)}
AFFINES = ("auto", "features", "coarse")
# Between patients, both ways: names of `SCANS`. CHAOS was never in training; the others
# were, with their labels.
_BETWEEN = (
    ("chest", "chest_lidc", "chest_nsclc"),
    ("abdomen", "abdomen_lidc", "abdomen_ts"),
    ("liver_inter", "abdomen_chaos", "abdomen_lidc"),
    ("liver_inter", "abdomen_chaos", "abdomen_ts"),
)
BETWEEN_GROUPS = tuple(dict.fromkeys(group for group, *_ in _BETWEEN))


class Case(NamedTuple):
    """One pair.

    Attributes:
        group: headneck, liver, lung, or of `_BETWEEN`.
        patients: of fixed and of moving.
        scans: fixed and moving.
        truth: labels of both, or landmarks.
        affine: pre-alignment of the sweep.
    """

    group: str
    patients: tuple[str, str]
    scans: tuple[Volume, Volume]
    truth: Truth
    affine: str


def cases(data: Path, affine_used: dict[str, str], split: str) -> Iterator[Case]:
    """All pairs, read one by one.

    Args:
        data: folder of the collection.
        affine_used: pre-alignment of liver and lung, as "auto" chose it.
        split: of `real_pairs.SPLITS`, of the head-neck pairs.

    Yields:
        Case.
    """
    for pair in real_pairs.pairs(data, split):
        scans, truth = real_pairs.read_scans(pair), real_pairs.read_truth(pair)
        affine = affine_used.get(pair.task, "affine")
        yield Case(pair.task, pair.patients, scans, truth, affine)
    read = Scans(data)
    for group, names, truth in between(read, BETWEEN_GROUPS):
        scans = tuple(read(name) for name in names)
        yield Case(group, names, scans, truth, "affine")


def between(
    read: Scans, groups: Sequence[str]
) -> Iterator[tuple[str, tuple[str, str], Truth]]:
    """Pairs of two patients with labels, other than head-neck.

    Args:
        read: of the collection.
        groups: which: chest, abdomen, liver_inter.

    Yields:
        Group, names of fixed and moving in `SCANS`, labels that tables of both have.
        Pairs of which a file is missing are left out.
    """
    for group, *ends in _BETWEEN:
        files = (read.path(file) for name in ends for file in SCANS[name][1:3])
        if group not in groups or not all(file.is_file() for file in files):
            continue
        one, other = (set(SCANS[name][3].values()) for name in ends)
        counted = sorted(one & other)
        for names in itertools.permutations(ends):
            labels = (read(name, labels=True) for name in names)
            truth = tuple(
                volume._replace(
                    data=np.where(np.isin(volume.data, counted), volume.data, 0)
                )
                for volume in labels
            )
            yield group, names, truth


def conditions(case: Case, model) -> list[dict]:
    """One row per condition, pre-alignment first.

    Args:
        case: the pair.
        model: from `load_model`.

    Returns:
        Rows of `sweep` with group, patients; score, DSC in % or mean landmark error in
        mm; shift_mm, mean distance over the fixed body to the field of the right
        condition.
    """
    marked = case.group in LANDMARKS
    found = sweeps.sweep(
        *case.scans,
        labels=None if marked else case.truth,
        weights=model,
        affine=case.affine,
    )
    right = sweeps.CONDITIONS.index(RIGHT[case.group])
    spacing = orientation.spacing_mm(found.grid.vox2world)
    hu = preprocess.prepare_image(case.scans[0], found.grid, model.preprocess)
    body = hu > -500
    rows = []
    for i, row in enumerate(found.rows):
        disp = found.disp[i - 1] if i else np.zeros_like(found.disp[0])
        scored = row
        if marked:
            field = conventional.from_voxels(disp, found.grid.vox2world)
            scored = real_pairs.scores(case.truth, Mapping((field, found.affine)))
        apart = (disp - found.disp[right])[body] * spacing
        row |= {
            "group": case.group,
            "patients": case.patients,
            "score": real_pairs.told(scored),
            "shift_mm": float(np.linalg.norm(apart, axis=-1).mean()),
        }
        rows.append(row)
    return rows


def interval(rows: Sequence[dict], values: Sequence[float]) -> tuple[float, float]:
    """95 % of the means over all draws of patients with replacement.

    Args:
        rows: pairs, each with `patients`.
        values: of the same pairs.

    Returns:
        Lower and upper end; NaN unless there are four to six patients.
    """
    patients = [row["patients"] for row in rows]
    names = sorted({name for pair in patients for name in pair})
    if not 4 <= len(names) <= 6:
        return float("nan"), float("nan")
    draws = itertools.product(names, repeat=len(names))
    counts = np.array([[draw.count(name) for name in names] for draw in draws])
    return real_pairs.interval(*real_pairs.drawn_sums(patients, values, counts))


def table_of_conditions(rows: list[dict], group: str) -> str:
    """Markdown: one line per condition of one group of pairs."""
    mine = [row for row in rows if row["group"] == group]
    unit = "DSC %" if mine[0].get("dsc") is not None else "TRE mm"
    region, pair_type = (part.name.lower() for part in RIGHT[group])
    by_condition: dict = {}
    for row in mine:
        by_condition.setdefault((row["region"], row["type"]), []).append(row)
    right = [row["score"] for row in by_condition[region, pair_type]]
    lines = [
        f"| region, type | {unit} | against the right one | p | field differs by mm | "
        "folds % | SDlogJ |",
        "|---|---|---|---|---|---|---|",
    ]
    for (where, kind), here in by_condition.items():
        score = np.array([row["score"] for row in here])
        name = "pre-alignment alone" if where is None else f"{where}, {kind}"
        more, p = "", ""
        if (where, kind) == (region, pair_type):
            name = f"**{name}** (right)"
        else:
            change = score - right
            more = f"{change.mean():+.2f}{_span(interval(here, change))}"
            p = _chance(change) if len(here) > 5 else "–"
        lines.append(
            f"| {name} | {score.mean():.2f}{_span(interval(here, score))} | {more} | "
            f"{p} | {np.mean([r['shift_mm'] for r in here]):.2f} | "
            f"{np.mean([r['fold_percent_network'] for r in here]):.2f} | "
            f"{np.mean([r['sdlogj_network'] for r in here]):.2f} |"
        )
    return "\n".join(lines)


def _chance(change: np.ndarray) -> str:
    p, _ = signed_rank(change[change != 0])
    return "< 0.001" if p < 1e-3 else f"{p:.3f}"


def _span(ends: tuple[float, float], digits: int = 2) -> str:
    low, high = (f"{end:.{digits}f}" for end in ends)
    return "" if ends[0] != ends[0] else f" ({low} … {high})"


def prealignments(data: Path, model, split: str, affine: str) -> dict:
    """Results of `real_results` from one pre-alignment."""
    rows = real_results.headneck(data, model, split=split, affine=affine)
    for row in rows:
        row["patients"] = (row["fixed"], row["moving"])
    found = {"headneck": rows} | {
        task: real_results.landmarks(data, model, task, affine=affine)
        for task in LANDMARKS
    }
    read = Scans(data)
    for group, names, truth in between(read, BETWEEN_GROUPS):
        result = registration.register(
            *(read(name) for name in names),
            task=group.removesuffix("_inter"),
            pair_type="inter",
            affine=affine,
            weights=model,
        )
        row = real_pairs.overlaps(truth, result)
        row |= {"patients": names, "folds": result.qc["fold_percent_network"]}
        found.setdefault(group, []).append(row)
    return found


def table_of_prealignments(results: dict[str, dict]) -> str:
    """Markdown: one line per pre-alignment; the last columns are of two patients."""
    groups = [g for g in BETWEEN_GROUPS if g in next(iter(results.values()))]
    lines = [
        "| `--affine` | DSC₇ after it | network | by the network | pairs better | "
        "folds % | liver TRE mm | lung TRE mm | "
        + " | ".join(f"{g.removesuffix('_inter')} DSC %, folds %" for g in groups)
        + " |",
        "|" + "---|" * (8 + len(groups)),
    ]
    for name, result in results.items():
        rows = result["headneck"]
        before, after = (
            100 * np.array([row[f"dsc_{stage}"] for row in rows])
            for stage in ("affine", "network")
        )
        folds = np.mean([row["fold_percent_network"] for row in rows])
        errors = [
            " → ".join(f"{result[task][f'tre_{s}']:.2f}" for s in ("affine", "network"))
            for task in LANDMARKS
        ]
        lines.append(
            f"| {name} | {before.mean():.1f}{_span(interval(rows, before), 1)} | "
            f"**{after.mean():.1f}**{_span(interval(rows, after), 1)} | "
            f"{(after - before).mean():+.1f}{_span(interval(rows, after - before), 1)}"
            f" | {int((after > before).sum())} of {len(rows)} | {folds:.2f} | "
            f"{errors[0]} | {errors[1]} | "
            + " | ".join(_told_between(result[group]) for group in groups)
            + " |"
        )
    return "\n".join(lines)


def _told_between(rows: list[dict]) -> str:
    """Affine -> network, and folds, means over the pairs of a group."""
    before, after, folds = (
        np.mean([row[key] for row in rows])
        for key in ("dsc_affine", "dsc_network", "folds")
    )
    return f"{100 * before:.1f} → {100 * after:.1f}, {folds:.2f}"


# How the network is asked: rows of the table of each patient.
ASKED = {
    "one pass": {"passes": 1, "symmetric": False},
    "two, both ways": {"passes": 2, "symmetric": True},
}


def itself(data: Path, model, split: str) -> list[dict]:
    """Each held-out patient onto itself: a perfect network would not move."""
    rows = []
    patients = sorted({name for pair in real_pairs.SPLITS[split] for name in pair})
    for case, (name, how) in itertools.product(patients, ASKED.items()):
        scan = nifti.read_image(real_pairs.headneck_case(data, case)[0])
        found = registration.register(
            scan, scan, task="headneck", weights=model, affine="none", **how
        )
        keys = ("max_mm_network", "p99_mm_network", "fold_percent_network")
        rows.append(
            {"patient": case, "asked": name} | {key: found.qc[key] for key in keys}
        )
    return rows


def table_of_itself(rows: list[dict]) -> str:
    """Markdown: one line per patient and way of asking."""
    lines = [
        "| patient onto itself | passes | longest mm | 99 % below mm | folds % |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['patient']} | {row['asked']} | {row['max_mm_network']:.1f} | "
        f"{row['p99_mm_network']:.1f} | {row['fold_percent_network']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def all_conditions(data: Path, model, split: str) -> list[dict]:
    """Rows of `conditions` of every pair."""
    used = {
        task: real_results.landmarks(data, model, task)["affine_used"]
        for task in LANDMARKS
    }
    return [
        row
        for case in tqdm(cases(data, used, split), disable=not on_terminal())
        for row in conditions(case, model)
    ]


def tables_of_conditions(rows: list[dict]) -> str:
    """Markdown: a table per group of pairs."""
    text = []
    for group in dict.fromkeys(row["group"] for row in rows):
        count = sum(r["group"] == group and r["region"] is None for r in rows)
        text.append(f"{group}, {count} pairs\n\n{table_of_conditions(rows, group)}")
    return "\n\n".join(text)


def all_prealignments(data: Path, model, split: str) -> dict[str, dict]:
    """Results from each pre-alignment."""
    return {kind: prealignments(data, model, split, kind) for kind in AFFINES}


def table_of_trainings(trainings: Sequence[list[dict]]) -> str:
    """Markdown: one line per condition, over several trainings.

    Args:
        trainings: rows of `all_conditions`, each of head-neck patients of its own.
    """
    groups = list(dict.fromkeys(row["group"] for row in trainings[0]))
    columns = [g + (" TRE mm" if g in LANDMARKS else " DSC %") for g in groups[1:]]
    lines = [
        "| region, type | headneck DSC % (95 %) | against the right one | of each "
        "training | folds % | " + " | ".join(columns) + " |",
        "|" + "---|" * (5 + len(columns)),
    ]
    right = tuple(part.name.lower() for part in RIGHT["headneck"])
    for condition in dict.fromkeys((r["region"], r["type"]) for r in trainings[0]):
        name = "pre-alignment alone" if condition[0] is None else ", ".join(condition)
        mine = [_of(rows, "headneck", condition) for rows in trainings]
        pairs = [[row["patients"] for row in rows] for rows in mine]
        score = [np.array([row["score"] for row in rows]) for rows in mine]
        more = ["", ""]
        if condition != right:
            change = [
                own - [row["score"] for row in _of(rows, "headneck", right)]
                for own, rows in zip(score, trainings, strict=True)
            ]
            more = [_mean_of_parts(pairs, change, "+"), _each(change, "+")]
        folds = [row["fold_percent_network"] for rows in mine for row in rows]
        cells = [_mean_of_parts(pairs, score), *more, f"{np.mean(folds):.2f}"]
        for group in groups[1:]:
            means = [
                np.mean([row["score"] for row in _of(rows, group, condition)])
                for rows in trainings
            ]
            spread = f" ({min(means):.2f} … {max(means):.2f})"
            cells.append(f"{np.mean(means):.2f}{spread if np.ptp(means) else ''}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _of(rows: list[dict], group: str, condition: tuple) -> list[dict]:
    """Rows of one group under one condition, in their order."""
    keys = ("group", "region", "type")
    return [row for row in rows if tuple(row[k] for k in keys) == (group, *condition)]


def _mean_of_parts(pairs, values: list[np.ndarray], sign: str = "") -> str:
    ends = real_pairs.interval_of_parts(list(zip(pairs, values, strict=True)))
    return f"{np.concatenate(values).mean():{sign}.2f}{_span(ends)}"


def _each(values: list[np.ndarray], sign: str) -> str:
    return ", ".join(f"{v.mean():{sign}.2f}" for v in values)


def read(folders: Sequence[str]) -> list[list[dict]]:
    """Rows of conditions of several trainings.

    Args:
        folders: --out of each.

    Raises:
        UserError: exit code 2, none there, or patients that two trainings left out.
    """
    trainings, seen = [], set()
    for folder in folders:
        path = Path(folder) / "conditions.json"
        if not path.is_file():
            raise UserError("not_found", f"--join: {path} is not there", USAGE)
        trainings.append(json.loads(path.read_text())["conditions"])
        mine = {
            name
            for row in trainings[-1]
            for name in row["patients"]
            if row["group"] == "headneck"
        }
        if twice := sorted(seen & mine):
            raise UserError(
                "schema",
                f"--join: each patient in one training expected, got "
                f"{', '.join(twice)} in two; name each once",
                USAGE,
            )
        seen |= mine
    return trainings


PARTS = {
    "conditions": (all_conditions, tables_of_conditions),
    "prealignments": (all_prealignments, table_of_prealignments),
    "itself": (itself, table_of_itself),
}


def main(argv) -> None:
    del argv
    if flags.FLAGS.join:
        print(table_of_trainings(read(flags.FLAGS.join)))
        return
    cli.setup()
    data, out = Path(flags.FLAGS.data), Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    split = flags.FLAGS.split
    model = registration.load_model(flags.FLAGS.weights or real_pairs.weights_of(split))
    for part in flags.FLAGS.parts:
        measure, table = PARTS[part]
        found = measure(data, model, split)
        kept = {"weights_sha256": model.spec.get("sha256"), part: found}
        (out / f"{part}.json").write_text(json.dumps(kept, indent=1))
        print(f"{table(found)}\n", flush=True)


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder of the collection.")
    flags.DEFINE_string("out", "runs/ablations", "Where a .json per part goes.")
    flags.DEFINE_string("weights", None, "File, or name in the package; by --split.")
    flags.DEFINE_multi_enum("parts", [*PARTS], [*PARTS], "What to measure.")
    flags.DEFINE_enum("split", "val", [*real_pairs.SPLITS], "Head-neck patients.")
    flags.DEFINE_multi_string("join", None, "Instead: an --out; may repeat.")
    flags.mark_flags_as_mutual_exclusive(["data", "join"], required=True)
    cli.run(main)
