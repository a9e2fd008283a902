"""Landmark tables."""

import json

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
        (b"x,y,z\n1,2,3\n", "schema", "got 'x, y, z' between commas"),
        (f"{HEAD}\n1,2,3,4,5,left\n".encode(), "schema", "got 'left' in line 2, col"),
        (f"{HEAD}\n1,2,3,4,5,6\n1,2,3\n".encode(), "schema", "got none in line 3"),
        (
            f"{HEAD}\n1,2,nan,4,5,6\n".encode(),
            "schema",
            "'nan' in line 2, column fixed_z",
        ),
        (b"\xff\xfe\x00\x00", "schema", "text in UTF-8"),
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
    [
        ("1,2,3\n1,2\n", "schema"),
        ("1,2\n", "schema"),
        ("x,y,z\n", "empty"),
        ("id,x_lps,y_lps,z_lps\n1,2,3,4\n", "schema"),
        (f"{HEAD}\n1,2,3,4,5,6\n", "schema"),
    ],
)
def test_read_table_refuses_what_is_no_point(tmp_path, text, reason):
    (tmp_path / "p.csv").write_text(text)
    volume = nifti.Volume(np.zeros((3, 4, 5), np.int16), np.eye(4))
    with pytest.raises(UserError) as caught:
        points.read_table(tmp_path / "p.csv", "voxel_from_0", volume)
    assert caught.value.reason == reason


def test_read_table_refuses_markups_without_a_place(tmp_path):
    """Points of two scans are paired line by line: none may be left out."""
    points_of = [{"label": "a", "position": [1, 2, 3]}]
    points_of.append({"label": "b", "position": [], "positionStatus": "undefined"})
    markups = [{"coordinateSystem": "LPS", "controlPoints": points_of}]
    path = tmp_path / "p.mrk.json"
    path.write_text(json.dumps({"markups": markups}))
    assert len(points.read_file(path).xyz) == 1
    with pytest.raises(UserError, match="got none of b"):
        points.read_table(path, "lps_mm", None)
    points_of[1]["label"] = ""
    path.write_text(json.dumps({"markups": markups}))
    with pytest.raises(UserError, match=r"got none of \?"):
        points.read_table(path, "lps_mm", None)


# --- point files --------------------------------------------------------------------


def scan():
    """Stored with its first axis towards the right."""
    stored = np.diag([-2.0, 4.0, 3.0, 1.0])
    stored[:3, 3] = 12, 22.5, -10
    turned = np.diag([2.0, 4.0, 3.0, 1.0])
    return nifti.Volume(
        np.zeros((3, 4, 5), np.int16), turned, native=nifti.Native((3, 4, 5), stored)
    )


LPS = np.array([[12, 30.5, -7], [10, 30.5, -4]])


@pytest.mark.parametrize(
    ("name", "space", "text"),
    [
        ("p.csv", "lps", "name,x,y,z\na,12,30.5,-7\nb,10,30.5,-4\n"),
        (
            "p.csv",
            "lps",
            "score, Z_mm ,Y_mm,X_mm,label\n1,-7,30.5,12,a\n2,-4,30.5,10,b\n",
        ),
        (
            "p.csv",
            "ras",
            "\ufeffname,x,y,z\r\na,-12,-30.5,-7\r\n\r\nb,-10,-30.5,-4\r\n",
        ),
        ("p.csv", "voxel", "name,x,y,z\na,0,2,1\nb,1,2,2\n"),
        (
            "p.fcsv",
            None,
            "# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n"
            "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc\n"
            "1,12,30.5,-7,0,0,0,1,1,1,0,a,\n2,10,30.5,-4,0,0,0,1,1,1,0,b,\n",
        ),
        (
            "p.fcsv",
            "ras",
            "# Markups fiducial file version = 4.6\n# CoordinateSystem = 0\n"
            "1,-12,-30.5,-7,0,0,0,1,1,1,0,a,\n2,-10,-30.5,-4,0,0,0,1,1,1,0,b,\n",
        ),
        (
            "p.mrk.json",
            None,
            '{"markups": [{"type": "Fiducial", "coordinateSystem": "RAS", '
            '"controlPoints": [{"label": "a", "position": [-12, -30.5, -7]}, '
            '{"label": "?", "position": [], "positionStatus": "undefined"}]}, '
            '{"coordinateSystem": "RAS", "controlPoints": '
            '[{"label": "b", "position": [-10, -30.5, -4.0]}]}]}',
        ),
    ],
)
def test_read_file_gives_lps_mm(tmp_path, name, space, text):
    (tmp_path / name).write_bytes(text.encode())
    found = points.read_file(tmp_path / name, space, scan())
    np.testing.assert_allclose(found.xyz, LPS)
    assert found.names == ["a", "b"]
    # Written as read, all else in the file is as it was.
    points.write_file(tmp_path / f"again_{name}", found, None, scan())
    again = points.read_file(tmp_path / f"again_{name}", space, scan())
    np.testing.assert_allclose(again.xyz, LPS, atol=1e-6)
    written = (tmp_path / f"again_{name}").read_text()
    for word in ("score", "undefined", "4.11", "4.6", "desc"):
        assert (word in written) == (word in text)


