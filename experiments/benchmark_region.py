"""How well the body region is told from the image: confusion and alarms.

    python -m experiments.benchmark_region --data=FOLDER --markdown=region.md

Real scans (the collection of experiments/real_scans.py and its label maps) and every
run of slices of 80, 160 or 240 mm out of them; phantoms the same way. A scan is
judged by a model that was fitted without any scan of its source (head-neck: without
four of the sixteen patients); phantoms, by the packaged model, which saw none.
--fit prints the packaged model's numbers, fitted on all real scans but those of
`_ONLY_JUDGED`.

Truth is by slice: lungs of the label map (liver phases: of the image) over 15 % of the
body are chest, under 4 % and below them abdomen; in head-neck scans, from the larynx
upwards head and neck, lungs over 5 % chest. What lies between counts for nothing in a
fit. A run is of a place that holds 70 % of its slices; other runs are mixed: any place
in them with a quarter of the slices is a right answer, one with less than 15 % a wrong
task, and only the commonest one a right task that must not be flagged.
"""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from scipy import optimize

from data_pipeline import synthetic
from experiments import cli
from unireg_jax.errors import USAGE, UserError
from unireg_jax.imaging import nifti
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.preprocess import body_mask
from unireg_jax.registration import region
from unireg_jax.registration.region import PLACES, Model

_RUNS_MM = (80, 160, 240)
_STEP_MM = 40
_FOLDS = 4  # of the head-neck patients
_RIDGE = 1e-2
_LUNG_LOBES = range(10, 15)
_TORSO = {
    "chest_lidc": ("chest_lidc0001/ct", "chest_lidc0001/labels_totalseg", _LUNG_LOBES),
    "chest_nsclc": ("chest_nsclc_r01_001/ct", "chest_nsclc_r01_001/labels_auto", (1,)),
    "lung_baseline": ("lung_elastix/baseline", "lung_elastix/baseline_lungmask", (1,)),
    "lung_followup": ("lung_elastix/followup", "lung_elastix/followup_lungmask", (1,)),
    "abdomen_ts": (
        "abdomen_totalseg_example/ct",
        "abdomen_totalseg_example/labels_totalseg",
        _LUNG_LOBES,
    ),
    "abdomen_chaos": ("abdomen_chaos/ct", None, ()),
    "liver_art": ("liver_multiphase/liver_hcc007_t1/art", None, ()),
    "liver_pvp": ("liver_multiphase/liver_hcc007_t1/pvp", None, ()),
    "liver_pre": ("liver_multiphase/liver_hcc007_t1/pre", None, ()),
}
_LARYNX = 6
# Its terms allow no use in what is shipped: judged, never fitted.
_ONLY_JUDGED = ("abdomen_chaos",)


class Scan(NamedTuple):
    """A scan with what its slices show.

    Attributes:
        name: of the scan.
        source: scans of one source are held out together.
        volume: Volume.
        truth: [Z] index into PLACES, -1 for what lies between.
    """

    name: str
    source: str
    volume: Volume
    truth: np.ndarray


def real_scans(data: Path) -> list[Scan]:
    """Every CT of the collection with the truth of its slices."""
    scans = []
    paths = sorted((data / "headneck_openkbp" / "images").glob("*.nii.gz"))
    for number, path in enumerate(paths):
        volume = nifti.read_image(path)
        labels = nifti.read_labels(data / "headneck_openkbp" / "labels" / path.name)
        larynx = (labels.data == _LARYNX).any(axis=(0, 1))
        truth = np.full(volume.data.shape[2], -1)
        truth[_lung_share(volume) > 0.05] = PLACES.index("chest")
        truth[np.flatnonzero(larynx)[0] :] = PLACES.index("headneck")
        name = path.name.split(".")[0].replace("case", "hn")
        scans.append(Scan(name, f"headneck {number % _FOLDS}", volume, truth))
    for name, (image, label, lungs) in _TORSO.items():
        volume = nifti.read_image(data / f"{image}.nii.gz")
        mask = None
        if label:
            mask = np.isin(nifti.read_labels(data / f"{label}.nii.gz").data, lungs)
        scans.append(Scan(name, name.split("_")[0] + _patient(name), volume, None))
        scans[-1] = scans[-1]._replace(truth=_torso_truth(_lung_share(volume, mask)))
    if not scans:
        raise UserError("not_found", f"--data: no scans in {data}", USAGE)
    return scans


