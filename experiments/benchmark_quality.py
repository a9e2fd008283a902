"""How many good pairs and how many seeded failures quality control flags.

    python -m experiments.benchmark_quality --data=FOLDER --out=runs/quality
    python -m experiments.benchmark_quality --data=FOLDER --out=runs/others --others

Registers real pairs of one body region, phantoms, and pairs that must fail: another
part of the body, a moving scan with one axis turned round, one 80 mm away without
pre-alignment, and a scan of one value; judges each by `evaluation/quality.py` alone.
Labels and landmarks are looked at only to say which of the real pairs succeeded: mean
DSC of at least 0.3, or a mean landmark error of at most 10 mm. A pair whose map folds
in more than 2 % of the body, counted on the fixed scan's own grid, is no success even
then: such a flag is right. One that was 80 mm away and was found all the same is no
failure. Writes quality.json after every pair and goes on where it stopped; prints the
table of docs/quality.md, over all and by halves of the patients.

Limits were chosen on these pairs; --others takes other pairs of the same scans.
"""

import collections
import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipeline import store, synthetic
from experiments import cli, digests, real_pairs, real_scans
from experiments.real_pairs import LANDMARKS
from experiments.real_scans import HELD_OUT
from unireg_jax import registration
from unireg_jax.errors import LIMIT, USAGE, UserError, on_terminal
from unireg_jax.evaluation import metrics, quality, regularity
from unireg_jax.imaging import nifti, points, preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.tasks import TASKS

SUCCESS_DSC, SUCCESS_TRE_MM, SUCCESS_FOLD_PERCENT = 0.3, 10.0, 2.0
_LIVER = "liver_multiphase/liver_hcc007_t1"
_TOTALSEG = {i: i for i in (1, 2, 3, 5, 6, 7, 52, 63, 64)}  # organs of the abdomen
_LUNGS = dict.fromkeys(range(10, 15), 10)  # lobes
# Name -> task, image, labels and what their ids are called here.
SCANS: dict[str, tuple[str, str, str | None, dict[int, int]]] = {
    "liver_pre": ("liver", f"{_LIVER}/pre.nii.gz", None, {}),
    "liver_art": ("liver", f"{_LIVER}/art.nii.gz", None, {}),
    "liver_pvp": ("liver", f"{_LIVER}/pvp.nii.gz", None, {}),
    "lung_baseline": ("lung", "lung_elastix/baseline.nii.gz", None, {}),
    "lung_followup": ("lung", "lung_elastix/followup.nii.gz", None, {}),
    "chest_lidc": (
        *("chest", "chest_lidc0001/ct.nii.gz"),
        *("chest_lidc0001/labels_totalseg.nii.gz", _LUNGS),
    ),
    "chest_nsclc": (
        *("chest", "chest_nsclc_r01_001/ct.nii.gz"),
        *("chest_nsclc_r01_001/labels_auto.nii.gz", {1: 10}),
    ),
    "abdomen_lidc": (
        *("abdomen", "chest_lidc0001/ct.nii.gz"),
        *("chest_lidc0001/labels_totalseg.nii.gz", _TOTALSEG),
    ),
    "abdomen_ts": (
        *("abdomen", "abdomen_totalseg_example/ct.nii.gz"),
        *("abdomen_totalseg_example/labels_totalseg.nii.gz", _TOTALSEG),
    ),
    "abdomen_chaos": (
        *("abdomen", "abdomen_chaos/ct.nii.gz"),
        *("abdomen_chaos/label_liver.nii.gz", {1: 5}),
    ),
}
HEADNECK = (
    *HELD_OUT,
    *("0004", "0013", "0017", "0034"),
    *("0059", "0060", "0082", "0083", "0087", "0095", "0099", "0109"),
)
for _case in HEADNECK:
    SCANS[f"headneck_{_case}"] = (
        *("headneck", f"headneck_openkbp/images/case_{_case}.nii.gz"),
        f"headneck_openkbp/labels/case_{_case}.nii.gz",
        {i: i for i in range(1, 8)},
    )