@pytest.mark.parametrize("name", ["q.csv", "q.fcsv", "q.mrk.json"])
@pytest.mark.parametrize("space", ["lps", "ras"])
def test_write_file_as_another_kind(tmp_path, name, space):
    (tmp_path / "p.csv").write_text("12,30.5,-7\n10,30.5,-4\n")
    given = points.read_file(tmp_path / "p.csv", "lps")
    assert given.names == ["1", "2"]
    given = given._replace(kind="other")
    points.write_file(tmp_path / name, given, space)
    told = space if name == "q.csv" else None
    found = points.read_file(tmp_path / name, told)
    np.testing.assert_allclose(found.xyz, LPS, atol=1e-6)
    assert found.names == ["1", "2"] and found.space == space


@pytest.mark.parametrize(
    ("name", "text", "space", "reason", "code", "match"),
    [
        ("p.csv", "x,y,z\n1,2,3\n", None, "schema", 2, "a table does not tell"),
        ("p.csv", "x,y,z\n1,2,3\n", "voxel", "schema", 2, "name the scan"),
        ("p.csv", "a,b,c\n1,2,3\n", "lps", "schema", 4, "columns x, y, z"),
        ("p.csv", "x,y,z\n1,2\n", "lps", "schema", 4, "none in line 2, column z"),
        ("p.csv", "x,y,z\n1,2,nan\n", "lps", "schema", 4, "finite"),
        ("p.csv", "x;y;z\n1,5;2;3\n", "lps", "schema", 4, "semicolons .a decimal com"),
        ("p.csv", "x|y|z\n1|2|3\n", "lps", "schema", 4, "'x|y|z' between blanks"),
        ("p.csv", f"{HEAD}\n1,2,3,4,5,6\n", "ras", "schema", 2, "space of the file"),
        ("p.csv", "x,y,z\n", "lps", "empty", 4, "one point or more"),
        ("p.txt", "1 2 3", "lps", "schema", 2, "a name in .csv, .fcsv"),
        ("p.fcsv", "# CoordinateSystem = LPS\n", None, "empty", 4, "mark some"),
        ("p.fcsv", "# CoordinateSystem = XYZ\n1,2\n", None, "schema", 4, "LPS or RAS"),
        ("p.fcsv", "# CoordinateSystem = LPS\n1,2,3,4\n", "ras", "schema", 2, "leave"),
        ("p.json", "{", None, "schema", 4, "markups in JSON"),
        ("p.json", "[1]", None, "schema", 4, "markups in JSON"),
        ("p.json", '{"markups": []}', None, "schema", 4, "one coordinateSystem"),
        (
            "p.json",
            # Six numbers, but of no two points.
            json.dumps({"markups": [{"controlPoints": [{"position": [1, 2]}] * 3}]}),
            None,
            *("schema", 4, "three numbers a point, got 2 in '1'"),
        ),
        (
            "p.json",
            '{"markups": [{"controlPoints": [{"position": [1'
            + "0" * 400
            + ",2,3]}]}]}",
            None,
            *("schema", 4, "markups in JSON"),
        ),
    ],
)
def test_read_file_refuses(tmp_path, name, text, space, reason, code, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=match) as caught:
        points.read_file(tmp_path / name, space)
    assert (caught.value.reason, caught.value.exit_code) == (reason, code)


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_every_delimiter_is_read_and_kept(tmp_path, sign):
    text = 'name,x,y,z,note\n"a;b, c",12,30.5,-7,p\nb,10,30.5,-4,q\n'
    if sign != ",":
        text = text.replace("b, c", "b. c").replace(",", sign)
    path = tmp_path / "p.csv"
    path.write_text(text)
    found = points.read_file(path, "lps")
    np.testing.assert_allclose(found.xyz, LPS)
    assert found.names[1] == "b" and found.names[0].startswith("a;b")
    np.testing.assert_allclose(points.read_table(path, "lps_mm", None), LPS)
    points.write_file(tmp_path / "q.csv", found)
    lines = (tmp_path / "q.csv").read_text().splitlines()
    assert lines[0] == sign.join(("name", "x", "y", "z", "note"))
    assert lines[2] == sign.join(("b", "10.000000", "30.500000", "-4.000000", "q"))


