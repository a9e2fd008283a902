"""SAM: the self-supervised anatomical embedding network (UniReg, section 4.3, Table 7).

A 3-D ResNet-18 whose first stages work in the axial plane, a feature pyramid for the
fine map and a head on the last stage for the coarse one (Yan et al., "SAM:
Self-supervised Learning of Pixel-wise Anatomical Embeddings", IEEE TMI 2022):

    stage     kernel (x y z)   stride   channels   voxels of an X, Y, Z volume
    stem      7 7 3            1 1 1    64         X, Y, Z
    layer1    3 3 1            2 2 1    64         X/2, Y/2, Z, then a maximum over z
    layer2    3 3 1            2 2 1    128        X/4, Y/4, Z/2
    layer3    3 3 3            2 2 1    256        X/8, Y/8, Z/2
    layer4    3 3 3            2 2 2    512        X/16, Y/16, Z/4

32.8 million parameters, 1146 GMACs at 192x192x160; frozen in registration, so neither
counts as the registration network's (the paper's 0.36 M and 477 G). Inside, axes are Z,
X, Y: planes one after another are a batch of 2-D maps.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from unireg_jax.ops import conv

# HU to the network's input: [-1024, 3071] -> [0, 255], less 50 (air -50, water 13.8).
HU_LOW, HU_HIGH = -1024.0, 3071.0
_SCALE, _SHIFT = 255.0, 50.0
_EPS = 1e-5  # of the normalisation, as in PyTorch
_MOMENTUM = 0.9  # 1 - PyTorch's 0.1
_SLAB = 8  # slices of the volume that the full-resolution stages hold at once


class Sam(nn.Module):
    """Embedding network: image -> unit vectors, fine at 1/2, coarse at the last stage.

    Two forms: with `norm` "batch" as trained, and "folded", where every normalisation
    is part of the convolution before it (`fold`), for use.

    Attributes:
        stem: channels of the first convolution.
        stages: channels of the four stages.
        channels: of the embeddings.
        last_stride: (x, y, z) of layer4.
        norm: "batch" or "folded".
        dtype: of the convolutions.
        conv_impl: formulation, see ops/conv.py.
    """

    stem: int = 64
    stages: tuple[int, ...] = (64, 128, 256, 512)
    channels: int = 128
    last_stride: tuple[int, int, int] = (2, 2, 2)
    norm: str = "folded"
    dtype: str = "float32"
    conv_impl: str = "auto"

    def setup(self):
        shared = {"norm": self.norm, "dtype": self.dtype, "impl": self.conv_impl}
        bias = self.norm == "folded"
        rest = {"dtype": self.dtype, "impl": self.conv_impl}
        self.first = _Conv(self.stem, (7, 7, 3), use_bias=bias, name="stem", **rest)
        self.first_norm = None if bias else _norm("stem_norm")
        flat, deep, last = (2, 2, 1), (3, 3, 3), tuple(self.last_stride)
        plan = (((3, 3, 1), flat), ((3, 3, 1), flat), (deep, flat), (deep, last))
        self.blocks = [
            [
                _Block(
                    width,
                    kernel,
                    stride if b == 0 else (1, 1, 1),
                    project=b == 0,
                    name=f"layer{k + 1}_{b}",
                    **shared,
                )
                for b in range(2)
            ]
            for k, (width, (kernel, stride)) in enumerate(
                zip(self.stages, plan, strict=True)
            )
        ]
        self.fine = _Pyramid(self.channels, levels=3, **rest)
        self.coarse = _Pyramid(self.channels, levels=1, **rest)

    def __call__(
        self, image: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Embeds whole volumes.

        Args:
            image: [B, X, Y, Z, 1] float32, from `scale`; X, Y multiples of 16, Z of 4.
            train: normalise by the batch and update the running statistics.

        Returns:
            fine [B, X/2, Y/2, Z/2, C] and coarse [B, X/16, Y/16, Z/4, C] (with the
            default last_stride), float32, of unit length.
        """
        return self.deep(self.shallow(_with_halo(image), train=train), train=train)

    def shallow(self, planes: jax.Array, *, train: bool = False) -> jax.Array:
        """Stem, layer1 and the maximum over pairs of planes.

        Args:
            planes: [B, 1 + Z + 1, X, Y, 1]: with one plane more at either end.
            train: see `__call__`.

        Returns:
            [B, Z/2, X/2, Y/2, stages[0]].
        """
        x = self.first(planes.astype(self.dtype), halo=True)
        if self.first_norm:
            x = self.first_norm(x, use_running_average=not train)
        x = nn.relu(x)
        for block in self.blocks[0]:
            x = block(x, train=train)
        b, z, *rest = x.shape
        return x.reshape(b, z // 2, 2, *rest).max(axis=2)

    def deep(self, x: jax.Array, *, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """All the rest; see `__call__` and `shallow`."""
        maps = [x]
        for stage in self.blocks[1:]:
            for block in stage:
                x = block(x, train=train)
            maps.append(x)
        fine, coarse = self.fine(maps[:3]), self.coarse(maps[3:])
        return tuple(_unit(_to_xyz(m.astype(jnp.float32))) for m in (fine, coarse))


def scale(hu: jax.Array) -> jax.Array:
    """Brings HU to the range that the network was trained on.

    out = 255 (clip(hu, -1024, 3071) + 1024) / 4095 - 50

    Args:
        hu: [...] any real dtype, HU; OUTSIDE_HU counts as air.

    Returns:
        [...] float32 in [-50, 205], no unit.
    """
    clipped = jnp.clip(hu.astype(jnp.float32), HU_LOW, HU_HIGH)
    return (clipped - HU_LOW) * (_SCALE / (HU_HIGH - HU_LOW)) - _SHIFT


def extract(hu: jax.Array, params: dict, network: Sam) -> tuple[jax.Array, jax.Array]:
    """Embeds HU volumes; the full-resolution stages see a few slices at a time.

    At 192x192x160 a full-resolution map of 64 channels would take 1.4 GiB.

    Args:
        hu: [B, X, Y, Z, 1] HU; X, Y multiples of 16, Z of 8.
        params: of `network`, folded.
        network: Sam with norm "folded".

    Returns:
        fine and coarse, see `Sam.__call__`.

    Raises:
        ValueError: a size does not fit.
    """
    if any(n % m for n, m in zip(hu.shape[1:4], (16, 16, _SLAB), strict=True)):
        raise ValueError(
            f"hu must be multiples of (16, 16, {_SLAB}) voxels, got {hu.shape[1:4]}; "
            "pad the volumes"
        )
    planes = _with_halo(scale(hu))
    variables = {"params": params}

    def slab(start):
        part = jax.lax.dynamic_slice_in_dim(planes, start, _SLAB + 2, axis=1)
        return network.apply(variables, part, method="shallow")

    x = jax.lax.map(slab, jnp.arange(0, hu.shape[3], _SLAB))
    # [slab, B, Z, ...] -> [B, slab * Z, ...]
    x = jnp.moveaxis(x, 0, 1)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return network.apply(variables, x, method="deep")


def fold(variables: dict) -> dict:
    """Makes the parameters of the folded form from those of the trained one.

    conv(x) k s + (b - m s), s = scale / sqrt(var + eps), m and var the running ones

    Args:
        variables: {"params", "batch_stats"} of a Sam with norm "batch".

    Returns:
        Parameters of the same Sam with norm "folded".
    """
    params, stats = variables["params"], variables["batch_stats"]
    units = {"conv1": "norm1", "conv2": "norm2", "downsample": "downsample_norm"}
    folded = {"stem": _fold(params["stem"], params["stem_norm"], stats["stem_norm"])}
    for name, block in params.items():
        if name in ("fine", "coarse"):
            folded[name] = block
        elif name.startswith("layer"):
            folded[name] = {
                unit: _fold(block[unit], block[norm], stats[name][norm])
                for unit, norm in units.items()
                if unit in block
            }
    return folded


def _fold(unit, norm, stats):
    factor = norm["scale"] / jnp.sqrt(stats["var"] + _EPS)
    kernel = unit["kernel"] * jnp.broadcast_to(factor, unit["kernel"].shape)
    return {"kernel": kernel, "bias": norm["bias"] - stats["mean"] * factor}


class _Conv(nn.Module):
    """Convolution on [B, Z, X, Y, C]; its kernel is stored [x, y, z, in, out]."""

    features: int
    kernel: Sequence[int]
    stride: Sequence[int] = (1, 1, 1)
    use_bias: bool = False
    dtype: str = "float32"
    impl: str = "auto"

    @nn.compact
    def __call__(self, x, *, halo: bool = False, slope: float = 1.0):
        init = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        bias = None
        if self.use_bias:
            zeros = nn.initializers.zeros
            bias = self.param("bias", zeros, (self.features,)).astype(self.dtype)
        kernel = jnp.transpose(kernel, (2, 0, 1, 3, 4))
        x = x.astype(self.dtype)  # normalisation gives float32
        if tuple(self.kernel) == (3, 3, 3) and tuple(self.stride) == (1, 1, 1):
            return conv.conv3d(x, kernel, bias, slope=slope, impl=self.impl)
        sx, sy, sz = self.stride
        y = conv.strided_conv3d(
            x, kernel, stride=(sz, sx, sy), halo=halo, impl=self.impl
        )
        y = y if bias is None else y + jnp.broadcast_to(bias, y.shape)
        return y if slope == 1.0 else nn.leaky_relu(y, slope)


def _norm(name: str) -> nn.BatchNorm:
    """Batch normalisation over batch and space."""
    return nn.BatchNorm(momentum=_MOMENTUM, epsilon=_EPS, name=name)


class _Block(nn.Module):
    """Basic residual block: the stride is in its first convolution."""

    features: int
    kernel: Sequence[int]
    stride: Sequence[int]
    project: bool
    norm: str
    dtype: str
    impl: str

    @nn.compact
    def __call__(self, x, *, train: bool):
        folded = self.norm == "folded"

        def unit(x, name, norm, kernel, stride):
            y = _Conv(
                self.features,
                kernel,
                stride,
                use_bias=folded,
                dtype=self.dtype,
                impl=self.impl,
                name=name,
            )(x)
            return y if folded else _norm(norm)(y, use_running_average=not train)

        y = nn.relu(unit(x, "conv1", "norm1", self.kernel, self.stride))
        y = unit(y, "conv2", "norm2", self.kernel, (1, 1, 1))
        if self.project:
            x = unit(x, "downsample", "downsample_norm", (1, 1, 1), self.stride)
        return nn.relu(x + y)


class _Pyramid(nn.Module):
    """Feature pyramid: 1x1x1 laterals, nearest up-sampling, one 3x3x3 at the end."""

    channels: int
    levels: int
    dtype: str
    impl: str

    @nn.compact
    def __call__(self, maps):
        def layer(kernel, name):
            return _Conv(
                self.channels,
                kernel,
                use_bias=True,
                dtype=self.dtype,
                impl=self.impl,
                name=name,
            )

        x = None
        for i in reversed(range(self.levels)):
            lateral = layer((1, 1, 1), f"lateral_{i}")(maps[i])
            x = lateral if x is None else lateral + _double_planes(x)
        return layer((3, 3, 3), "output")(x)


def _with_halo(image):
    """[B, X, Y, Z, 1] -> [B, 1 + Z + 1, X, Y, 1], zeros at either end."""
    planes = jnp.transpose(image, (0, 3, 1, 2, 4))
    return jnp.pad(planes, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))


def _to_xyz(x):
    return jnp.transpose(x, (0, 2, 3, 1, 4))


def _double_planes(x):
    """Repeats every voxel twice along X and Y: [B, Z, X, Y, C] -> [B, Z, 2X, 2Y, C]."""
    b, z, nx, ny, c = x.shape
    wide = jnp.broadcast_to(x[:, :, :, None, :, None], (b, z, nx, 2, ny, 2, c))
    return wide.reshape(b, z, 2 * nx, 2 * ny, c)


def _unit(features):
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
    return features * jnp.broadcast_to(inverse, features.shape)
