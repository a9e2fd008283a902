"""What experiments/benchmark_ops.py compares with: each op as other libraries do it.

Every function takes the inputs of our op as NumPy arrays in our layout, prepares what
can be prepared (layouts, sampling grids, constants), and returns a function that runs
once. It raises ImportError where the library is missing. PyTorch runs on the GPU if JAX
does; there only times after `torch.cuda.synchronize` count.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from experiments import timing
from unireg_jax.ops import mind, warp

# Bytes per one-hot voxel that eager PyTorch holds at its peak: one-hot, warped, two
# products and two gradients, float32.
_ONEHOT_BYTES = 24


def torch_warp(volume, disp):
    """Identity grid plus displacement, in its own units and order, and grid_sample."""
    functional, volume, identity, disp = _sampling(volume, disp)
    return _torch(lambda: _grid_sample(functional, volume, identity + disp))


def torch_warp_gradient(volume, disp, cotangent):
    """The same and the gradient to the displacement, in its own units and order."""
    import torch

    functional, volume, identity, disp = _sampling(volume, disp)
    disp.requires_grad_()
    cotangent = _first(cotangent)

    def run():
        out = _grid_sample(functional, volume, identity + disp)
        return torch.autograd.grad(out, disp, cotangent)[0]

    return _torch(run, gradient=True)


def monai_warp(volume, disp):
    """monai.networks.blocks.Warp."""
    block = _monai_warp_block()
    volume, disp = _first(volume), _first(disp)
    return _torch(lambda: block(volume, disp))


def monai_warp_gradient(volume, disp, cotangent):
    """monai.networks.blocks.Warp and its gradient to the displacement."""
    import torch

    block = _monai_warp_block()
    volume, cotangent = _first(volume), _first(cotangent)
    disp = _first(disp).requires_grad_()
    return _torch(
        lambda: torch.autograd.grad(block(volume, disp), disp, cotangent)[0],
        gradient=True,
    )


def voxelmorph_warp(volume, disp):
    """voxelmorph.nn.modules.SpatialTransformer."""
    from voxelmorph.nn.modules import SpatialTransformer

    block, volume, disp = SpatialTransformer(), _first(volume), _first(disp)
    return _torch(lambda: block(volume, disp))


def voxelmorph_warp_gradient(volume, disp, cotangent):
    """voxelmorph.nn.modules.SpatialTransformer, gradient to the displacement."""
    import torch
    from voxelmorph.nn.modules import SpatialTransformer

    block = SpatialTransformer()
    volume, cotangent = _first(volume), _first(cotangent)
    disp = _first(disp).requires_grad_()
    return _torch(
        lambda: torch.autograd.grad(block(volume, disp), disp, cotangent)[0],
        gradient=True,
    )


def sitk_warp(volume, disp):
    """SimpleITK.Resample through a displacement field transform."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(volume[0, ..., 0].T)
    transform = sitk.DisplacementFieldTransform(_sitk_field(disp))
    return lambda: sitk.Resample(image, image, transform, sitk.sitkLinear, 0.0)


def scipy_warp(volume, disp):
    """scipy.ndimage.map_coordinates, order 1; absolute positions are given."""
    coords = np.moveaxis(disp[0], -1, 0) + np.indices(disp.shape[1:4], np.float32)
    image = volume[0, ..., 0]
    return lambda: ndimage.map_coordinates(image, coords, order=1, mode="nearest")


def torch_ncc_pool(fixed, moving):
    """Local NCC with separable average pooling."""
    return _torch_ncc(_box_pool, fixed, moving, gradient=False)


def torch_ncc_pool_gradient(fixed, moving):
    """Local NCC with separable average pooling, gradient to moving."""
    return _torch_ncc(_box_pool, fixed, moving, gradient=True)


def torch_ncc_conv(fixed, moving):
    """Local NCC with separable convolutions."""
    return _torch_ncc(_box_conv, fixed, moving, gradient=False)


def torch_ncc_conv_gradient(fixed, moving):
    """Local NCC with separable convolutions, gradient to moving."""
    return _torch_ncc(_box_conv, fixed, moving, gradient=True)


def monai_ncc(fixed, moving):
    """monai LocalNormalizedCrossCorrelationLoss."""
    return _loss(_monai_ncc_loss(), fixed, moving, gradient=False)


def monai_ncc_gradient(fixed, moving):
    """monai LocalNormalizedCrossCorrelationLoss, gradient to moving."""
    return _loss(_monai_ncc_loss(), fixed, moving, gradient=True)


def voxelmorph_ncc(fixed, moving):
    """The NCC that voxelmorph refers to: neurite.nn.modules.NCC."""
    return _loss(_neurite_ncc(), fixed, moving, gradient=False)


