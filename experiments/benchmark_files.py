"""Seconds and bytes of reading and writing results, beside SimpleITK and nibabel.

    python -m experiments.benchmark_files --slices=100

One scan of 512 x 512 voxels and a smooth field on its grid, made; every writer in turn,
medians, and one thread of each tool. Files go to a temporary folder (--folder).
"""

import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from absl import flags
from scipy import ndimage

from experiments import cli, timing
from unireg_jax.imaging import nifti, transforms
from unireg_jax.imaging.nifti import Volume

_PLACE = np.diag([0.8, 0.8, 1.0, 1.0])


def make(slices: int) -> tuple[np.ndarray, np.ndarray]:
    """A scan with noise, and a field of some 10 mm.

    Args:
        slices: of 512 x 512 voxels.

    Returns:
        [X, Y, Z] int16 HU; [X, Y, Z, 3] float32, LPS mm.
    """
    rng, shape = np.random.default_rng(0), (512, 512, slices)
    coarse = rng.normal(size=(12, 12, 6, 4)).astype(np.float32)
    factors = np.array(shape) / coarse.shape[:3]
    smooth = [ndimage.zoom(coarse[..., c], factors, order=3) for c in range(4)]
    noise = rng.normal(size=shape).astype(np.float32)
    hu = (300 * smooth[3] + 12 * noise).astype(np.int16)
    return hu, np.stack([6 * part for part in smooth[:3]], axis=-1)


def candidates(folder: Path, hu: np.ndarray, disp_mm: np.ndarray) -> dict:
    """What is timed, by `what: tool`; each write leaves the file of that name.

    Args:
        folder: for the files.
        hu, disp_mm: from `make`.
    """
    own = Volume(hu, _PLACE)
    image = sitk.GetImageFromArray(hu.transpose(2, 1, 0))
    field = sitk.GetImageFromArray(disp_mm.transpose(2, 1, 0, 3), isVector=True)
    for one in (image, field):
        one.SetSpacing(np.diag(_PLACE)[:3].tolist())
    wide = sitk.Cast(field, sitk.sitkVectorFloat64)
    composite = sitk.CompositeTransform([sitk.AffineTransform(3)])
    composite.AddTransform(sitk.DisplacementFieldTransform(wide))
    loaded = nib.Nifti1Image(disp_mm[:, :, :, None], np.diag([-1, -1, 1, 1]) @ _PLACE)
    place = {"vox2world": _PLACE}
    ends = {"scan": "nii.gz", "field": "nii.gz", "composite": "h5", "nrrd": "nrrd"}

    def at(what: str, tool: str) -> str:
        return str(folder / f"{what}_{tool}.{ends[what]}")

    nifti.write_volume(at("scan", "ours"), hu, _PLACE)
    sitk.WriteImage(image, at("scan", "SimpleITK"), True)
    return {
        "read scan: ours": lambda: nifti.read_image(at("scan", "ours")),
        "read scan: SimpleITK": lambda: sitk.ReadImage(at("scan", "SimpleITK")),
        "scan: ours": lambda: nifti.write_volume(at("scan", "ours"), own.data, _PLACE),
        "scan: SimpleITK": lambda: sitk.WriteImage(
            image, at("scan", "SimpleITK"), True
        ),
        "field: ours": lambda: transforms.write_field(
            at("field", "ours"), disp_mm, **place
        ),
        "field: SimpleITK": lambda: sitk.WriteImage(
            field, at("field", "SimpleITK"), True
        ),
        "field: nibabel": lambda: nib.save(loaded, at("field", "nibabel")),
        "composite: ours": lambda: transforms.write_composite(
            at("composite", "ours"), np.eye(4), disp_mm, **place
        ),
        "composite: SimpleITK": lambda: sitk.WriteTransform(
            composite, at("composite", "SimpleITK")
        ),
        "nrrd: ours": lambda: transforms.write_nrrd(
            at("nrrd", "ours"), disp_mm, **place
        ),
        "nrrd: SimpleITK": lambda: sitk.WriteImage(
            field, at("nrrd", "SimpleITK"), True
        ),
    }


def main(argv: list[str]) -> None:
    """Prints one row per file and tool."""
    del argv
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    hu, disp_mm = make(flags.FLAGS.slices)
    with tempfile.TemporaryDirectory(dir=flags.FLAGS.folder or None) as name:
        runs = candidates(Path(name), hu, disp_mm)
        found = timing.measure(runs, flags.FLAGS.repeats)
        sizes = {p.name.split(".")[0]: p.stat().st_size for p in Path(name).iterdir()}
    print(f"512x512x{flags.FLAGS.slices} voxels\n")
    print("| what | tool | CPU s | wall s | MB |\n|---|---|---|---|---|")
    for key, one in found.items():
        what, tool = key.split(": ")
        size = sizes[f"{what.removeprefix('read ')}_{tool}"] / 1e6
        seconds = f"{one.cpu_ms / 1e3:.2f} | {one.wall_ms / 1e3:.2f}"
        print(f"| {what} | {tool} | {seconds} | {size:.0f} |")


if __name__ == "__main__":
    flags.DEFINE_integer("slices", 100, "Of the scan.", lower_bound=12)
    flags.DEFINE_integer("repeats", 3, "Counted rounds.", lower_bound=1)
    flags.DEFINE_string("folder", "", "Where files are written for a while.")
    cli.run(main)
