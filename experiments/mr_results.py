"""What the package does with MR scans, which it was not made for: two brains.

    python -m experiments.mr_results --data=FOLDER

Registers the two T1 brains of the collection onto each other, both ways, through the
same function as `unireg register`, and prints mean DSC of all labels as Markdown: as
the scans lie, after the pre-alignment, after the network, and after instance
optimisation from either. Once with the intensities as they are (`hu_range` is warned
of), once stretched by hand so that background is air and the brightest tissue 200 HU,
and once with another contrast made up for the moving scan, as of another sequence. The
scans take no part in any training.
"""

import itertools
from pathlib import Path

import numpy as np
from absl import flags

from experiments import cli, real_pairs
from unireg_jax import registration
from unireg_jax.imaging import nifti
from unireg_jax.imaging.nifti import Volume
from unireg_jax.registration.refine import Plan

SUBJECTS = ("subject_a", "subject_b")
_MIND = Plan(50, features="mind")
METHODS = {  # task, pre-alignment, instance optimisation
    "network, `--task headneck --io-iterations 0`": ("headneck", "auto", None),
    "`--task none --io-iterations 50`": ("none", "auto", Plan(50)),
    "the same with `--affine none`": ("none", "none", Plan(50)),
    "`--task none --io-iterations 50 --io-features mind`": ("none", "auto", _MIND),
    "the same with `--affine none`, too": ("none", "none", _MIND),
    "network, then 50 iterations of `mind`": ("headneck", "auto", _MIND),
}


def stretched(volume: Volume) -> Volume:
    """Background to -1000 and the 99.9th percentile to 200, as if they were HU."""
    high = np.percentile(volume.data, 99.9)
    hu = np.clip(volume.data / high * 1200 - 1000, -1000, 3000)
    return volume._replace(data=np.rint(hu).astype(np.int16), warnings=())


def bent(volume: Volume) -> Volume:
    """Tissue between dark and bright becomes the brightest; background stays.

    No line leads from one contrast to the other, not even where they are turned around.
    """
    high = np.percentile(volume.data, 99.9)
    share = np.clip(volume.data / high, 0, 1)
    data = np.where(volume.data > 0, 1 + 4 * share * (1 - share) * high, 0)
    return volume._replace(data=np.rint(data).astype(np.int16))


INTENSITIES = {  # of the fixed and of the moving scan
    "as they are": (None, None),
    "stretched": (stretched, stretched),
    "moving scan of another contrast": (None, bent),
}


def measure(data: Path, model) -> list[dict]:
    """One row per direction, intensities and method; DSC in %."""
    folder = data / "brain_mr_voxelmorph"
    rows = []
    for pair in itertools.permutations(SUBJECTS):
        scans = [nifti.read_image(folder / f"{s}.nii.gz") for s in pair]
        truth = tuple(nifti.read_labels(folder / f"{s}_seg.nii.gz") for s in pair)
        for kind, both in INTENSITIES.items():
            images = [
                prepare(scan) if prepare else scan
                for scan, prepare in zip(scans, both, strict=True)
            ]
            for method, (task, affine, plan) in METHODS.items():
                result = registration.register(
                    *images, task=task, weights=model, affine=affine, refine=plan
                )
                row = {"pair": pair, "intensities": kind, "method": method}
                row["folds"] = result.qc["fold_percent_network"]
                for stage, found in real_pairs.stages(result).items():
                    row[stage] = real_pairs.told(real_pairs.scores(truth, found))
                rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: one line per intensities and method, mean (one way / the other)."""

    def told(here, stage):
        values = [row[stage] for row in here]
        return f"{np.mean(values):.1f} ({' / '.join(f'{v:.1f}' for v in values)})"

    lines = [
        "| intensities | method | DSC % initial | affine | after | folds % |",
        "|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((row["intensities"], row["method"]) for row in rows)
    for kind, method in keys:
        here = [r for r in rows if (r["intensities"], r["method"]) == (kind, method)]
        initial, affine, after = (
            told(here, stage) for stage in ("initial", "affine", "network")
        )
        folds = np.mean([row["folds"] for row in here])
        lines.append(
            f"| {kind} | {method} | {initial} | {affine} | {after} | {folds:.2f} |"
        )
    return "\n".join(lines)


def main(argv) -> None:
    del argv
    cli.setup()
    model = registration.load_model(flags.FLAGS.weights)
    print(table(measure(Path(flags.FLAGS.data), model)))


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder of the collection.")
    flags.DEFINE_string("weights", real_pairs.WEIGHTS, "File, or name in the package.")
    flags.mark_flags_as_required(["data"])
    cli.run(main)
