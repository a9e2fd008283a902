"""Accuracy on real scans: unseen head-neck patients, liver phases, two breath holds.

    python -m experiments.real_results --data=FOLDER --out=runs/results \
        --weights=runs/dynamic/weights.safetensors \
        --weights=runs/static/weights.safetensors

Registers, through the same function as `unireg register`, the 12 ordered pairs of the 4
head-neck patients that training never saw (DSC of 7 organs), the arterial onto the
portal-venous liver phase and the follow-up onto the baseline lung scan (landmark error;
both pairs were in training, without landmarks). Writes results.json, a picture per pair
of the first weights, and prints the table of the README.
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import cli, figures
from experiments.real_scans import HELD_OUT
from unireg_jax import registration
from unireg_jax.evaluation import metrics
from unireg_jax.imaging import nifti, points

LANDMARKS = {
    "liver": (
        "liver_multiphase/liver_hcc007_t1/pvp.nii.gz",
        "liver_multiphase/liver_hcc007_t1/art.nii.gz",
        "liver_multiphase/liver_hcc007_t1/auto_keypoints_pvp_fixed_art_moving.csv",
    ),
    "lung": (
        "lung_elastix/baseline.nii.gz",
        "lung_elastix/followup.nii.gz",
        "lung_elastix/landmarks.csv",
    ),
}


def headneck(
    data: Path, model, *, picture: Path | None = None, affine: str = "auto"
) -> list[dict]:
    """One row per ordered pair of the held-out patients."""
    rows = []
    folder = data / "headneck_openkbp"
    todo = list(itertools.permutations(HELD_OUT, 2))
    for one, other in tqdm(todo, disable=not sys.stderr.isatty()):
        scans = [
            nifti.read_image(folder / f"images/case_{c}.nii.gz") for c in (one, other)
        ]
        fixed, moving = (
            nifti.read_labels(folder / f"labels/case_{c}.nii.gz") for c in (one, other)
        )
        result = registration.register(
            *scans, task="headneck", weights=model, affine=affine
        )
        stages = metrics.warp_stages(
            result.disp_mm, result.vox2world, result.affine, moving, fixed
        )
        row = {"fixed": one, "moving": other, **_regularity(result)}
        for name, warped in stages.items():
            scores = metrics.overlap(fixed, moving, {"": warped}, surface=False)
            row[f"dsc_{name}"] = scores["mean"]["dsc"]
            row[f"labels_{name}"] = {k: v["dsc"] for k, v in scores["labels"].items()}
        rows.append(row)
        if picture:
            figures.save_registration(
                picture / f"headneck_{one}_{other}.png",
                scans[0].data,
                figures.prealigned(scans[1], scans[0], result.affine),
                result.warped,
                registration.residual_mm(result),
                fixed.spacing_mm,
                title=f"{other} -> {one}: DSC {row['dsc_affine']:.3f} -> "
                f"{row['dsc_network']:.3f}",
                labels=(fixed.data, stages["network"]),
            )
    return rows


def landmarks(
    data: Path, model, task: str, *, picture: Path | None = None, affine: str = "auto"
) -> dict:
    """Landmark errors of one intra-patient pair, mm."""
    fixed_path, moving_path, csv = (data / name for name in LANDMARKS[task])
    fixed, moving = nifti.read_image(fixed_path), nifti.read_image(moving_path)
    result = registration.register(
        fixed, moving, task=task, weights=model, affine=affine
    )
    pairs = points.read_points(csv)
    initial, network = metrics.landmark_errors(
        result.disp_mm, result.vox2world, pairs.fixed, pairs.moving
    )
    moved = pairs.fixed @ result.affine[:3, :3].T + result.affine[:3, 3]
    aligned = np.linalg.norm(moved - pairs.moving, axis=1)
    if picture:
        figures.save_registration(
            picture / f"{task}.png",
            fixed.data,
            figures.prealigned(moving, fixed, result.affine),
            result.warped,
            registration.residual_mm(result),
            fixed.spacing_mm,
            title=f"{task}: TRE {aligned.mean():.2f} -> {network.mean():.2f} mm",
        )
    stages = {"initial": initial, "affine": aligned, "network": network}
    return {
        "points": len(network),
        "affine_used": result.settings["affine_used"],
        **{f"tre_{k}": float(v.mean()) for k, v in stages.items()},
        **{f"tre_p95_{k}": float(np.percentile(v, 95)) for k, v in stages.items()},
        **_regularity(result),
    }


def _regularity(result) -> dict:
    keys = ("sdlogj_network", "fold_percent_network", "max_mm")
    return {k: result.qc[k] for k in keys} | {"seconds": result.timings}


def table(results: dict) -> str:
    """Markdown: one row per weights, mean and spread over pairs."""
    lines = [
        "| weights | DSC₇ initial | affine | network, mean (min … max over pairs) | "
        "pairs better | SDlogJ | folds % | liver TRE mm | lung TRE mm |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        rows = result["headneck"]
        dsc = {
            s: 100 * np.array([r[f"dsc_{s}"] for r in rows])
            for s in ("initial", "affine", "network")
        }
        better = int((dsc["network"] > dsc["affine"]).sum())
        tre = [
            " → ".join(f"{result[t][f'tre_{s}']:.2f}" for s in dsc) for t in LANDMARKS
        ]
        lines.append(
            f"| {name} | {dsc['initial'].mean():.1f} | {dsc['affine'].mean():.1f} | "
            f"**{dsc['network'].mean():.1f}** ({dsc['network'].min():.1f} … "
            f"{dsc['network'].max():.1f}) | {better} of {len(rows)} | "
            f"{np.mean([r['sdlogj_network'] for r in rows]):.2f} | "
            f"{np.mean([r['fold_percent_network'] for r in rows]):.3f} | "
            f"{tre[0]} | {tre[1]} |"
        )
    return "\n".join(lines)


def main(argv) -> None:
    del argv
    cli.setup()
    data, out = Path(flags.FLAGS.data), Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for i, path in enumerate(flags.FLAGS.weights or [None]):
        model = registration.load_model(path)
        picture = out if i == 0 else None
        name = Path(path).parent.name if path else "released"
        results[name] = {"headneck": headneck(data, model, picture=picture)} | {
            task: landmarks(data, model, task, picture=picture) for task in LANDMARKS
        }
        (out / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder of the collection.")
    flags.DEFINE_string("out", "runs/results", "Where results and pictures go.")
    flags.DEFINE_multi_string("weights", [], "Files; none: the package's own.")
    flags.mark_flags_as_required(["data"])
    cli.run(main)