# Limits are looked at on these patients, as fixed ones, and held against the others.
FIRST_HALF = tuple(f"headneck_{case}" for case in HEADNECK[:8]) + (
    *("liver_pre", "liver_art", "liver_pvp", "chest_lidc", "abdomen_lidc"),
    *("abdomen_chaos",),
)
# Another part of the body; a neck and a chest share the upper thorax.
WRONG = (
    ("headneck_0022", "chest_nsclc"),
    ("headneck_0112", "abdomen_ts"),
    ("chest_nsclc", "headneck_0061"),
    ("abdomen_ts", "headneck_0096"),
    ("abdomen_chaos", "headneck_0082"),
    ("liver_pvp", "headneck_0004"),
    ("lung_baseline", "abdomen_ts"),
    ("lung_followup", "headneck_0059"),
)
SEEDED = (
    ("headneck_0061", "headneck_0096"),
    ("headneck_0112", "headneck_0004"),
    ("liver_pvp", "liver_art"),
    ("lung_baseline", "lung_followup"),
    ("chest_lidc", "chest_nsclc"),
    ("chest_nsclc", "chest_lidc"),
    ("abdomen_chaos", "abdomen_lidc"),
)
OTHER_WRONG = (
    ("headneck_0061", "chest_nsclc"),
    ("headneck_0004", "abdomen_chaos"),
    ("chest_nsclc", "headneck_0112"),
    ("chest_lidc", "headneck_0083"),
    ("abdomen_ts", "headneck_0013"),
    ("abdomen_chaos", "headneck_0034"),
    ("liver_art", "headneck_0087"),
    ("lung_followup", "abdomen_chaos"),
)
OTHER_SEEDED = (
    ("headneck_0022", "headneck_0112"),
    ("headneck_0013", "headneck_0059"),
    ("headneck_0083", "headneck_0095"),
    ("liver_art", "liver_pre"),
    ("lung_followup", "lung_baseline"),
    ("abdomen_ts", "abdomen_chaos"),
    ("abdomen_lidc", "abdomen_chaos"),
)


class Job(NamedTuple):
    """One registration.

    Attributes:
        kind: "good", "phantom", or of a seeded failure.
        fixed, moving: names of scans.
        axis: of the fault, 0 to 2; None for none.
    """

    kind: str
    fixed: str
    moving: str
    axis: int | None = None


def jobs(*, others: bool = False) -> list[Job]:
    """All of them, in a mixed order, so that a part of the run is a fair sample.

    Args:
        others: pairs that no limit was chosen on. Of the same scans, and without scans
            of one value, which need no limit.
    """
    ring = [f"headneck_{case}" for case in HEADNECK]
    if others:
        steps, seeds, wrong, seeded = (3, 11), (3, 4), OTHER_WRONG, OTHER_SEEDED
    else:
        steps, seeds, wrong, seeded = (1,), (1, 2), WRONG, SEEDED
    good = [
        (name, ring[(i + step) % len(ring)])
        for step in steps
        for i, name in enumerate(ring)
    ]
    # Of the other regions all pairs are among the first.
    for task in ("liver", "lung", "chest", "abdomen") if not others else ():
        names = [name for name, scan in SCANS.items() if scan[0] == task]
        good += itertools.permutations(names, 2)
    out = [Job("good", *pair) for pair in good]
    out += [Job("phantom", t, str(seed)) for t in sorted(TASKS) for seed in seeds]
    out += [Job("wrong", *pair) for pair in wrong]
    out += [Job("flip", *pair, axis) for pair in seeded for axis in range(3)]
    out += [Job("shift", *pair, i % 3) for i, pair in enumerate(seeded)]
    if not others:
        out += [Job("constant", *pair, i % 2) for i, pair in enumerate(seeded[:4])]
    random.Random(0).shuffle(out)
    return out


