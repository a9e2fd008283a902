"""Headerless volumes: the published grid, and nothing but it."""

import numpy as np
import pytest

from unireg_jax.errors import UserError
from unireg_jax.imaging import raw

GRID = raw.RawGrid((7, 6, 5), (1.0, 1.5, 2.5), -1024)


def test_read_raw_x_is_fastest(tmp_path):
    stored = np.arange(210, dtype="<i2")
    stored.tofile(tmp_path / "a.img")
    volume = raw.read_raw(tmp_path / "a.img", GRID)
    assert volume.data.shape == (7, 6, 5) and volume.data.dtype == np.int16
    assert volume.data[1, 0, 0] == 1 - 1024
    assert volume.data[0, 1, 0] == 7 - 1024
    assert volume.data[0, 0, 1] == 42 - 1024
    assert volume.spacing_mm == (1.0, 1.5, 2.5)


def test_read_raw_turns_what_is_stored_from_head_to_feet(tmp_path):
    np.arange(210, dtype="<i2").tofile(tmp_path / "a.img")
    plain = raw.read_raw(tmp_path / "a.img", GRID)
    volume = raw.read_raw(tmp_path / "a.img", GRID._replace(codes="LPI"))
    np.testing.assert_array_equal(volume.data, plain.data[..., ::-1])
    # The first stored voxel stays where it was, the last one lies below it.
    assert volume.native.vox2world.tolist() == np.diag([1.0, 1.5, -2.5, 1]).tolist()
    np.testing.assert_allclose(volume.vox2world @ [0, 0, 4, 1], [0, 0, 0, 1])
    np.testing.assert_allclose(volume.vox2world @ [0, 0, 0, 1], [0, 0, -10, 1])


def test_read_raw_refuses_another_size(tmp_path):
    np.zeros(209, "<i2").tofile(tmp_path / "a.img")
    with pytest.raises(UserError, match="expected 420 bytes .*, got 418"):
        raw.read_raw(tmp_path / "a.img", GRID)
