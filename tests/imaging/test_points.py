"""Landmark tables."""

import numpy as np
import pytest

from unireg_jax import errors
from unireg_jax.errors import UserError
from unireg_jax.imaging import nifti, points

HEAD = "fixed_x_mm,fixed_y_mm,fixed_z_mm,moving_x_mm,moving_y_mm,moving_z_mm"


def test_read_points_by_column_name(tmp_path):
    path = tmp_path / "a.csv"
    names = HEAD.split(",")
    path.write_text(f"ncc,name,{','.join(reversed(names))}\n.9,carina,6,5,4,3,2,1\n")
    pairs = points.read_points(path)
    assert pairs.names == ["carina"]
    np.testing.assert_array_equal(pairs.fixed, [[1, 2, 3]])
    np.testing.assert_array_equal(pairs.moving, [[4, 5, 6]])


def test_read_points_without_names_counts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEAD}\r\n1,2,3,4,5,6\r\n".encode())
    assert points.read_points(path).names == ["1"]


def test_points_round_trip_is_exact(tmp_path):
    rng = np.random.default_rng(0)
    given = points.PointPairs(
        ["a", 'b,"c"', ""], rng.normal(size=(3, 3)), rng.normal(size=(3, 3))
    )
    points.write_points(tmp_path / "a.csv", given)
    again = points.read_points(tmp_path / "a.csv")
    assert again.names == given.names
    np.testing.assert_array_equal(again.fixed, given.fixed)
    np.testing.assert_array_equal(again.moving, given.moving)


@pytest.mark.parametrize(
    "content, reason, match",
    [
        (b"", "empty", "0 bytes"),
        (HEAD.encode() + b"\n", "empty", "one point or more, got none"),
        (b"x,y,z\n1,2,3\n", "schema", "no fixed_x_mm, .* among .'x', 'y', 'z'."),
        (f"{HEAD}\n1,2,3,4,5,left\n".encode(), "schema", "got 'left' in line 2, col"),
        (f"{HEAD}\n1,2,3,4,5,6\n1,2,3\n".encode(), "schema", "got None in line 3"),
        (f"{HEAD}\n1,2,nan,4,5,6\n".encode(), "schema", "column fixed_z_mm; mend"),
        (b"\xff\xfe\x00\x00", "schema", "a CSV table in UTF-8"),
    ],
)
def test_read_points_refuses(tmp_path, content, reason, match):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=match) as caught:
        points.read_points(path)
    assert (caught.value.reason, caught.value.exit_code) == (reason, errors.FAILED)


def test_read_points_refuses_absent_and_folder(tmp_path):
    for path, reason in ((tmp_path / "no.csv", "not_found"), (tmp_path, "not_a_file")):
        with pytest.raises(UserError, match=reason) as caught:
            points.read_points(path)
        assert caught.value.reason == reason


def test_write_points_rejects_unequal_counts(tmp_path):
    pairs = points.PointPairs(["a"], np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"points must be \(1, 3\) in mm"):
        points.write_points(tmp_path / "a.csv", pairs)


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        ("lps_mm", "x_mm,y_mm,z_mm\n12,30.5,-7\n\n10,30.5,-4\n"),
        ("voxel_from_0", "0,2,1\n1,2,2\n"),
        ("voxel_from_1", " 1\t3\t2\textra\r\n 2\t3\t3\r\n"),
    ],
)
def test_read_table_gives_lps_mm(tmp_path, frame, text):
    (tmp_path / "p.csv").write_bytes(text.encode())
    stored = np.diag([-2.0, 4.0, 3.0, 1.0])
    stored[:3, 3] = 12, 22.5, -10
    # On LPS+ axes the first axis is turned: indices count along the axes as stored.
    turned = np.diag([2.0, 4.0, 3.0, 1.0])
    volume = nifti.Volume(
        np.zeros((3, 4, 5), np.int16), turned, native=nifti.Native((3, 4, 5), stored)
    )
    found = points.read_table(tmp_path / "p.csv", frame, volume)
    np.testing.assert_allclose(found, [[12, 30.5, -7], [10, 30.5, -4]])


@pytest.mark.parametrize(
    ("text", "reason"),
    [("1,2,3\n1,2\n", "schema"), ("1,2\n", "schema"), ("a,b,c\n", "empty")],
)
def test_read_table_refuses_what_is_no_point(tmp_path, text, reason):
    (tmp_path / "p.csv").write_text(text)
    volume = nifti.Volume(np.zeros((3, 4, 5), np.int16), np.eye(4))
    with pytest.raises(UserError) as caught:
        points.read_table(tmp_path / "p.csv", "voxel_from_0", volume)
    assert caught.value.reason == reason