class Scans:
    """The collection's scans and labels, read when first asked for."""

    def __init__(self, data: Path):
        self._data, self._kept = data, {}

    def path(self, name: str) -> Path:
        """A file of the collection."""
        return self._data / name

    def __call__(self, name: str, *, labels: bool = False) -> Volume | None:
        """Image or labels; None where there are no labels."""
        _, image, label, names = SCANS[name]
        if labels and label is None:
            return None
        key = name, labels
        if key not in self._kept:
            self._kept[key] = (
                _renamed(nifti.read_labels(self._data / label), names)
                if labels
                else nifti.read_image(self._data / image)
            )
        return self._kept[key]


def _renamed(volume: Volume, names: dict[int, int]) -> Volume:
    data = np.zeros(volume.data.shape, np.uint8)
    for old, new in names.items():
        data[volume.data == old] = new
    return volume._replace(data=data)


def judge(job: Job, scans: Scans, session) -> dict[str, Any]:
    """Registers one pair and judges it; labels and landmarks only for the truth."""
    labels = (None, None)
    if job.kind == "phantom":
        pair = synthetic.pair(job.fixed, seed=int(job.moving))
        task, fixed, moving = job.fixed, *map(_volume, pair[:2])
        labels = tuple(
            volume._replace(data=p.labels.astype(np.uint8))
            for volume, p in zip((fixed, moving), pair[:2], strict=True)
        )
    else:
        task = SCANS[job.fixed][0]
        fixed, moving = scans(job.fixed), scans(job.moving)
        if job.kind in ("good", "shift"):
            labels = tuple(scans(n, labels=True) for n in (job.fixed, job.moving))
    stood = moving.vox2world
    near = _near(fixed, moving)
    moving = moving._replace(vox2world=near @ moving.vox2world)
    fixed, moving = _broken(job, fixed, moving)
    affine = "none" if job.kind == "shift" else "auto"
    row: dict[str, Any] = job._asdict()
    try:
        result = session.run(
            fixed,
            moving,
            registration.check_settings(task, None, affine),
            affine=affine,
            clock=registration.Clock(),
        )
    except UserError as error:
        if error.exit_code == LIMIT:  # says nothing of the pair
            raise
        return row | {"refused": error.reason}
    row["type"] = quality.kind_of(result.settings)
    started = time.perf_counter()
    row |= quality.measure(fixed, moving, result.disp_mm, result.affine)
    row["seconds"] = time.perf_counter() - started
    if all(labels):
        other = labels[1]._replace(vox2world=moving.vox2world)
        stages = metrics.warp_stages(
            result.disp_mm, result.vox2world, result.affine, other, labels[0]
        )
        row["truth"] = {
            name: _mean_dsc(labels[0], warped, other) for name, warped in stages.items()
        }
    elif job.kind in ("good", "shift"):
        moved = moving.vox2world @ np.linalg.inv(stood)
        if errors := _landmarks(job, scans, result, moved):
            row["truth"] = errors
    if job.kind in ("good", "phantom"):
        row["truth"] = row.get("truth", {}) | {"folds": _folds(fixed, result)}
    return metrics.as_json(row)


def _volume(phantom) -> Volume:
    return Volume(phantom.hu, phantom.vox2world)


def _near(fixed: Volume, moving: Volume) -> np.ndarray:
    """Brings scans whose tables' zeros are far apart into one room."""

    def center(volume):
        middle = (np.array(volume.data.shape) - 1) / 2
        return volume.vox2world[:3, :3] @ middle + volume.vox2world[:3, 3]

    shift, out = center(fixed) - center(moving), np.eye(4)
    if np.linalg.norm(shift) > 400:
        out[:3, 3] = shift
    return out