def _patient(name: str) -> str:
    """Phases and breath holds are of one patient."""
    return "" if name.startswith(("liver", "lung")) else f" {name.split('_')[1]}"


def _lung_share(volume: Volume, mask: np.ndarray | None = None) -> np.ndarray:
    """Share of lung in the body, [Z]; by HU without a mask."""
    body = body_mask(volume)
    if mask is None:
        mask = (volume.data > -1000) & (volume.data < -500)
    size = np.maximum(body.sum(axis=(0, 1)), 1)
    return (mask & body).sum(axis=(0, 1)) / size


def _torso_truth(share: np.ndarray) -> np.ndarray:
    """Chest from the lung bases up, abdomen below."""
    truth = np.full(len(share), -1)
    lungs = np.flatnonzero(share > 0.15)
    first, last = (lungs[0], lungs[-1]) if len(lungs) else (len(share), len(share))
    truth[share > 0.15] = PLACES.index("chest")
    z = np.arange(len(share))
    truth[(share < 0.04) & (z < first)] = PLACES.index("abdomen")
    truth[(share < 0.15) & (z > last)] = PLACES.index("chest")
    return truth


def phantom_scans(count: int = 4) -> list[Scan]:
    """Phantoms of every task; the truth of a slice is that of its task."""
    scans = []
    for task, place in (("headneck",) * 2, ("chest",) * 2, ("abdomen",) * 2):
        for seed in range(count):
            made = synthetic.phantom(task, shape=(96, 80, 80), seed=seed)
            names = {n: i + 1 for i, n in enumerate(made.label_names)}
            volume = Volume(made.hu, made.vox2world)
            truth = np.full(made.hu.shape[2], PLACES.index(place))
            if task != "headneck":
                lungs = [names[n] for n in ("lung_left", "lung_right") if n in names]
                mask = np.isin(made.labels, lungs) if lungs else None
                truth = _torso_truth(_lung_share(volume, mask))
            scans.append(Scan(f"{task} {seed}", "phantom", volume, truth))
    return scans


def runs(scan: Scan) -> list[tuple[str, Volume, np.ndarray]]:
    """The whole scan and runs of its slices, with their truth."""
    z_mm = scan.volume.spacing_mm[2]
    length = scan.volume.data.shape[2]
    pieces = [(f"{scan.name} whole", 0, length)]
    for run_mm in _RUNS_MM:
        count, step = round(run_mm / z_mm), max(1, round(_STEP_MM / z_mm))
        pieces += [
            (f"{scan.name} {run_mm} mm from {a * z_mm:.0f}", a, a + count)
            for a in range(0, length - count + 1, step)
            if count < length
        ]
    return [(name, _cut(scan.volume, a, b), scan.truth[a:b]) for name, a, b in pieces]


def _cut(volume: Volume, first: int, end: int) -> Volume:
    vox2world = volume.vox2world.copy()
    vox2world[:3, 3] += volume.vox2world[:3, 2] * first
    return Volume(volume.data[..., first:end], vox2world)


def _narrowed(volume: Volume) -> list[Volume]:
    """The scan, and its left and right half: a small field of view."""
    half = volume.data.shape[0] // 2
    return [volume, *(volume._replace(data=d) for d in np.split(volume.data, [half]))]


def fit(scans: list[Scan]) -> Model:
    """Ridge-penalised logistic model of a slice; every scan has the same weight."""
    rows, truths, weights = [], [], []
    for scan in scans:
        torso = not scan.source.startswith("headneck")
        for volume in _narrowed(scan.volume) if torso else [scan.volume]:
            found, truth = _fit_rows(volume, scan.truth)
            rows.append(found)
            truths.append(truth)
            weights.append(np.full(len(found), 1.0))
    rows, truth = np.concatenate(rows), np.concatenate(truths)
    weight = np.concatenate(weights)
    for place in range(3):  # every place has the same weight
        weight[truth == place] /= max(1, weight[truth == place].sum())
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    design = np.hstack([np.ones((len(rows), 1)), np.clip((rows - mean) / scale, -4, 4)])

    def cost(flat):
        w = flat.reshape(3, -1)
        logits = design @ w.T
        top = logits.max(axis=1, keepdims=True)
        likely = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        probability = np.exp(likely)
        loss = -(weight * likely[np.arange(len(truth)), truth]).sum()
        probability[np.arange(len(truth)), truth] -= 1
        slope = (probability * weight[:, None]).T @ design
        w = w * (np.arange(w.shape[1]) > 0)
        return loss + _RIDGE * (w**2).sum(), (slope + 2 * _RIDGE * w).ravel()

    start = np.zeros(3 * design.shape[1])
    found = optimize.minimize(cost, start, jac=True, method="L-BFGS-B")
    return Model(mean, scale, found.x.reshape(3, -1))


