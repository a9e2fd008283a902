"""The same network and training step in PyTorch, for experiments/benchmark.py.

Same layers (models/backbone.py, static head of three 1x1x1 layers), channels-last, with
the warp by grid_sample, local NCC by average pooling, diffusion, optional soft Dice of
warped one-hot labels, and SGD. No features: the correlation is an input.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

_WIDTHS = {
    "e0": (2, 16),
    "e1": (43, 32),
    "e2": (32, 32),
    "e3": (32, 32),
    "d0": (32, 32),
    "d1": (64, 32),
    "d2": (64, 32),
    "d3": (64, 32),
    "r0": (48, 32),
    "r1": (32, 16),
    "r2": (16, 16),
    "p": (16, 8),
}
_LAST = torch.channels_last_3d


class Twin(torch.nn.Module):
    """Images and correlation -> field [1, 3, X, Y, Z] in [-1, 1] units."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleDict(
            {k: torch.nn.Conv3d(a, b, 3, padding=1) for k, (a, b) in _WIDTHS.items()}
        )
        self.head = torch.nn.Sequential(
            torch.nn.Conv3d(8, 8, 1),
            torch.nn.LeakyReLU(0.2),
            torch.nn.Conv3d(8, 8, 1),
            torch.nn.LeakyReLU(0.2),
            torch.nn.Conv3d(8, 3, 1),
        )
        torch.nn.init.normal_(self.head[-1].weight, std=1e-5)
        self.to(memory_format=_LAST)

    def _conv(self, name, x):
        return functional.leaky_relu(self.layers[name](x), 0.2)

    def forward(self, images, corr):
        def up(x):
            return functional.interpolate(x, scale_factor=2, mode="nearest")

        skips = [self._conv("e0", images)]
        x = torch.cat([functional.max_pool3d(skips[0], 2), corr], 1)
        for name in ("e1", "e2", "e3"):
            skips.append(self._conv(name, x))
            x = functional.max_pool3d(skips[-1], 2)
        x = self._conv("d0", x)
        for name, skip in zip(("d1", "d2", "d3"), skips[:0:-1], strict=True):
            x = self._conv(name, torch.cat([up(x), skip], 1))
        x = torch.cat([up(x), skips[0]], 1)
        for name in ("r0", "r1", "r2"):
            x = self._conv(name, x)
        return self.head(self.layers["p"](x))


def prepare(
    fixed: np.ndarray, moving: np.ndarray, corr: np.ndarray, labels: np.ndarray
) -> dict[str, Callable]:
    """Functions that run once: forward, step, and step with Dice.

    Args:
        fixed: [X, Y, Z] float32 in [-1, 1].
        moving: the same.
        corr: [X/2, Y/2, Z/2, 27] float32.
        labels: [X, Y, Z] integer, of both scans; 0 is background.
    """
    twin = Twin()
    optimizer = torch.optim.SGD(twin.parameters(), lr=5e-5, momentum=0.99)
    images = torch.tensor(np.stack([moving, fixed])[None]).to(memory_format=_LAST)
    corr = torch.tensor(corr).permute(3, 0, 1, 2)[None].to(memory_format=_LAST)
    still = functional.affine_grid(
        torch.eye(3, 4)[None], (1, 1, *fixed.shape), align_corners=True
    )
    count = int(labels.max()) + 1
    onehot = functional.one_hot(torch.tensor(labels).long(), count)[..., 1:]
    onehot = onehot.permute(3, 0, 1, 2)[None].float()

    def forward():
        with torch.inference_mode():
            twin(images, corr)

    def step(with_dice):
        optimizer.zero_grad()
        field = twin(images, corr)
        # grid_sample wants the last axis first.
        grid = still + field.permute(0, 2, 3, 4, 1).flip(-1)
        loss = _diffusion(field) - _ncc(images[:, 1:], _warp(images[:, :1], grid))
        if with_dice:
            loss = loss - _dice(onehot, _warp(onehot, grid))
        loss.backward()
        optimizer.step()

    return {
        "forward": forward,
        "step": lambda: step(False),
        "step with Dice": lambda: step(True),
    }


def _warp(volume, grid):
    return functional.grid_sample(
        volume, grid, align_corners=True, padding_mode="border"
    )


def box_mean(x: torch.Tensor, window: int) -> torch.Tensor:
    """Means over cubes, of what lies inside the grid.

    One axis after another: at once, a window of 9^3 takes tens of times as long.

    Args:
        x: [B, C, X, Y, Z] float.
        window: odd, voxels.

    Returns:
        The same shape.
    """
    for axis in range(3):
        size, pad = [1, 1, 1], [0, 0, 0]
        size[axis], pad[axis] = window, window // 2
        x = functional.avg_pool3d(x, size, 1, pad, count_include_pad=False)
    return x


def _ncc(a, b):
    mean_a, mean_b = box_mean(a, 9), box_mean(b, 9)
    cross = box_mean(a * b, 9) - mean_a * mean_b
    var_a, var_b = box_mean(a * a, 9) - mean_a**2, box_mean(b * b, 9) - mean_b**2
    return (cross**2 / (var_a * var_b + 1e-5)).mean()


def _diffusion(field):
    return sum(field.diff(dim=axis).square().mean() for axis in (2, 3, 4))


def _dice(a, b):
    axes = (2, 3, 4)
    return (2 * (a * b).sum(axes) / (a.sum(axes) + b.sum(axes) + 1e-5)).mean()