def _broken(job: Job, fixed: Volume, moving: Volume) -> tuple[Volume, Volume]:
    """The pair with the fault of its kind."""
    if job.kind == "flip":
        turned = np.ascontiguousarray(np.flip(moving.data, job.axis))
        return fixed, moving._replace(data=turned)
    if job.kind == "shift":
        place = moving.vox2world.copy()
        place[job.axis, 3] += 80
        return fixed, moving._replace(vox2world=place)
    if job.kind == "constant":
        flat = [fixed, moving]
        data = np.full_like(flat[job.axis].data, 40)
        flat[job.axis] = flat[job.axis]._replace(data=data)
        return tuple(flat)
    return fixed, moving


def _folds(fixed: Volume, result) -> float:
    """Share of the body where the map folds, percent, on the scan's own grid."""
    detj = regularity.jacobian_determinant(result.disp_mm, result.vox2world)
    body = preprocess.body_mask(fixed)[1:-1, 1:-1, 1:-1]
    return 100 * float((detj[body] <= 0).mean())


def _mean_dsc(fixed: Volume, warped: np.ndarray, moving: Volume) -> float:
    """Mean over the labels that both scans have."""
    shared = set(np.unique(fixed.data)) & set(np.unique(moving.data)) - {0}
    scores = metrics.label_scores(
        fixed.data, warped, fixed.spacing_mm, ids=map(int, shared), surface=False
    )
    return float(np.mean([row["dsc"] for row in scores.values()] or [np.nan]))


def _landmarks(job: Job, scans: Scans, result, moved) -> dict[str, float] | None:
    """Mean landmark error where the collection has points, mm."""
    for fixed, moving, csv in LANDMARKS.values():
        if [SCANS[n][1] for n in (job.fixed, job.moving)] == [fixed, moving]:
            pairs = points.read_points(scans.path(csv))
            there = pairs.moving @ moved[:3, :3].T + moved[:3, 3]
            before, after = metrics.landmark_errors(
                result.disp_mm, result.vox2world, pairs.fixed, there
            )
            return {"tre_before": float(before.mean()), "tre": float(after.mean())}
    return None


# --- the table ----------------------------------------------------------------------

KINDS = {
    "wrong": "another part of the body",
    "shift": "80 mm away, without pre-alignment",
    "found": "80 mm away, found all the same",
    "flip 0": "left and right exchanged",
    "flip 1": "front and back exchanged",
    "flip 2": "head and feet exchanged",
    "constant": "a scan of one value",
    "failed": "fit, yet failed",
    "folds": "fit, truth agrees but the map folds",
    "succeeded": "real, succeeded",
    "phantom": "phantoms, succeeded",
    "unknown": "fit, without labels or landmarks: in no sum",
}
GOOD = ("succeeded", "found", "phantom")


def flags_of(row: dict[str, Any]) -> list[str]:
    """Names of the numbers out of bounds; the reason of a pair that was refused."""
    if "refused" in row:
        return [f"refused: {row['refused']}"]
    return [f.name for f in quality.judge(row, row["type"])]


def succeeded(row: dict[str, Any]) -> bool | None:
    """What labels or landmarks say; None without them."""
    truth = row.get("truth") or {}
    if truth.get("network") is not None:
        return truth["network"] >= SUCCESS_DSC
    return truth["tre"] <= SUCCESS_TRE_MM if "tre" in truth else None


