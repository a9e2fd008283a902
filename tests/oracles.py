"""Slow, obvious versions of the operators, in NumPy, SciPy and SimpleITK (float64).

One per operator; they share no code with what they check.
"""

import re
import warnings

import jax
import numpy as np
import scipy.ndimage

from tests import analytic


def warp(volume, disp, *, order=1):
    """ops.warp.warp by SciPy: edge values outside, halves round as SciPy does."""
    volume, disp = np.asarray(volume), np.asarray(disp, np.float64)
    coords = analytic.positions(disp.shape[1:4])[None] + disp
    return sample(volume, coords, order=order)


def sample(volume, coords, *, order=1):
    """ops.warp.sample by SciPy."""
    volume, coords = np.asarray(volume), np.asarray(coords, np.float64)
    dtype = np.float64 if order else volume.dtype
    out = np.zeros((*coords.shape[:-1], volume.shape[-1]), dtype)
    for b in range(volume.shape[0]):
        for c in range(volume.shape[-1]):
            out[b, ..., c] = scipy.ndimage.map_coordinates(
                volume[b, ..., c].astype(dtype),
                np.moveaxis(coords[b], -1, 0),
                order=order,
                mode="nearest",
            )
    return out


def compose(first, second):
    """ops.warp.compose by SciPy."""
    return np.asarray(first, np.float64) + warp(second, first)


def resize(volume, shape):
    """ops.resample.resize_volume by SciPy: first and last voxel centres coincide."""
    volume = np.asarray(volume)
    ratio = [
        (a - 1) / max(b - 1, 1) for a, b in zip(volume.shape[1:4], shape, strict=True)
    ]
    coords = analytic.positions(shape) * np.asarray(ratio)
    return sample(volume, np.broadcast_to(coords, (len(volume), *coords.shape)))


def jacobian(disp):
    """Jacobian of x + disp(x), central differences: [B, X-2, Y-2, Z-2, 3, 3]."""
    disp = np.asarray(disp, np.float64)
    batch, *shape, _ = disp.shape
    out = np.zeros((batch, *(n - 2 for n in shape), 3, 3))
    for b, x, y, z in np.ndindex(*out.shape[:4]):
        here = np.array([x, y, z]) + 1
        for j in range(3):
            step = np.eye(3, dtype=int)[j]
            ahead, behind = disp[(b, *(here + step))], disp[(b, *(here - step))]
            out[b, x, y, z, :, j] = (ahead - behind) / 2.0
    return out + np.eye(3)


def determinant(disp):
    """ops.jacobian.determinant."""
    return np.linalg.det(jacobian(disp))


def sdlogj(disp, mask):
    """ops.jacobian.sdlogj, per volume of the batch."""
    detj, mask = determinant(disp), np.asarray(mask)[:, 1:-1, 1:-1, 1:-1]
    logs = np.log(np.maximum(detj, 1e-9))
    return np.array([np.std(v[m]) for v, m in zip(logs, mask, strict=True)])


def sdlogj_l2r(disp, mask):
    """ops.jacobian.sdlogj_l2r as the challenge's evaluation writes it.

    Central differences with zeros beyond the border, two voxels dropped at every side.
    """
    out = []
    for field, inside in zip(np.asarray(disp, np.float64), mask, strict=True):
        rows = []
        for j in range(3):
            weights = np.array([-0.5, 0.0, 0.5])
            shape = [1, 1, 1, 1]
            shape[j] = 3
            rows.append(
                scipy.ndimage.correlate(
                    field, weights.reshape(shape), mode="constant", cval=0.0
                )
            )
        jac = np.stack(rows, axis=-1)[2:-2, 2:-2, 2:-2] + np.eye(3)
        detj = np.clip(np.linalg.det(jac) + 3.0, 1e-9, 1e9)
        out.append(np.std(np.log(detj)[np.asarray(inside)[2:-2, 2:-2, 2:-2]]))
    return np.array(out)


