"""Accuracy on real scans: unseen head-neck patients, liver phases, two breath holds.

    python -m experiments.real_results --data=FOLDER --out=runs/results \
        --weights=runs/dynamic/weights.safetensors \
        --weights=runs/static/weights.safetensors

Registers, through the same function as `unireg register`, the 12 ordered pairs of the 4
head-neck patients that training never saw (DSC of 7 organs; of other weights, those of
--split), the arterial onto the portal-venous liver phase and the follow-up onto the
baseline lung scan (landmark error; both pairs were in training, without landmarks).
Writes results.json, a picture per pair of the first weights, and prints the table of
docs/training.md. --passes, which may be given several times, and --symmetric are those
of the command; by default one pass one way.
"""

import itertools
import json
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import cli, figures, real_pairs
from experiments.real_pairs import LANDMARKS
from unireg_jax import registration
from unireg_jax.errors import on_terminal
from unireg_jax.evaluation import metrics
from unireg_jax.registration.prediction import MOST_PASSES


def headneck(
    data: Path, model, *, split: str = "val", picture: Path | None = None, **how
) -> list[dict]:
    """One row per ordered pair of the patients of a split.

    Args:
        data: folder of the collection.
        model: from `load_model`.
        split: of `real_pairs.SPLITS`.
        picture: folder for one per pair; None for none.
        how: affine, passes and symmetric of `register`.
    """
    rows = []
    todo = real_pairs.pairs(data, split, tasks=["headneck"])
    for pair in tqdm(todo, disable=not on_terminal()):
        scans, truth = real_pairs.read_scans(pair), real_pairs.read_truth(pair)
        one, other = pair.patients
        result = registration.register(*scans, task="headneck", weights=model, **how)
        row = {"fixed": one, "moving": other, **_regularity(result)}
        for name, stage in real_pairs.stages(result).items():
            scores = real_pairs.scores(truth, stage)
            row[f"dsc_{name}"] = scores["dsc"]
            row[f"labels_{name}"] = scores["labels"]
        rows.append(row)
        if picture:
            fixed, moving = truth
            warped = metrics.warp_labels(
                result.disp_mm, result.vox2world, moving, fixed
            )
            figures.save_registration(
                picture / f"headneck_{one}_{other}.png",
                scans[0].data,
                figures.prealigned(scans[1], scans[0], result.affine),
                result.warped,
                registration.residual_mm(result),
                fixed.spacing_mm,
                title=f"{other} -> {one}: DSC {row['dsc_affine']:.3f} -> "
                f"{row['dsc_network']:.3f}",
                labels=(fixed.data, warped),
            )
    return rows


def landmarks(
    data: Path, model, task: str, *, picture: Path | None = None, **how
) -> dict:
    """Landmark errors of one intra-patient pair, mm; arguments as of `headneck`."""
    (pair,) = real_pairs.pairs(data, tasks=[task])
    fixed, moving = real_pairs.read_scans(pair)
    result = registration.register(fixed, moving, task=task, weights=model, **how)
    truth = real_pairs.read_truth(pair)
    stages = {
        name: real_pairs.scores(truth, stage)["errors_mm"]
        for name, stage in real_pairs.stages(result).items()
    }
    if picture:
        figures.save_registration(
            picture / f"{task}.png",
            fixed.data,
            figures.prealigned(moving, fixed, result.affine),
            result.warped,
            registration.residual_mm(result),
            fixed.spacing_mm,
            title=f"{task}: TRE {stages['affine'].mean():.2f} -> "
            f"{stages['network'].mean():.2f} mm",
        )
    return {
        "points": len(truth.fixed),
        "affine_used": result.settings["affine_used"],
        **{f"tre_{k}": float(v.mean()) for k, v in stages.items()},
        **{f"tre_p95_{k}": float(np.percentile(v, 95)) for k, v in stages.items()},
        **_regularity(result),
    }


def _regularity(result) -> dict:
    keys = ("sdlogj_network", "fold_percent_network", "max_mm_network")
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
    options = flags.FLAGS
    data, out = Path(options.data), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    results, picture = {}, out
    files = options.weights or [real_pairs.weights_of(options.split)]
    for path, passes in itertools.product(files, options.passes):
        model = registration.load_model(path)
        name = path
        if passes > 1 or options.symmetric:
            name += f", {passes} pass" + "es" * (passes > 1)
            name += ", both ways" * options.symmetric
        how = {"passes": passes, "symmetric": options.symmetric, "picture": picture}
        rows = headneck(data, model, split=options.split, **how)
        results[name] = {"headneck": rows} | {
            task: landmarks(data, model, task, **how) for task in LANDMARKS
        }
        picture = None
        (out / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder of the collection.")
    flags.DEFINE_string("out", "runs/results", "Where results and pictures go.")
    flags.DEFINE_enum("split", "val", [*real_pairs.SPLITS], "Head-neck patients.")
    flags.DEFINE_multi_string(
        "weights", [], "Files, or names in the package; none: by --split."
    )
    flags.DEFINE_multi_integer(
        "passes", [1], "Of the network.", lower_bound=1, upper_bound=MOST_PASSES
    )
    flags.DEFINE_bool("symmetric", False, "Whether each averages both ways.")
    flags.mark_flags_as_required(["data"])
    cli.run(main)
