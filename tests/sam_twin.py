"""The SAM network in PyTorch, random weights, with the names of the public files.

Written from the published description, for parity: ResNet3d-18 with normalisation,
feature pyramids, unit vectors. Axes are [batch, channel, Z, Y, X].
"""

import collections

import torch
from torch import nn
from torch.nn import functional

KERNELS = ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))  # of the four stages
STRIDES = ((1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2))


class _Unit(nn.Module):
    """Convolution, with normalisation and no bias or with bias alone."""

    def __init__(self, before, width, kernel, stride=1, *, norm=True):
        super().__init__()
        padding = tuple(n // 2 for n in kernel)
        self.conv = nn.Conv3d(before, width, kernel, stride, padding, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm3d(width)

    def forward(self, x):
        x = self.conv(x)
        return self.bn(x) if hasattr(self, "bn") else x


class _Block(nn.Module):
    def __init__(self, before, width, kernel, stride):
        super().__init__()
        self.conv1 = _Unit(before, width, kernel, stride)
        self.conv2 = _Unit(width, width, kernel)
        project = stride != 1
        self.downsample = (
            _Unit(before, width, (1, 1, 1), stride) if project else nn.Identity()
        )

    def forward(self, x):
        y = self.conv2(functional.relu(self.conv1(x)))
        return functional.relu(y + self.downsample(x))


class _Backbone(nn.Module):
    def __init__(self, stem, stages):
        super().__init__()
        self.conv1 = _Unit(1, stem, (3, 7, 7))
        before = stem
        for k, width in enumerate(stages):
            blocks = [
                _Block(before, width, KERNELS[k], STRIDES[k]),
                _Block(width, width, KERNELS[k], 1),
            ]
            setattr(self, f"layer{k + 1}", nn.Sequential(*blocks))
            before = width

    def forward(self, x):
        x = self.layer1(functional.relu(self.conv1(x)))
        maps = [functional.max_pool3d(x, (2, 1, 1), (2, 1, 1))]
        for stage in (self.layer2, self.layer3, self.layer4):
            maps.append(stage(maps[-1]))
        return maps


class _Pyramid(nn.Module):
    def __init__(self, widths, channels):
        super().__init__()
        units = [_Unit(n, channels, (1, 1, 1), norm=False) for n in widths]
        self.lateral_convs = nn.ModuleList(units)
        last = _Unit(channels, channels, (3, 3, 3), norm=False)
        self.fpn_convs = nn.ModuleList([last])

    def forward(self, maps):
        levels = [unit(x) for unit, x in zip(self.lateral_convs, maps, strict=True)]
        x = levels.pop()
        while levels:
            finer = levels.pop()
            size = finer.shape[2:]
            x = finer + functional.interpolate(x, size=size, mode="nearest")
        return functional.normalize(self.fpn_convs[0](x), dim=1)


class Twin(nn.Module):
    """[B, 1, Z, Y, X] -> [fine, coarse], each [B, C, ...] of unit length."""

    def __init__(self, stem, stages, channels):
        super().__init__()
        self.backbone = _Backbone(stem, stages)
        self.neck = _Pyramid(stages[:3], channels)
        self.read_out_head = _Pyramid(stages[3:], channels)

    def forward(self, x):
        maps = self.backbone(x)
        return [self.neck(maps[:3]), self.read_out_head(maps[3:])]


def make_twin(stem=4, stages=(4, 6, 8, 10), channels=5, seed=0) -> Twin:
    """A network in evaluation mode whose every number is random.

    Args:
        stem: channels of the first convolution; 64 in the public files.
        stages: of the four stages; (64, 128, 256, 512).
        channels: of the embeddings; 128.
        seed: of all numbers.

    Returns:
        Twin, float32.
    """
    generator = torch.Generator().manual_seed(seed)
    twin = Twin(stem, tuple(stages), channels).eval()
    with torch.no_grad():
        for name, value in twin.state_dict().items():
            noise = torch.empty(value.shape)
            if name.endswith("num_batches_tracked"):
                value.fill_(1000)
            elif name.endswith(("running_var", "bn.weight")):
                value.copy_(noise.uniform_(0.5, 1.5, generator=generator))
            elif value.ndim == 5:  # keeps the size of what passes through
                fan_in = value[0].numel()
                noise.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
                value.copy_(noise)
            else:
                value.copy_(noise.normal_(0, 0.2, generator=generator))
    return twin


def state_dict_layouts(twin: Twin) -> dict[str, dict]:
    """What the three public files hold at their top level, with this network inside.

    Args:
        twin: of `make_twin`.

    Returns:
        "SAM" (mmcv's file), "SAMv2" (also a semantic head), "SAME" (the network inside
        a registration network, saved from a parallel wrapper).
    """
    net = twin.state_dict()
    meta = {
        "mmcv_version": "1.3.0",
        "time": "Thu Jan  1 00:00:00 2022",
        "config": "model = dict(\n    type='Sam')\n",
        "CLASSES": ("a", "b"),
        "epoch": 1,
        "iter": 20000,
        "seed": None,
        "hook_msgs": {},
    }
    weight = next(twin.parameters())
    optimizer = torch.optim.SGD([weight], lr=0.02, momentum=0.9)
    weight.grad = torch.ones_like(weight)
    value = weight.detach().clone()
    optimizer.step()
    with torch.no_grad():
        weight.copy_(value)
    semantic = collections.OrderedDict(net)
    semantic |= {
        f"semantic_head.{name.removeprefix('neck.')}": tensor.clone()
        for name, tensor in net.items()
        if name.startswith("neck.")
    }
    other = nn.Conv3d(2, 3, 3)
    same = {f"module.embed.{name}": tensor for name, tensor in net.items()}
    for name in ("unet_model.encoder.0.0.conv", "unet_model.remaining.0.conv", "flow"):
        same |= {f"module.{name}.{n}": t for n, t in other.state_dict().items()}
    return {
        "SAM": {"meta": meta, "state_dict": net, "optimizer": optimizer.state_dict()},
        "SAMv2": {"meta": meta, "state_dict": semantic},
        "SAME": collections.OrderedDict(same),
    }
