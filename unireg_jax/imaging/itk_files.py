"""NRRD and MetaImage: which reader of ITK, and whose voxels.

The header of such a file may name any file as its voxels. One that comes from elsewhere
must not pull another file of this machine into a result.
"""

import os
import re
from pathlib import Path

from unireg_jax.errors import FAILED, UserError, shown

# By name, not by content: ITK has readers for dozens of formats nobody asked for.
IMAGE_IO = {
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}
_DATA_ENDINGS = (".raw", ".zraw", ".raw.gz", ".img")
_LARGEST_HEADER = 1 << 16  # bytes
_META_NAME = re.compile(rb"(?im)^\s*(ElementDataFile)\s*[=:]\s*(.*?)\s*$")
_NRRD_NAME = re.compile(rb"(?im)^\s*data ?file\s*:\s*(.*?)\s*$")


def data_files(path: str | os.PathLike) -> list[Path]:
    """Names the files that a detached header may take its voxels from.

    Args:
        path: of the header.

    Returns:
        Those of its stem that lie beside a `.mhd` or `.nhdr`; none for other names.
    """
    path = Path(path)
    if path.suffix.lower() not in (".mhd", ".nhdr"):
        return []
    data = (path.with_suffix(ending) for ending in _DATA_ENDINGS)
    return [p for p in data if p.is_file()]


def check_own_voxels(path: str | os.PathLike) -> None:
    """Refuses a header that takes its voxels from a file of another name.

    Args:
        path: `.nrrd`, `.nhdr`, `.mha` or `.mhd`, a regular file.

    Raises:
        UserError: `path_escape`; `not_nifti` for a header that does not end.
    """
    with open(path, "rb") as file:
        head = file.read(_LARGEST_HEADER + 1)
    allowed = {os.fsencode(p.name) for p in data_files(path)}
    meta = IMAGE_IO[Path(path).suffix.lower()] == "MetaImageIO"
    if meta:
        found = _META_NAME.findall(head)
        ends = any(key == b"ElementDataFile" for key, _ in found)
        named = [name for _, name in found if name.upper() != b"LOCAL"]
    else:
        header, blank, _ = head.replace(b"\r\n", b"\n").partition(b"\n\n")
        ends = bool(blank) or len(head) <= _LARGEST_HEADER
        named = _NRRD_NAME.findall(header)
    if not ends:
        raise UserError(
            "not_nifti",
            f"{shown(path)}: not_nifti: expected a whole NRRD or MetaImage file, got "
            f"no end of a header in its first {_LARGEST_HEADER} bytes; export it again",
        )
    if foreign := [name for name in named if name not in allowed]:
        raise UserError(
            "path_escape",
            f"{shown(path)}: path_escape: expected its voxels within, or beside it in "
            f"a file of the same name ending in {', '.join(_DATA_ENDINGS)}, got "
            f"{ascii(foreign[0].decode('latin-1')[:80])}; save it as one file, .nrrd "
            "or .mha",
            FAILED,
        )
