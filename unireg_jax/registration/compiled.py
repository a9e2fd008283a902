"""One network grid, compiled ahead of time: HU volumes -> displacement and its quality.

Three programs per grid: the features of one volume, the displacement of two volumes
with their features, and the quality of a displacement. So a volume that meets many
others is described once, and one pass of the backbone serves any number of conditions.
JAX keeps programs by function, shapes and static arguments: compiling the same grid
again in one process costs milliseconds.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unireg_jax.models import features
from unireg_jax.models.features import Extractor, Maps
from unireg_jax.ops import intensity, jacobian, ncc, warp
from unireg_jax.registration.network import Model
from unireg_jax.tasks import PairType, Region


class Described(NamedTuple):
    """A volume on the device with its features; see `Compiled.describe`.

    Attributes:
        hu: [1, X, Y, Z, 1], HU on the network's grid.
        features: see models/features; None where nothing compares them.
    """

    hu: jax.Array
    features: Maps | None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Compiled:
    """A network compiled for one grid, from `compile_register`.

    Inputs go to the device by explicit transfers and results stay there: a call neither
    waits for the device nor compiles.

    Attributes:
        shape: (X, Y, Z) voxels of the grid.
        dtype: of the HU volumes.
        conditions: N, regions and pair types per call.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    conditions: int
    _params: Any
    _extractor: Extractor
    _describe: jax.stages.Compiled
    _predict: jax.stages.Compiled | None
    _judge: jax.stages.Compiled

    def describe(self, hu: np.ndarray) -> Described:
        """Computes the features of one volume, for any number of calls.

        Args:
            hu: [X, Y, Z] of `dtype`, HU on the network's grid; OUTSIDE_HU beyond the
                scan.

        Returns:
            Described, on the device.

        Raises:
            ValueError: another shape or dtype.
        """
        if np.shape(hu) != self.shape or hu.dtype != self.dtype:
            raise ValueError(
                f"hu must be {self.shape} {self.dtype} in HU, got {np.shape(hu)} "
                f"{hu.dtype}; compile_register fixes both"
            )
        hu = jax.device_put(np.asarray(hu)[None, ..., None])
        return Described(hu, self._describe(hu, self._extractor))

    def __call__(
        self,
        fixed: np.ndarray | Described,
        moving: np.ndarray | Described,
        region: int | Sequence[int] | np.ndarray,
        pair_type: int | Sequence[int] | np.ndarray,
    ) -> jax.Array:
        """Predicts the displacement of one pair under every condition.

        Args:
            fixed: [X, Y, Z] HU, as `describe` takes it, or what it gave.
            moving: the same, pre-aligned on the fixed grid.
            region: tasks.Region, one or [N].
            pair_type: tasks.PairType, one or [N].

        Returns:
            [N, X, Y, Z, 3] float32, voxels, on the device: moving is read at
            x + disp(x).

        Raises:
            ValueError: another shape or dtype, an unknown region or pair type, or
                compiled without the network.
        """
        if self._predict is None:
            raise ValueError("compiled without the network; pass network=True")
        fixed, moving = (
            scan if isinstance(scan, Described) else self.describe(scan)
            for scan in (fixed, moving)
        )
        codes = [
            _codes("region", region, Region, self.conditions),
            _codes("pair_type", pair_type, PairType, self.conditions),
        ]
        return self._predict(self._params, fixed, moving, *jax.device_put(codes))

    def judge(
        self, fixed: Described, moving: Described, body: np.ndarray, disp: jax.Array
    ) -> dict[str, jax.Array]:
        """Measures displacements over the fixed body.

        Args:
            fixed: from `describe`.
            moving: from `describe`.
            body: [X, Y, Z] bool, where to compare.
            disp: [N, X, Y, Z, 3] float32, voxels, from a call.

        Returns:
            [N] float32 each, on the device: fold_percent_network and sdlogj_network
            (ops/jacobian.py), ncc_before and ncc_after (global, signed, of windowed
            intensities; NaN where nothing of the body has a partner).

        Raises:
            ValueError: body has another shape or dtype.
        """
        if body.shape != self.shape or body.dtype != bool:
            raise ValueError(
                f"body must be {self.shape} bool, got {body.shape} {body.dtype}"
            )
        return self._judge(fixed.hu, moving.hu, jax.device_put(body[None]), disp)


def compile_register(
    model: Model,
    shape: tuple[int, int, int] | None = None,
    *,
    conditions: int = 1,
    dtype: Any = np.int16,
    network: bool = True,
    unit_shape: tuple[int, int, int] | None = None,
) -> Compiled:
    """Compiles a network for one grid, for the default device.

    Args:
        model: from `load_model`.
        shape: (X, Y, Z) voxels, multiples of 16; None for the grid of the weights.
        conditions: N, regions and pair types that every call answers; the backbone runs
            once for all of them.
        dtype: of the HU volumes, int16 or float32.
        network: False leaves the displacement out; features and quality stay.
        unit_shape: (X, Y, Z) voxels of the grid that the network was trained on, where
            `shape` is a larger window of the same voxels, so that a vector keeps its
            length; None for `shape` itself.

    Returns:
        Compiled.

    Raises:
        ValueError: shape, dtype or conditions are not as above.
    """
    shape = check_shape(model.preprocess.shape if shape is None else shape)
    dtype = np.dtype(dtype)
    if dtype not in (np.int16, np.float32):
        raise ValueError(f"dtype must be int16 or float32, got {dtype}")
    if conditions < 1:
        raise ValueError(f"conditions must be at least 1, got {conditions}")
    window = (model.preprocess.hu_low, model.preprocess.hu_high)
    of = jax.ShapeDtypeStruct
    hu = of((1, *shape, 1), dtype)
    describe = jax.jit(features.describe).lower(hu, model.extractor)
    scan = Described(
        hu, jax.tree.map(lambda s: of(s.shape, s.dtype), describe.out_info)
    )
    codes = of((conditions,), jnp.int32)
    statics = ("module", "window", "combine", "unit_shape")
    predict = jax.jit(_predict, static_argnames=statics).lower(
        model.params,
        scan,
        scan,
        codes,
        codes,
        module=model.module,
        window=window,
        combine=model.extractor.combine,
        unit_shape=unit_shape,
    )
    body, disp = of((1, *shape), bool), of((conditions, *shape, 3), jnp.float32)
    judge = jax.jit(_judge, static_argnames="window").lower(
        hu, hu, body, disp, window=window
    )
    lowered = (describe, predict if network else None, judge)
    programs = (program and program.compile() for program in lowered)
    return Compiled(shape, dtype, conditions, model.params, model.extractor, *programs)


