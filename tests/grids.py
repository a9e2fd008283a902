"""Grids of scans: turned about no special axis, stored along any axes."""

import itertools

import nibabel as nib
import numpy as np

ALL_CODES = [
    "".join(letters)
    for axes in itertools.permutations(("LR", "PA", "SI"))
    for letters in itertools.product(*axes)
]


def oblique(spacing=(3.0, 2.5, 4.0), origin=(-20.0, 35.0, -110.0)):
    """Voxel -> LPS mm, turned by about 20 degrees about no special axis."""
    affine = np.eye(4)
    turn = nib.eulerangles.euler2mat(0.3, -0.2, 0.15)
    affine[:3, :3] = turn @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


def positions(grid):
    """[X, Y, Z, 3] LPS mm of every voxel of a grid."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    return index @ grid.vox2world[:3, :3].T + grid.vox2world[:3, 3]
