"""Results over all head-neck patients: each is held out once, in four parts.

    python -m experiments.compare_peers --data=FOLDER --out=runs/peers
    python -m experiments.compare_peers --data=FOLDER --split=fold1 \
        --out=runs/fold1/peers
    ... fold2, fold3: each with the weights that never saw its patients ...
    python -m experiments.cross_validate --part=runs/peers --part=runs/fold1/peers \
        --part=runs/fold2/peers --part=runs/fold3/peers

Reads the rows that compare_peers left in each folder and prints one table: means over
the pairs of all parts, over those of each part, and, of the two pairs with landmarks,
which are the same in all parts, the spread over the weights. Below it, by how much each
method is ahead of --against and of the affine.

Intervals: 95 % of the means over 10 000 draws of the patients of each part with
replacement; a pair counts as often as both of its patients were drawn.
"""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import cli, real_pairs
from experiments.compare_peers import RESULTS, read_rows, same_start
from experiments.real_pairs import LANDMARKS
from unireg_jax.errors import USAGE, UserError

_BASE = "ours: affine"
Rows = list[dict[str, Any]]


def read(folder: Path) -> Rows:
    """Rows of one part, on the grid of 4 mm, that did not fail.

    Says which did, and where methods of one pair began at different affines.

    Args:
        folder: --out of compare_peers.

    Raises:
        UserError: exit code 2, no rows there.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise UserError("not_found", f"--part: {path} is not there", USAGE)
    rows = [row for row in read_rows(path).values() if row["spacing"] == 4]
    for row in rows:
        if "failed" in row:
            print(f"{path}: left out: {row['method']}, {row['pair']}: {row['failed']}")
    by_pair = collections.defaultdict(list)
    for row in rows:
        by_pair[row["pair"]] += [row] if "start" in row else []
    for pair, found in by_pair.items():
        if not all(same_start(row, found[0]["start"]) for row in found):
            print(f"{path}: {pair}: methods began at different affines; redo it")
    return [row for row in rows if "failed" not in row]


def patients(row: dict[str, Any]) -> tuple[str, str]:
    """Fixed and moving of a head-neck pair."""
    _, fixed, moving = row["pair"].split("_")
    return fixed, moving


def check(parts: Sequence[Rows]) -> list[str]:
    """Methods of which all parts have head-neck rows.

    Raises:
        UserError: exit code 2, a patient is in two parts, or no method in all.
    """
    seen: set[str] = set()
    for rows in parts:
        mine = {p for row in rows if row["task"] == "headneck" for p in patients(row)}
        if twice := sorted(seen & mine):
            raise UserError(
                "schema",
                f"--part: each patient in one part expected, got {', '.join(twice)} in "
                "two; name each part once",
                USAGE,
            )
        seen |= mine
    names = [
        list(dict.fromkeys(r["method"] for r in rows if r["task"] == "headneck"))
        for rows in parts
    ]
    shared = [name for name in names[0] if all(name in others for others in names)]
    if _BASE not in shared:
        raise UserError(
            "schema",
            f"--part: head-neck rows of {_BASE!r} in every part expected, got methods "
            f"{', '.join(shared) or 'none'} in all; run compare_peers in each",
            USAGE,
        )
    return shared


def interval(parts: Sequence[Rows], values: Sequence[np.ndarray]) -> tuple[float, ...]:
    """95 % of the means over draws of patients.

    Args:
        parts: head-neck rows of one method.
        values: of the same rows, part by part.

    Returns:
        Lower and upper end.
    """
    pairs = ([patients(row) for row in rows] for rows in parts)
    return real_pairs.interval_of_parts(list(zip(pairs, values, strict=True)))


def table(parts: Sequence[Rows], against: str) -> str:
    """Markdown: one row per method.

    Args:
        parts: of `read`.
        against: a method that the others are compared with.
    """
    names = check(parts)
    lines = [
        "| method | pairs | DSC₇ %, mean (95 %) | of each part | in shared slices | "
        f"better than the affine | than {against} | folds %, mean (max) | "
        "liver TRE mm | lung TRE mm |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def dsc(name: str) -> dict[str, float]:
        return _by_pair(_headneck(parts, name))

    def better(mine: dict[str, float], name: str) -> str:
        other = dsc(name) if name in names else {}
        both = mine.keys() & other.keys()
        more = sum(mine[pair] > other[pair] for pair in both)
        return f"{more} of {len(both)}" if both and mine != other else "-"

    for name in names:
        mine = _headneck(parts, name)
        values = [np.array([row["dsc_percent"] for row in rows]) for rows in mine]
        shared, folds = (
            np.array([row[key] for rows in mine for row in rows])
            for key in ("shared_percent", "fold_percent")
        )
        every = np.concatenate(values)
        low, high = interval(mine, values)
        errors = []
        for task in LANDMARKS:
            found = [
                row["tre_mm"]
                for rows in parts
                for row in rows
                if row["method"] == name and row["task"] == task
            ]
            errors.append(_span(found))
        lines.append(
            f"| {name} | {len(every)} | **{every.mean():.1f}** ({low:.1f} … {high:.1f})"
            f" | {', '.join(f'{v.mean():.1f}' for v in values)} | "
            f"{shared.mean():.1f} | {better(dsc(name), _BASE)} | "
            f"{better(dsc(name), against)} | {folds.mean():.2f} ({folds.max():.2f}) | "
            f"{errors[0]} | {errors[1]} |"
        )
    return "\n".join(lines)


def gains(parts: Sequence[Rows], against: str) -> str:
    """Markdown: by how much each method is ahead of another, pair by pair.

    Args:
        parts: of `read`.
        against: the other method; nothing is said without its rows.
    """
    other = _by_pair(_headneck(parts, against))
    lines = []
    for name in check(parts):
        mine = [
            [row for row in rows if row["pair"] in other]
            for rows in _headneck(parts, name)
        ]
        more = [
            np.array([row["dsc_percent"] - other[row["pair"]] for row in rows])
            for rows in mine
        ]
        every = np.concatenate(more)
        if name == against or not len(every):
            continue
        low, high = interval(mine, more)
        lines.append(
            f"- {name} against {against}: {every.mean():+.1f} ({low:.1f} … {high:.1f}) "
            f"points of DSC over {len(every)} pairs"
        )
    return "\n".join(lines)


def _headneck(parts: Sequence[Rows], name: str) -> list[Rows]:
    """Head-neck rows of one method, part by part."""
    return [
        [row for row in rows if row["method"] == name and row["task"] == "headneck"]
        for rows in parts
    ]


def _by_pair(parts: Sequence[Rows]) -> dict[str, float]:
    return {row["pair"]: row["dsc_percent"] for rows in parts for row in rows}


def _span(values: Sequence[float]) -> str:
    """Mean, and least and most where they differ."""
    if not values:
        return "-"
    text = f"{np.mean(values):.2f}"
    if max(values) - min(values) < 5e-3:
        return text
    return f"{text} ({min(values):.2f} … {max(values):.2f})"


def main(argv) -> None:
    del argv
    parts = [read(Path(folder)) for folder in flags.FLAGS.part]
    print(table(parts, flags.FLAGS.against))
    for other in (flags.FLAGS.against, _BASE):
        print(f"\n{gains(parts, other)}")


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_multi_string("part", None, "Folders of compare_peers, one per part.")
    flags.DEFINE_string("against", "greedy", "A method that all are compared with.")
    flags.mark_flags_as_required(["part"])
    cli.run(main)