def _codes(name: str, values: Any, kind: type[enum.IntEnum], count: int) -> np.ndarray:
    """[count] int32; an unknown code would be an all-zero one-hot, so it is refused."""
    codes = np.atleast_1d(np.asarray(values))
    if codes.shape != (count,):
        raise ValueError(
            f"{name} must be ({count},), got {codes.shape}; compile_register fixes the "
            "number"
        )
    known = [int(k) for k in kind]
    if codes.dtype.kind not in "iu" or not np.isin(codes, known).all():
        raise ValueError(
            f"{name} must be of tasks.{kind.__name__}, {known}, got {codes.tolist()}"
        )
    return codes.astype(np.int32)


def judge_field(
    fixed_hu: np.ndarray,
    moving_hu: np.ndarray,
    body: np.ndarray,
    disp: np.ndarray,
    *,
    window: tuple[float, float],
) -> dict[str, jax.Array]:
    """Measures one displacement on a grid of any size; see `Compiled.judge`.

    Args:
        fixed_hu: [X, Y, Z], HU; OUTSIDE_HU beyond the scan.
        moving_hu: the same, pre-aligned on the fixed grid.
        body: [X, Y, Z] bool, where to compare.
        disp: [X, Y, Z, 3] float32, voxels.
        window: lowest and highest HU.

    Returns:
        [1] float32 each, on the device: names as `Compiled.judge`.
    """
    scans = (jax.device_put(hu[None, ..., None]) for hu in (fixed_hu, moving_hu))
    judge = jax.jit(_judge, static_argnames="window")
    return judge(*scans, jax.device_put(body[None]), disp[None], window=window)


def check_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Refuses a grid that the network cannot take.

    Args:
        shape: (X, Y, Z) voxels.

    Returns:
        The same, as a tuple of int.

    Raises:
        ValueError: not three positive multiples of 16.
    """
    shape = tuple(int(n) for n in shape)
    if len(shape) != 3 or any(n < 16 or n % 16 for n in shape):
        raise ValueError(
            f"shape must be three multiples of 16 voxels, got {shape}; pad the volumes"
        )
    return shape


def encode_described(
    params: Any, fixed: Described, moving: Described, *, module, window, combine
) -> jax.Array:
    """Runs the backbone on described volumes; traced, as part of a program.

    Args:
        params: of `module`.
        fixed: B volumes and their features.
        moving: the same, pre-aligned on the fixed grid.
        module: UniReg.
        window: lowest and highest HU.
        combine: see features.Extractor.

    Returns:
        [B, ..., 8] float32, see `UniReg.encode`.
    """
    corr = features.correlate(fixed.features, moving.features, combine=combine)
    images = (_window(scan.hu, window) for scan in (fixed, moving))
    return module.apply({"params": params}, *images, corr, method="encode")


def _predict(
    params, fixed, moving, region, pair_type, *, module, window, combine, unit_shape
):
    """Displacements of one pair, [N, X, Y, Z, 3]; every task shares the program."""
    encoded = encode_described(
        params, fixed, moving, module=module, window=window, combine=combine
    )

    def decode(region, pair_type):
        fields = module.apply(
            {"params": params},
            encoded,
            region[None],
            pair_type[None],
            unit_shape=unit_shape,
            method="decode",
        )
        return fields[0]

    return jax.vmap(decode)(region, pair_type)


def _correlation(fixed, moving, mask):
    found = ncc.global_ncc(fixed, moving, mask=mask)
    return jnp.where(mask.any(axis=(1, 2, 3)), found, jnp.nan)


def _judge(fixed_hu, moving_hu, body, disp, *, window):
    """Scalars of N displacements of one pair, [N] each."""
    fixed, moving = _window(fixed_hu, window), _window(moving_hu, window)
    valid = intensity.valid(moving_hu)
    before = _correlation(fixed, moving, body & valid[..., 0])

    def measure(disp):
        disp = disp[None]
        coords = warp.identity_coords(disp.shape[1:4])[None] + disp
        reached = warp.sample(valid, coords, order=0)[..., 0]
        after = body & reached & warp.inside(disp)
        values = {
            "fold_percent_network": 100 * jacobian.folding_fraction(disp, mask=body),
            "sdlogj_network": jacobian.sdlogj(disp, mask=body),
            "ncc_before": before,
            "ncc_after": _correlation(fixed, warp.warp(moving, disp), after),
        }
        return {name: value[0] for name, value in values.items()}

    return jax.lax.map(measure, disp)


def _window(hu, window):
    low, high = window
    return intensity.window(hu, low=low, high=high)
