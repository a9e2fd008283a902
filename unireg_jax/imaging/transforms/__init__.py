"""Displacement fields and affines as ITK, ANTs, Slicer and Learn2Reg spell them.

Files only; what a transform does to points and scans is in mapping.py.

One meaning throughout: a sampling map (pull-back) that sends a point of the fixed image
to the point where the moving image is read. Inside, vectors are LPS mm on LPS+ axes. In
files the grid is that of the fixed image as stored, and the vectors stay LPS mm however
its axes run.
"""

from unireg_jax.imaging.transforms.checks import (
    RANGE_MM,
    check_affine,
    check_field,
    has_shear,
)
from unireg_jax.imaging.transforms.itk import (
    read_affine,
    read_parts,
    write_affine_txt,
    write_composite,
    write_parts,
)
from unireg_jax.imaging.transforms.learn2reg import read_l2r, write_l2r
from unireg_jax.imaging.transforms.nifti_fields import read_field, write_field
from unireg_jax.imaging.transforms.nrrd_fields import read_itk_image, write_nrrd
from unireg_jax.imaging.transforms.spelling import IDENTITY, is_identity, spelling

__all__ = [
    "IDENTITY",
    "RANGE_MM",
    "check_affine",
    "check_field",
    "has_shear",
    "is_identity",
    "read_affine",
    "read_field",
    "read_itk_image",
    "read_l2r",
    "read_parts",
    "spelling",
    "write_affine_txt",
    "write_composite",
    "write_field",
    "write_l2r",
    "write_nrrd",
    "write_parts",
]