def test_read_pair_is_line_by_line(tmp_path):
    paths = tmp_path / "f.csv", tmp_path / "m.csv"
    paths[0].write_text("1,2,3\n4,5,6\n")
    paths[1].write_text("7,8,9\n1,1,1\n")
    pairs = points.read_pair(paths, "lps_mm", (None, None))
    assert pairs.names == ["1", "2"]
    np.testing.assert_array_equal(pairs.moving, [[7, 8, 9], [1, 1, 1]])
    paths[1].write_text("7,8,9\n")
    with pytest.raises(UserError, match="m.csv.*2 points as in .*, line by line"):
        points.read_pair(paths, "lps_mm", (None, None))


def test_read_table_takes_no_bare_numbers_for_millimetres(tmp_path):
    """Those of Learn2Reg are voxels; a header in mm, and files of Slicer, tell."""
    path = tmp_path / "p.csv"
    path.write_text("1,2,3\n")
    with pytest.raises(UserError, match="p.csv.*--points-frame, in a list") as caught:
        points.read_table(path, None, None)
    assert (caught.value.reason, caught.value.exit_code) == ("schema", errors.USAGE)
    path.write_text("x_mm,y_mm,z_mm\n1,2,3\n")
    np.testing.assert_array_equal(points.read_table(path, None, None), [[1, 2, 3]])
    path = tmp_path / "p.fcsv"
    path.write_text("# CoordinateSystem = LPS\n# columns = id,x,y,z\n1,1,2,3\n")
    np.testing.assert_array_equal(points.read_table(path, None, None), [[1, 2, 3]])


@pytest.mark.parametrize("sign", [",", ";"])
def test_read_file_takes_the_points_of_one_scan_of_landmarks(tmp_path, sign):
    path = tmp_path / "p.csv"
    path.write_text(f"name,{HEAD}\na,1,2,3,4,5,6\n".replace(",", sign))
    for scan, xyz in (("fixed", [[1, 2, 3]]), ("moving", [[4, 5, 6]])):
        found = points.read_file(path, scan=scan)
        np.testing.assert_array_equal(found.xyz, xyz)
        assert (found.names, found.space) == (["a"], "lps")
        points.write_file(tmp_path / "q.csv", found)
        first = (tmp_path / "q.csv").read_text().splitlines()[0]
        assert first == "name,x_mm,y_mm,z_mm"
        np.testing.assert_array_equal(
            points.read_table(tmp_path / "q.csv", "lps_mm", None), xyz
        )
    pairs = points.read_points(path)
    np.testing.assert_array_equal(pairs.moving, [[4, 5, 6]])


def test_written_voxels_are_not_called_millimetres(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("note, Z_mm ,Y_mm,x_mm,d_mm\np,-7,30.5,12,1\n")
    found = points.read_file(path, "lps")
    for space, head in (
        ("voxel", "note,z,y,x,d_mm"),
        ("ras", "note,Z_mm ,Y_mm,x_mm,d_mm"),
    ):
        points.write_file(path, found, space, scan())
        assert path.read_text().splitlines()[0] == head


def test_read_table_takes_files_of_slicer(tmp_path):
    given = points.PointFile(LPS, ["a", "b"], "csv", "lps", None)
    for name in ("p.fcsv", "p.mrk.json"):
        points.write_file(tmp_path / name, given, "ras")
        found = points.read_table(tmp_path / name, "lps_mm", None)
        np.testing.assert_allclose(found, LPS, atol=1e-6)


@pytest.mark.parametrize("name", ["p.fcsv", "p.mrk.json"])
def test_a_table_made_of_a_file_of_slicer_is_in_lps(tmp_path, name):
    """It cannot tell its space, and readers of x_mm take LPS."""
    given = points.PointFile(LPS, ["a", "b"], "csv", "lps", None)
    assert points.write_file(tmp_path / name, given, "ras") == "ras"
    given = points.read_file(tmp_path / name)
    assert given.space == "ras"
    assert points.write_file(tmp_path / f"again_{name}", given) == "ras"
    assert points.write_file(tmp_path / "p.csv", given) == "lps"
    found = points.read_table(tmp_path / "p.csv", None, None)
    np.testing.assert_allclose(found, LPS, atol=1e-6)


def test_write_file_refuses(tmp_path):
    given = points.PointFile(LPS, ["a", "b"], "csv", "lps", None)
    with pytest.raises(UserError, match="in a file of Slicer, got voxel"):
        points.write_file(tmp_path / "p.fcsv", given, "voxel", scan())
    with pytest.raises(ValueError, match=r"xyz must be \(2, 3\)"):
        points.write_file(tmp_path / "p.csv", given._replace(xyz=LPS[:1]))
    for call in (points.read_file, lambda p, s: points.write_file(p, given, s)):
        with pytest.raises(ValueError, match="space must be one of"):
            call(tmp_path / "p.csv", "mni")
    assert list(tmp_path.iterdir()) == []