def diffusion(disp):
    """ops.smoothness.diffusion."""
    disp = np.asarray(disp, np.float64)
    means = [np.mean(np.diff(disp, axis=j) ** 2, axis=(1, 2, 3, 4)) for j in (1, 2, 3)]
    return np.mean(means, axis=0)


def bending(disp):
    """ops.smoothness.bending, voxel by voxel."""
    disp = np.asarray(disp, np.float64)
    batch, *shape, _ = disp.shape
    inner = [n - 2 for n in shape]
    out = np.zeros(batch)
    e = np.eye(3, dtype=int)
    for b, x, y, z in np.ndindex(batch, *inner):
        here = np.array([x, y, z]) + 1

        def at(offset, b=b, here=here):
            return disp[(b, *(here + offset))]

        for j in range(3):
            for k in range(3):
                if j == k:
                    second = at(e[j]) - 2.0 * at(0 * e[j]) + at(-e[j])
                else:
                    cross = at(e[j] + e[k]) - at(e[j] - e[k]) - at(e[k] - e[j])
                    second = (cross + at(-e[j] - e[k])) / 4.0
                out[b] += np.sum(second**2)
    return out / (np.prod(inner) * 3)


def has_scatter(function, *arguments):
    """Says whether the compiled program of a function of arrays holds a scatter."""
    lowered = jax.jit(function).lower(*arguments)
    # The operation, not a name that appears in the metadata.
    operation = re.compile(r"\bscatter\"?\(")
    found = [
        operation.search(t) for t in (lowered.as_text(), lowered.compile().as_text())
    ]
    return any(found)


def itk_image(array, vox2world=None, *, vector=False):
    """A SimpleITK image of [X, Y, Z] (or [X, Y, Z, 3]) with the given geometry, mm."""
    import SimpleITK as sitk

    axes = (2, 1, 0, 3) if vector else (2, 1, 0)
    image = sitk.GetImageFromArray(np.transpose(array, axes), isVector=vector)
    if vox2world is not None:
        spacing = np.linalg.norm(vox2world[:3, :3], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetDirection((vox2world[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(vox2world[:3, 3].tolist())
    return image


def itk_array(image):
    """The array [X, Y, Z] of a scalar SimpleITK image."""
    import SimpleITK as sitk

    return np.transpose(sitk.GetArrayFromImage(image), (2, 1, 0))


def itk_warp(volume, disp_mm, vox2world=None, *, outside=0.0):
    """SimpleITK's warp of one [X, Y, Z] by disp_mm [X, Y, Z, 3] in world mm."""
    import SimpleITK as sitk

    image = itk_image(np.asarray(volume, np.float64), vox2world)
    field = itk_image(np.asarray(disp_mm, np.float64), vox2world, vector=True)
    transform = sitk.DisplacementFieldTransform(field)
    return itk_array(sitk.Resample(image, image, transform, sitk.sitkLinear, outside))


def torch_warp(volume, disp):
    """torch's grid_sample and its gradient to disp for the sum of squares.

    Returns:
        warped [B, X, Y, Z, C] and gradient [B, X, Y, Z, 3], float32.
    """
    import pytest

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        image = torch.tensor(np.moveaxis(np.asarray(volume), -1, 1))
        field = torch.tensor(np.asarray(disp), requires_grad=True)
        shape = disp.shape[1:4]
        grid = torch.tensor(analytic.positions(shape)[None].astype(np.float32)) + field
        size = torch.tensor([n - 1.0 for n in shape])
        # torch wants [-1, 1] and the last array axis first.
        unit = (2.0 * grid / size - 1.0).flip(-1)
        out = torch.nn.functional.grid_sample(
            image, unit, mode="bilinear", padding_mode="border", align_corners=True
        )
        (out**2).sum().backward()
    return np.moveaxis(out.detach().numpy(), 1, -1), field.grad.numpy()


def slope(function, point, direction, *, step=1e-5):
    """Central difference of a scalar function of a float64 array along a direction."""
    point, direction = (np.asarray(v, np.float64) for v in (point, direction))
    up, down = (function(point + s * direction) for s in (step, -step))
    return (up - down) / (2.0 * step)