def _fit_rows(volume: Volume, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features of the slices whose truth is known."""
    rows, which, _ = region.slice_features(volume)
    truth = truth[which]
    return rows[truth >= 0], truth[truth >= 0]


def judge(scans: list[Scan], models: dict[str, Model]) -> list[dict]:
    """One row per run: truth, what was seen, alarms per asked place."""
    rows = []
    for scan in scans:
        for name, volume, truth in runs(scan):
            seen = region.estimate_region(volume, model=models[scan.source])
            if not seen.shares:
                continue  # too short, or no body
            counts = [float((truth == i).mean()) for i in range(3)]
            best = int(np.argmax(counts))
            rows.append(
                {
                    "name": name,
                    "whole": name.endswith("whole"),
                    "truth": PLACES[best] if counts[best] >= 0.7 else "mixed",
                    "commonest": PLACES[best],
                    "counts": counts,
                    "seen": seen.place or "unsure",
                    "alarms": [p for p in PLACES if region.mismatch(seen, p)],
                    "shares": seen.shares,
                }
            )
    return rows


def confusion(rows: list[dict]) -> str:
    """Markdown: truth against answer, with the alarms."""
    lines = [
        "| truth | runs | abdomen | chest | headneck | unsure | wrong task flagged | "
        "right task flagged |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for truth in (*PLACES, "mixed"):
        mine = [r for r in rows if r["truth"] == truth]
        if not mine:
            continue
        seen = Counter(r["seen"] for r in mine)
        least = 0.15 if truth == "mixed" else 0.7
        wrong = [
            place in r["alarms"]
            for r in mine
            for place, share in zip(PLACES, r["counts"], strict=True)
            if share < least
        ]
        false = [r["commonest"] in r["alarms"] for r in mine]
        cells = [truth, len(mine), *(seen[p] for p in (*PLACES, "unsure"))]
        cells += [f"{sum(x)} of {len(x)}" for x in (wrong, false)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv) -> None:
    del argv
    scans = real_scans(Path(flags.FLAGS.data))
    fitted = [scan for scan in scans if scan.name not in _ONLY_JUDGED]
    if flags.FLAGS.fit:
        model = fit(fitted)
        for name, values in zip(("_MEAN", "_SCALE"), model[:2], strict=True):
            print(f"{name} = ({', '.join(f'{v:.4g}' for v in values)})")
        print("_WEIGHTS = (")
        for row in model.weights:
            print(f"    ({', '.join(f'{v:.3f}' for v in row)}),")
        print(")")
        return
    sources = sorted({scan.source for scan in scans})
    models = {s: fit([scan for scan in fitted if scan.source != s]) for s in sources}
    tables = {}
    real = judge(scans, models)
    tables["whole real scans"] = [r for r in real if r["whole"]]
    tables["runs of slices of real scans"] = [r for r in real if not r["whole"]]
    made = judge(phantom_scans(), {"phantom": None})
    tables["phantoms, whole and runs"] = made
    text = "\n\n".join(f"{name}:\n\n{confusion(rows)}" for name, rows in tables.items())
    print(text)
    if flags.FLAGS.markdown:
        Path(flags.FLAGS.markdown).write_text(text + "\n", encoding="utf-8")
    if flags.FLAGS.rows:
        Path(flags.FLAGS.rows).write_text(json.dumps(real + made, indent=1))


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder of real scans.", required=True)
    flags.DEFINE_string("markdown", None, "File for the tables.")
    flags.DEFINE_string("rows", None, "File for every run, JSON.")
    flags.DEFINE_bool("fit", False, "Print the packaged model's numbers instead.")
    cli.run(main)