def kind_of(row: dict[str, Any]) -> str:
    """One of KINDS."""
    if row["kind"] == "flip":
        return f"flip {row['axis']}"
    agrees = "refused" not in row and succeeded(row)
    if row["kind"] == "shift" and agrees:
        return "found"
    if row["kind"] not in ("good", "phantom"):
        return row["kind"]
    if agrees is not False and row["truth"]["folds"] > SUCCESS_FOLD_PERCENT:
        return "folds"
    right = "phantom" if row["kind"] == "phantom" else "succeeded"
    return {True: right, False: "failed", None: "unknown"}[agrees]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: kinds, sums by halves of the patients, then every surprise."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[kind_of(row)].append(row)
    lines = ["| pairs | count | flagged | by |", "|---|---|---|---|"]
    for kind, title in KINDS.items():
        if members := groups.get(kind):
            found = [flags_of(row) for row in members]
            names = collections.Counter(name for each in found for name in each)
            by = ", ".join(f"{name} {count}" for name, count in names.most_common())
            count = sum(map(bool, found))
            lines.append(f"| {title} | {len(members)} | {count} | {by} |")
    lines += ["", "| fixed patient | good pairs flagged | failures flagged |"]
    lines.append("|---|---|---|")
    for half, name in enumerate(("first half", "second half", "phantoms")):
        members = [r for r in rows if _half(r) == half and kind_of(r) != "unknown"]
        cells = []
        for good in (True, False):
            found = [flags_of(r) for r in members if (kind_of(r) in GOOD) == good]
            cells.append(f"{sum(map(bool, found))} of {len(found)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_surprises(groups)])


def _half(row: dict[str, Any]) -> int:
    if row["kind"] == "phantom":
        return 2
    return 0 if row["fixed"] in FIRST_HALF else 1


def _surprises(groups) -> Iterator[str]:
    """Good pairs that are flagged, and failures that are not."""
    for kind, title in KINDS.items():
        for row in groups.get(kind, ()):
            if kind == "unknown" or bool(flags_of(row)) != (kind in GOOD):
                continue
            values = {k: row.get(k) for k in quality.CHECKS if row.get(k) is not None}
            shown = ", ".join(f"{k} {v:.3g}" for k, v in values.items())
            truth = {k: round(v, 3) for k, v in (row.get("truth") or {}).items() if v}
            yield (
                f"{title}, {row['fixed']} <- {row['moving']}: "
                f"{', '.join(flags_of(row)) or 'not flagged'}; {shown}; {truth}"
            )


def _sources() -> list[Path]:
    """What a row depends on: its pairs, registration and judge."""
    own = [Path(module.__file__) for module in (real_pairs, real_scans)]
    made = Path(synthetic.__file__)
    own += [made, *digests.sources(made.parent / "phantoms")]
    return [Path(__file__), *own, *digests.sources(digests.LIBRARY)]


def main(argv) -> None:
    del argv
    cli.setup()
    out = Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "quality.json"
    plan = registration.Plan() if flags.FLAGS.refine else None
    model = registration.load_model(flags.FLAGS.weights)
    of = {"weights": model.spec["sha256"], "plan": plan and plan._asdict()}
    of["others"] = flags.FLAGS.others
    of["sources"] = digests.of(_sources())[:12]
    kept = json.loads(path.read_text()) if path.exists() else {"of": of, "rows": []}
    if kept["of"] != of:
        raise UserError(
            "schema", f"{path}: rows of {of} expected, got {kept['of']}; --out", USAGE
        )
    rows = kept["rows"]
    done = {Job(**{k: row[k] for k in Job._fields}) for row in rows}
    todo = [job for job in jobs(others=of["others"]) if job not in done]
    scans = Scans(Path(flags.FLAGS.data))
    session = registration.Session(model, refine=plan)
    for job in tqdm(todo, disable=not on_terminal()):
        rows.append(judge(job, scans, session))
        store.write_atomic(path, json.dumps(kept, indent=1).encode())
    print(table(rows))
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    print(f"\n{len(rows)} pairs, judged in {np.median(seconds):.1f} s each (median)")


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("weights", real_pairs.WEIGHTS, "File, or name in the package.")
    flags.DEFINE_string("data", None, "Folder of the collection.")
    flags.DEFINE_string("out", "runs/quality", "Where quality.json goes.")
    flags.DEFINE_bool("refine", False, "Instance optimisation, too; its own --out.")
    flags.DEFINE_bool("others", False, "Pairs that no limit was chosen on; so, too.")
    flags.mark_flags_as_required(["data"])
    cli.run(main)