def voxelmorph_ncc_gradient(fixed, moving):
    """neurite.nn.modules.NCC, gradient to moving."""
    return _loss(_neurite_ncc(), fixed, moving, gradient=True)


def sitk_jacobian(disp):
    """SimpleITK's determinant, NumPy's statistics."""
    import SimpleITK as sitk

    field = _sitk_field(disp)

    def run():
        image = sitk.DisplacementFieldJacobianDeterminant(field)
        return _jacobian_statistics(sitk.GetArrayViewFromImage(image))

    return run


def numpy_jacobian(disp):
    """numpy.gradient, numpy.linalg.det, NumPy's statistics."""

    def run():
        rows = [np.gradient(disp[0, ..., i]) for i in range(3)]
        jac = np.stack([np.stack(row, -1) for row in rows], -2) + np.eye(3, dtype="f")
        return _jacobian_statistics(np.linalg.det(jac))

    return run


def torch_jacobian(disp):
    """Central differences of interior voxels by slices, as ours."""
    import torch

    disp = _tensor(disp)[0]

    def derivative(component, axis):
        field, size = disp[..., component], disp.shape
        for other in {0, 1, 2} - {axis}:
            field = field.narrow(other, 1, size[other] - 2)
        upper = field.narrow(axis, 2, size[axis] - 2)
        d = (upper - field.narrow(axis, 0, size[axis] - 2)) * 0.5
        return d + 1.0 if axis == component else d

    def run():
        (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (
            [derivative(i, j) for j in range(3)] for i in range(3)
        )
        detj = xx * (yy * zz - yz * zy) - xy * (yx * zz - yz * zx)
        detj = detj + xz * (yx * zy - yy * zx)
        sdlogj = torch.log(detj.clamp(min=1e-9)).std(correction=0)
        return (detj <= 0).float().mean(), sdlogj

    return _torch(run)


def torch_correlation(fixed, moving):
    """27 products with shifted maps, summed over channels."""
    import torch

    functional = torch.nn.functional
    fixed, moving = _tensor(fixed), _tensor(moving)

    def run():
        f = functional.normalize(fixed, dim=-1)
        m = functional.normalize(moving, dim=-1).movedim(-1, 1)
        m = functional.pad(m, (1,) * 6, mode="replicate").movedim(1, -1)
        x, y, z = f.shape[1:4]
        maps = [
            (f * m[:, i : i + x, j : j + y, k : k + z]).sum(-1)
            for i, j, k in itertools.product(range(3), repeat=3)
        ]
        return torch.stack(maps, -1)

    return _torch(run)


def torch_head(features, omega):
    """Three 1x1x1 convolutions, channels last."""
    import torch

    functional = torch.nn.functional
    x = _first(features)
    w1, w2, w3, b1, b2, b3 = _tensor(omega[0]).split([64, 64, 24, 8, 8, 3])
    layers = [
        (w.reshape(len(b), 8, 1, 1, 1), b) for w, b in ((w1, b1), (w2, b2), (w3, b3))
    ]

    def run():
        out = x
        for i, (weight, bias) in enumerate(layers):
            out = functional.conv3d(out, weight, bias)
            out = functional.leaky_relu(out, 0.2) if i < 2 else out
        return out

    return _torch(run)


def torch_pool(x):
    """max_pool3d, channels last."""
    import torch

    x = _first(x)
    return _torch(lambda: torch.nn.functional.max_pool3d(x, 2))


def torch_pool_gradient(x, cotangent):
    """max_pool3d and its gradient, channels last."""
    import torch

    x, cotangent = _first(x).requires_grad_(), _first(cotangent)

    def run():
        out = torch.nn.functional.max_pool3d(x, 2)
        return torch.autograd.grad(out, x, cotangent)[0]

    return _torch(run, gradient=True)


def torch_upsample(x):
    """interpolate, nearest, channels last."""
    import torch

    x = _first(x)
    return _torch(lambda: torch.nn.functional.interpolate(x, scale_factor=2))


def torch_resize(disp):
    """interpolate, trilinear with aligned corners, to twice the size."""
    import torch

    interpolate = torch.nn.functional.interpolate
    disp = _first(disp).contiguous()
    size = [2 * n for n in disp.shape[2:]]
    scale = [(2 * n - 1) / (n - 1) for n in disp.shape[2:]]
    scale = _tensor(np.asarray(scale, np.float32)).reshape(3, 1, 1, 1)
    return _torch(
        lambda: (
            interpolate(disp, size=size, mode="trilinear", align_corners=True) * scale
        )
    )


def scipy_resize(disp):
    """scipy.ndimage.zoom, order 1, of each component."""
    scale = [(2 * n - 1) / (n - 1) for n in disp.shape[1:4]]

    def run():
        parts = [ndimage.zoom(disp[0, ..., k], 2, order=1) for k in range(3)]
        return np.stack([p * s for p, s in zip(parts, scale, strict=True)], -1)

    return run


def torch_mind(volume):
    """Differences of shifted slices, pooled: the steps of convexAdam's MINDSSC."""
    import torch

    functional = torch.nn.functional
    volume = _first(volume)
    pairs = [[[2 + 2 * n for n in s] for s in pair] for pair in mind.offset_pairs()]

    def run():
        wide = functional.pad(volume, (2,) * 6, mode="replicate")
        x, y, z = volume.shape[2:]
        shifted = [
            [wide[:, :, i : i + x, j : j + y, k : k + z] for i, j, k in pair]
            for pair in pairs
        ]
        ssd = torch.cat([(s - t) ** 2 for s, t in shifted], 1)
        ssd = functional.pad(ssd, (1,) * 6, mode="replicate")
        ssd = functional.avg_pool3d(ssd, 3, 1)
        ssd = ssd - ssd.min(1, keepdim=True).values
        variance = ssd.mean(1, keepdim=True)
        level = variance.mean()
        variance = variance.clamp(0.001 * level.item(), 1000 * level.item())
        return torch.exp(-ssd / variance)

    return _torch(run)


def jax_onehot_dice(fixed_labels, moving_labels, disp, num_labels):
    """The one-hot form in JAX: warp K channels, gradient to disp."""
    ids = jnp.arange(1, num_labels).reshape(1, 1, 1, 1, -1)

    def loss(disp, fixed_labels, moving_labels):
        f = (fixed_labels[..., None] == ids).astype(jnp.float32)
        m = (moving_labels[..., None] == ids).astype(jnp.float32)
        w = warp.warp(m, disp)
        overlap, total = jnp.sum(f * w, (1, 2, 3)), jnp.sum(f + w, (1, 2, 3))
        return jnp.mean(2.0 * overlap / jnp.maximum(total, 1e-6))

    args = map(jnp.asarray, (disp, fixed_labels, moving_labels))
    return timing.compile_program(jax.value_and_grad(loss), *args).run


def torch_onehot_dice(fixed_labels, moving_labels, disp, num_labels):
    """The one-hot form in PyTorch: grid_sample of K channels, gradient to disp."""
    import torch

    timing.require_memory(_ONEHOT_BYTES * fixed_labels.size * (num_labels - 1))
    functional, _, identity, disp = _sampling(fixed_labels[..., None], disp)
    disp.requires_grad_()
    f, m = (
        torch.stack([_tensor(x) == k for k in range(1, num_labels)], 1).float()
        for x in (fixed_labels, moving_labels)
    )

    def run():
        w = _grid_sample(functional, m, identity + disp)
        overlap, total = (f * w).sum((2, 3, 4)), (f + w).sum((2, 3, 4))
        loss = (2.0 * overlap / total.clamp(min=1e-6)).mean()
        return loss.detach(), torch.autograd.grad(loss, disp)[0]

    return _torch(run, gradient=True)


def torch_diffusion_gradient(disp):
    """Mean squared differences, gradient to the field."""
    import torch

    disp = _first(disp).contiguous().requires_grad_()

    def run():
        loss = sum(torch.diff(disp, dim=d).square().mean() for d in (2, 3, 4)) / 3
        return torch.autograd.grad(loss, disp)[0]

    return _torch(run, gradient=True)


def voxelmorph_diffusion_gradient(disp):
    """neurite.nn.functional.spatial_gradient, gradient to the field."""
    import torch
    from neurite.nn.functional import spatial_gradient

    disp = _first(disp).contiguous().requires_grad_()
    return _torch(
        lambda: torch.autograd.grad(spatial_gradient(disp), disp)[0], gradient=True
    )


def torch_layer(kernel, bias, *maps, upsampled):
    """interpolate, cat, conv3d and leaky_relu, channels last."""
    return _torch(_torch_block(kernel, bias, maps, upsampled)[0])


def torch_layer_gradient(cotangent, kernel, bias, *maps, upsampled):
    """The same with the gradients to kernel, bias and all inputs."""
    import torch

    block, inputs = _torch_block(kernel, bias, maps, upsampled)
    cotangent = _first(cotangent)
    for x in inputs:
        x.requires_grad_()
    return _torch(
        lambda: torch.autograd.grad(block(), inputs, cotangent), gradient=True
    )


def _torch_block(kernel, bias, maps, upsampled):
    """The block as a function, and the tensors that it reads."""
    import torch
    from torch.nn import functional

    kernel = _tensor(kernel).permute(4, 3, 0, 1, 2)
    kernel = kernel.contiguous(memory_format=torch.channels_last_3d)
    bias, maps = _tensor(bias), [_first(x) for x in maps]

    def block():
        parts = maps
        if upsampled:
            *parts, coarse = maps
            parts = [functional.interpolate(coarse, scale_factor=2), *parts]
        x = torch.cat(parts, 1)
        return functional.leaky_relu(functional.conv3d(x, kernel, bias, padding=1), 0.2)

    return block, [kernel, bias, *maps]


def _tensor(array):
    """NumPy array as a PyTorch tensor on JAX's kind of device."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).to(_torch_device())


def _first(array):
    """[B, X, Y, Z, C] as [B, C, X, Y, Z]; the memory stays channels last."""
    return _tensor(array).movedim(-1, 1)


def _torch_device() -> str:
    import torch

    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"


def _torch(function: Callable, *, gradient: bool = False) -> Callable:
    """Runs in inference mode unless a gradient is wanted, and waits for the result."""
    import torch

    def run():
        with torch.inference_mode(not gradient):
            result = function()
        if _torch_device() == "cuda":
            torch.cuda.synchronize()
        return result

    return run


def _sampling(volume, disp):
    """functional, volume, identity and disp in units of [-1, 1], last axis first."""
    import torch

    scale = (2.0 / (np.asarray(disp.shape[1:4]) - 1.0)).astype(np.float32)
    positions = np.moveaxis(np.indices(disp.shape[1:4], np.float32), 0, -1)[None]
    identity = _tensor((positions * scale - 1.0)[..., ::-1])
    return (
        torch.nn.functional,
        _first(volume),
        identity,
        _tensor((disp * scale)[..., ::-1]),
    )


def _grid_sample(functional, volume, grid):
    return functional.grid_sample(
        volume, grid, mode="bilinear", padding_mode="border", align_corners=True
    )


def _monai_warp_block():
    import warnings

    from monai.networks.blocks import Warp

    with warnings.catch_warnings():
        # Without its own extension it says that it uses PyTorch's.
        warnings.simplefilter("ignore")
        return Warp()


def _monai_ncc_loss():
    from monai.losses import LocalNormalizedCrossCorrelationLoss

    return LocalNormalizedCrossCorrelationLoss(spatial_dims=3, kernel_size=9)


def _neurite_ncc():
    from neurite.nn.modules import NCC

    return NCC(window_size=9)


def _loss(loss, fixed, moving, *, gradient):
    """loss(moving, fixed), with its gradient to moving if asked."""
    import torch

    fixed, moving = _first(fixed), _first(moving)
    if not gradient:
        return _torch(lambda: loss(moving, fixed))
    moving.requires_grad_()

    def run():
        return torch.autograd.grad(loss(moving, fixed).sum(), moving)[0]

    return _torch(run, gradient=True)


def _torch_ncc(box, fixed, moving, *, gradient):
    """Squared local correlation coefficient, window 9, from five box sums."""

    def loss(m, f):
        count = 9.0**3
        sum_f, sum_m = box(f), box(m)
        c = box(f * m) - sum_f * sum_m / count
        vf = box(f * f) - sum_f * sum_f / count
        vm = box(m * m) - sum_m * sum_m / count
        return (c * c / (vf * vm + 1e-5)).mean()

    return _loss(loss, fixed, moving, gradient=gradient)


def _box_pool(x):
    import torch

    for axis in range(3):
        size = [9 if k == axis else 1 for k in range(3)]
        pad = [4 if k == axis else 0 for k in range(3)]
        x = torch.nn.functional.avg_pool3d(x, size, 1, pad) * 9.0
    return x


def _box_conv(x):
    import torch

    for axis in range(3):
        size = [9 if k == axis else 1 for k in range(3)]
        ones = torch.ones(1, 1, *size, device=x.device)
        x = torch.nn.functional.conv3d(x, ones, padding=[n // 2 for n in size])
    return x


def _sitk_field(disp):
    """A displacement in voxels as SimpleITK's field of doubles, spacing 1."""
    import SimpleITK as sitk

    array = np.transpose(disp[0], (2, 1, 0, 3)).astype(np.float64)
    return sitk.GetImageFromArray(array, isVector=True)


def _jacobian_statistics(detj):
    return np.mean(detj <= 0), np.std(np.log(np.maximum(detj, 1e-9)))
