"""How a transform is spelled, told by its content."""

import gzip
import os
import struct
import zlib

from unireg_jax.errors import bad_file
from unireg_jax.imaging import itk_files, nifti
from unireg_jax.imaging.transforms import checks

_TEXT = 1 << 16  # bytes: elastix sorts its lines, and Transform is among the last

IDENTITY = "identity"


def is_identity(path: str | os.PathLike) -> bool:
    """Says whether a transform is the word `identity`: no file has that name.

    Args:
        path: as a command or a list gives it.

    Returns:
        Whether it stands for the state before registration.
    """
    return os.path.basename(path) == IDENTITY and not os.path.lexists(path)


def spelling(path: str | os.PathLike) -> str:
    """Tells by its content how a transform is spelled.

    Args:
        path: any file, or "identity".

    Returns:
        "identity", see `is_identity`; "nifti", a 5-D field; "l2r", a Learn2Reg field
        (4-D NIfTI, `.npz`); "itk", a transform file (`.h5`, text, `.mat`); "itk_image",
        NRRD or MetaImage.

    Raises:
        UserError: `not_found`, `not_a_file`, `permission`, `empty`; `schema` for what
            is no transform, or the text of a tool that can write one; `name_mismatch`
            for NRRD or MetaImage under another name.
    """
    if is_identity(path):
        return IDENTITY
    nifti.check_file(path)
    try:
        with open(path, "rb") as file:
            head = file.read(348)
        if head[:2] == b"\x1f\x8b":
            with gzip.open(path) as file:
                head = file.read(348)
    except PermissionError as error:
        raise nifti.permission_error(path) from error
    except (OSError, EOFError, zlib.error):
        return "nifti"  # whose reader says what is wrong with it
    for order in "<>":
        size = struct.unpack(order + "i", head[:4].ljust(4, b"\0"))[0]
        if size in (348, 540) and len(head) == 348:
            place, number = (40, "8h") if size == 348 else (16, "8q")
            dim = struct.unpack_from(order + number, head, place)
            return "l2r" if dim[0] == 4 and dim[4] == 3 else "nifti"
    if head.startswith((b"NRRD", b"ObjectType")):
        if not checks.ends(path, tuple(itk_files.IMAGE_IO)):
            raise bad_file(
                path,
                "name_mismatch",
                f"a name in {', '.join(itk_files.IMAGE_IO)}",
                nifti.looks_like(head),
                "rename the file",
            )
        return "itk_image"
    if head.startswith(b"PK\x03\x04"):
        return "l2r"
    if head.startswith((b"#Insight Transform File", b"\x89HDF")):
        return "itk"
    _refuse_other_tools(path)
    if checks.ends(path, ".mat"):
        return "itk"
    raise bad_file(
        path,
        "schema",
        "a displacement field (NIfTI, NRRD), an ITK transform (.h5, .txt, .tfm, .mat) "
        "or a Learn2Reg field (.nii.gz, .npz)",
        nifti.looks_like(head),
        "name the transform itself",
    )


def _refuse_other_tools(path: str | os.PathLike) -> None:
    """Names the way out for what elastix, and greedy, c3d or FSL, keep as text."""
    with open(path, "rb") as file:
        text = file.read(_TEXT)
    got = remedy = ""
    if b'(Transform "' in text:
        got = "elastix parameters"
        remedy = "run `transformix -def all -tp FILE -out DIR` and name its "
        remedy += "deformationField"
    elif _numbers(text) == 16:
        got = "a bare 4x4 matrix (greedy and c3d: RAS mm; FSL: scaled voxels)"
        remedy = "run `c3d_affine_tool FILE -oitk out.txt` (FSL: with -ref, -src and "
        remedy += "-fsl2ras)"
    if got:
        raise bad_file(path, "schema", "a transform of ITK or a field", got, remedy)


def _numbers(text: bytes) -> int:
    """How many numbers a text is; 0 for another one."""
    words = text.split()
    try:
        return len([float(word) for word in words])
    except ValueError:
        return 0
