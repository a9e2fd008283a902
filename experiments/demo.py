"""The whole path on phantoms: make, train, register, look. Minutes on a CPU.

    python -m experiments.demo --workdir=runs/demo

Leaves in the work folder the run (see experiments/train.py), for one held-out pair per
task pictures/<task>.png, plus metrics.json, and for the last of them the files that
`unireg register` writes.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import flags

from data_pipeline import synthetic
from experiments import cli, figures, real_pairs, train, unireg
from unireg_jax import registration
from unireg_jax.evaluation import metrics
from unireg_jax.imaging import nifti

SPACING_MM = 4.0
SHAPE = (96, 96, 96)
HELD_OUT_SEED = 900


def demo(workdir: Path) -> dict:
    """Trains the demo preset, registers one unseen pair per task, draws it."""
    config = unireg.get_config("demo")
    weights = train.train(config, workdir)
    model = registration.load_model(weights)
    results = {}
    for task in [t for t, share in config.data.weights.items() if share]:
        scans, labels = _pair(workdir / "scans", task)
        result = registration.register(*scans, task=task, weights=model)
        results[task] = _judge(result, labels)
        _draw(
            workdir / "pictures" / f"{task}.png", result, scans, labels, results[task]
        )
        print(_line(task, results[task]), file=sys.stderr)
    (workdir / "metrics.json").write_text(json.dumps(results, indent=1))
    command = ["-m", "unireg_jax", "register", "--task", task, "--overwrite"]
    command += ["--fixed", scans[0], "--moving", scans[1], "--case", task]
    command += ["--weights", weights, "--out", workdir / "register"]
    print("python", *command, file=sys.stderr)
    subprocess.run([sys.executable, *map(str, command)], check=True)
    return results


def _pair(folder: Path, task: str) -> tuple[list[Path], list[nifti.Volume]]:
    """Two NIfTI phantoms that training never saw, and their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    variants = synthetic.variants(task)
    both = [(0, variants[0]), (0, variants[-1])]
    if len(variants) == 1:
        both = [(0, variants[0]), (1, variants[0])]
    scans, labels = [], []
    for role, (subject, variant) in zip(("fixed", "moving"), both, strict=True):
        made = synthetic.phantom(
            task,
            shape=SHAPE,
            spacing_mm=SPACING_MM,
            seed=HELD_OUT_SEED + subject,
            variant=variant,
        )
        path = folder / f"{task}_{role}.nii.gz"
        nifti.write_volume(path, made.hu, made.vox2world)
        scans.append(path)
        labels.append(nifti.Volume(made.labels, np.asarray(made.vox2world)))
    return scans, labels


def _judge(result, labels) -> dict:
    """DSC as the scans lie, pre-aligned and registered; regularity."""
    scores = real_pairs.overlaps(labels, result)
    keys = (
        "fold_percent_network",
        "sdlogj_network",
        "max_mm_network",
        "ncc_before",
        "ncc_after",
    )
    return scores | {k: result.qc[k] for k in keys}


def _draw(path: Path, result, scans, labels, scores) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fixed, moving = (nifti.read_image(p) for p in scans)
    figures.save_registration(
        path,
        fixed.data,
        figures.prealigned(moving, fixed, result.affine),
        result.warped,
        registration.residual_mm(result),
        fixed.spacing_mm,
        title=_line(path.stem, scores),
        labels=(
            labels[0].data,
            metrics.warp_labels(result.disp_mm, result.vox2world, labels[1], labels[0]),
        ),
    )


def _line(task: str, scores: dict) -> str:
    dsc = " -> ".join(
        f"{scores[f'dsc_{s}']:.3f}" for s in ("initial", "affine", "network")
    )
    return (
        f"{task}: DSC initial -> affine -> network {dsc}, "
        f"folds {scores['fold_percent_network']:.3f} %, "
        f"SDlogJ {scores['sdlogj_network']:.3f}"
    )


def main(argv) -> None:
    del argv
    cli.setup()
    workdir = Path(flags.FLAGS.workdir)
    demo(workdir)
    print(f"pictures and metrics: {workdir}")


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("workdir", "runs/demo", "Folder of the demo.")
    cli.run(main)
