"""Pre-alignment of scans by matched features, for many pairs of one model.

The scans are described on a grid of the spacing that the features were trained at, and
once each while they keep coming back.
"""

import dataclasses
import threading
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from unireg_jax.errors import UserError
from unireg_jax.imaging import orientation, preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.preprocess import Grid, PreprocessSpec
from unireg_jax.models import features
from unireg_jax.registration import feature_affine, matching
from unireg_jax.registration.compiled import Described
from unireg_jax.registration.embedding import load_matcher
from unireg_jax.registration.kept import Kept
from unireg_jax.registration.network import Model
from unireg_jax.tasks import OUTSIDE_HU


class Matcher:
    """Finds matches of two scans and the affine map through them.

    May be called from several threads; the device serves one at a time.
    """

    def __init__(
        self,
        model: Model,
        device: threading.Lock,
        *,
        keep: int,
        describe: Callable[[Volume, np.ndarray], Described],
    ):
        """Takes the model's grid; features are loaded when first needed.

        Args:
            model: of the registration.
            device: held while the device works.
            keep: scans remembered.
            describe: describe(volume, hu), by the model's own features, where these
                find the matches on the model's own grid.
        """
        self._model, self._device, self._describe = model, device, describe
        self._extractors, self._scans = Kept(1), Kept(keep)

    def align(
        self, target: Volume, source: Volume, mask: np.ndarray | None
    ) -> tuple[feature_affine.Alignment, str]:
        """Matches two volumes.

        Args:
            target: fixed, on LPS+ axes.
            source: moving, on LPS+ axes.
            mask: [X, Y, Z] bool on target's axes, where to compare; None for the body.

        Returns:
            Alignment, and which features were matched.

        Raises:
            UserError: $UNIREG_SAM cannot be used, exit code 9; `empty`, exit code 4,
                for a mask without a voxel in the matching window.
        """
        extractor = self._extractors.get(0, lambda: load_matcher(self._model.extractor))
        spec = matching_grid(self._model.preprocess, extractor)
        fixed, moving = (self._scan(v, spec, extractor) for v in (target, source))
        where = None
        if mask is not None:
            where = body(
                mask,
                target,
                fixed.grid,
                fixed.hu,
                name="the matching window's grid",
                remedy="mask the middle of the body, or pass --affine affine",
            )
        with self._device:
            found = feature_affine.feature_align(
                fixed.maps,
                moving.maps,
                fixed.hu,
                moving.hu,
                fixed_vox2world=fixed.grid.vox2world,
                moving_vox2world=moving.grid.vox2world,
                fixed_mask=where,
                bodies=(fixed.body if where is None else where, moving.body),
                plan=matching.plan_for(extractor.backend, spec.spacing_mm),
            )
        return found, extractor.label

    def _scan(self, volume, spec, extractor) -> "_Scan":
        def make():
            grid = preprocess.network_grid(volume, spec)
            hu = preprocess.prepare_image(volume, grid, spec)
            own = extractor is self._model.extractor and spec == self._model.preprocess
            with self._device:
                if own:
                    maps = self._describe(volume, hu).features
                else:
                    maps = jax.jit(features.describe)(hu[None, ..., None], extractor)
            return _Scan(grid, hu, body(None, volume, grid, hu), maps)

        return self._scans.get(id(volume), make, volume)


class _Scan(NamedTuple):
    """A scan as matching sees it.

    Attributes:
        grid: of its own.
        hu: [X, Y, Z] int16.
        body: [X, Y, Z] bool.
        maps: features.Maps.
    """

    grid: Grid
    hu: np.ndarray
    body: np.ndarray
    maps: features.Maps


def matching_grid(
    spec: PreprocessSpec, extractor: features.Extractor
) -> PreprocessSpec:
    """Gives the extent of the network's grid the spacing that features know.

    Args:
        spec: of the registration network.
        extractor: of the features.

    Returns:
        spec itself, or one of the extractor's spacing in multiples of 16 voxels.
    """
    if extractor.spacing_mm in (None, spec.spacing_mm):
        return spec
    extent = np.array(spec.shape) * spec.spacing_mm / extractor.spacing_mm
    shape = tuple(int(16 * np.ceil(n / 16 - 1e-6)) for n in extent)
    return dataclasses.replace(spec, shape=shape, spacing_mm=extractor.spacing_mm)


def body(
    mask: np.ndarray | None,
    volume: Volume,
    grid: Grid,
    hu: np.ndarray,
    *,
    name: str = "the network's grid",
    remedy: str = "mask the body, or leave the mask out",
) -> np.ndarray:
    """Marks where a scan is compared.

    Args:
        mask: [X, Y, Z] bool on the volume's axes; None for the body.
        volume: the scan.
        grid: where the result lies.
        hu: [x, y, z] int16, the scan there.
        name: of that grid, for the message.
        remedy: for a mask without a voxel there, for the message.

    Returns:
        [x, y, z] bool.

    Raises:
        UserError: `empty`, exit code 4, for a mask without a voxel there.
    """
    if mask is None:
        inside = preprocess.body_mask(Volume(hu, grid.vox2world))
        return inside & (hu != OUTSIDE_HU)
    labels = Volume((mask != 0).astype(np.uint8), volume.vox2world)
    inside = (preprocess.prepare_labels(labels, grid) > 0) & (hu != OUTSIDE_HU)
    if not inside.any():
        spacing = orientation.spacing_mm(grid.vox2world)
        mm = " x ".join(f"{s:g}" for s in spacing)
        raise UserError(
            "empty",
            f"empty: fixed mask: a voxel of the scan on {name} of {mm} mm expected, "
            f"got none; {remedy}",
        )
    return inside
