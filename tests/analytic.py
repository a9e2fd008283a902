"""Fields and images known in closed form: shifts, affines, bumps.

NumPy only, float64 inside; what the operators take is returned as float32, batch first.
Shapes are never cubic, so that swapped axes show.
"""

import numpy as np

SHAPES = [(5, 6, 7), (9, 4, 6), (2, 3, 5)]


def positions(shape):
    """Returns [X, Y, Z, 3] float64, the voxel positions."""
    axes = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in shape), indexing="ij")
    return np.stack(axes, axis=-1)


def centre(shape):
    """Returns [3] float64, the middle of the grid in voxels."""
    return (np.asarray(shape, np.float64) - 1.0) / 2.0


def noise(shape, *, channels=1, batch=1, seed=0):
    """Returns [B, X, Y, Z, C] float32, standard normal."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, *shape, channels)).astype(np.float32)


def random_disp(shape, *, size=1.5, batch=1, seed=1):
    """Returns [B, X, Y, Z, 3] float32, rough, uniform in +-size voxels."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-size, size, (batch, *shape, 3)).astype(np.float32)


def shift_disp(shape, vector):
    """Returns [1, X, Y, Z, 3] float32, the same vector (voxels) everywhere."""
    return np.broadcast_to(np.asarray(vector, np.float32), (1, *shape, 3)).copy()


def linear_disp(shape, linear, offset=(0.0, 0.0, 0.0)):
    """Returns [1, X, Y, Z, 3] float32: linear (x - centre) + offset, voxels."""
    x = positions(shape) - centre(shape)
    disp = x @ np.asarray(linear, np.float64).T + np.asarray(offset, np.float64)
    return disp[None].astype(np.float32)


def rotation(angle, axis):
    """Returns [3, 3] float64, the rotation by `angle` radians about an array axis."""
    matrix = np.eye(3)
    i, j = [k for k in range(3) if k != axis]
    matrix[[i, i, j, j], [i, j, i, j]] = [
        np.cos(angle),
        -np.sin(angle),
        np.sin(angle),
        np.cos(angle),
    ]
    return matrix


def bump_disp(shape, *, vector=(0.8, -0.6, 0.5), width=0.25):
    """Returns a Gaussian bump of displacement and its Jacobian determinant.

    disp(x) = vector g(x),  g = exp(-|s|^2 / 2),  s_j = (x_j - c_j) / (width n_j)
    det(I + vector grad g^T) = 1 + vector . grad g,  grad g_j = -g s_j / (width n_j)

    so the vector is a share of the voxels at this resolution only: it does not scale.

    Args:
        shape: (X, Y, Z).
        vector: peak displacement, voxels.
        width: standard deviation as a share of the grid, per axis.

    Returns:
        disp [1, X, Y, Z, 3] float32 in voxels, detj [1, X, Y, Z] float64.
    """
    sigma = width * np.asarray(shape, np.float64)
    s = (positions(shape) - centre(shape)) / sigma
    g = np.exp(-0.5 * np.sum(s**2, axis=-1))
    vector = np.asarray(vector, np.float64)
    detj = 1.0 - g * np.sum(vector * s / sigma, axis=-1)
    return (vector * g[..., None])[None].astype(np.float32), detj[None]


def waves(points):
    """A smooth image on the unit cube: [..., 3] in [0, 1] -> [...] float64."""
    x, y, z = np.moveaxis(np.asarray(points, np.float64), -1, 0)
    return np.sin(2.0 * x + 0.3) * np.cos(1.5 * y) + np.sin(1.2 * z + 0.5 * x * y)


def unit_positions(shape):
    """Returns [X, Y, Z, 3] float64 in [0, 1]: first voxel 0, last voxel 1."""
    return positions(shape) / (np.asarray(shape, np.float64) - 1.0)
