"""Parts of a cross-validation come together as what they are."""

import itertools
import json

import numpy as np
import pytest

from experiments import compare_peers, cross_validate, real_pairs, real_scans
from unireg_jax.errors import USAGE, UserError

AFFINE, NETWORK = "ours: affine", "ours: affine + network"


def row(pair, method, **scores):
    return {
        "spacing": 4,
        "pair": pair,
        "method": method,
        "task": pair.split("_")[0],
        **scores,
    }


def part(folder, fold, gain, lung):
    """Rows of one part: the network adds `gain`, but on the last pair."""
    rows = []
    pairs = list(itertools.permutations(fold, 2))
    for i, ends in enumerate(pairs):
        name = "_".join(("headneck", *ends))
        for method, more in ((AFFINE, 0), (NETWORK, gain)):
            dsc = 40 + i + (more if i < len(pairs) - 1 else -more)
            scores = {"dsc_percent": dsc, "shared_percent": dsc + 8, "fold_percent": 1}
            rows.append(row(name, method, **scores))
    rows += [row("lung", AFFINE, tre_mm=6.0), row("lung", NETWORK, tre_mm=lung)]
    rows += [row("liver", AFFINE, failed="exit code 1")]
    rows += [{**rows[0], "spacing": 2, "dsc_percent": 99.0}]
    folder.mkdir()
    (folder / compare_peers.RESULTS).write_text(json.dumps({"rows": rows}))
    return folder


@pytest.fixture
def folders(tmp_path):
    first, second, *_ = real_scans.FOLDS
    return [
        part(tmp_path / "one", first, 6, 4.0),
        part(tmp_path / "two", second, 12, 5.0),
    ]


def test_folds_hold_each_patient_out_once(data_root, tmp_path):
    everyone = [case for fold in real_scans.FOLDS for case in fold]
    assert len(set(everyone)) == len(everyone) == 16
    for i, fold in enumerate(real_scans.FOLDS):
        split = f"fold{i}" if i else "val"
        pairs = real_pairs.pairs(tmp_path, split, tasks=["headneck"])
        assert {p for pair in pairs for p in pair.patients} == set(fold)
        rows = real_scans.manifest(data_root, tmp_path, fold)
        held = {row["id"] for row in rows if row["split"] == "val"}
        assert held == {f"hn_{case}" for case in fold}


def test_table_tells_parts_and_all(folders):
    text = cross_validate.table([cross_validate.read(f) for f in folders], NETWORK)
    affine, network = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()[2:]
    )
    # 11 of 12 pairs gain 6 or 12, the last loses as much.
    assert affine[:2] == [AFFINE, "24"] and network[:2] == [NETWORK, "24"]
    assert affine[2].startswith("**45.5** (") and network[2].startswith("**53.0** (")
    assert affine[3] == "45.5, 45.5" and network[3] == "50.5, 55.5"
    assert network[4] == "61.0"
    assert (affine[5], network[5]) == ("-", "22 of 24")
    assert (affine[6], network[6]) == ("2 of 24", "-")
    assert affine[8:] == ["-", "6.00"] and network[8:] == ["-", "4.50 (4.00 … 5.00)"]


def test_gains_are_those_of_the_same_pairs(folders):
    parts = [cross_validate.read(folder) for folder in folders]
    # 11 of 12 pairs gain 6 or 12, the last loses as much: 5 and 10 on average.
    (line,) = cross_validate.gains(parts, AFFINE).splitlines()
    assert line.startswith(f"- {NETWORK} against {AFFINE}: +7.5 (")
    assert line.endswith(") points of DSC over 24 pairs")
    assert cross_validate.gains(parts, "greedy") == ""
    # Of a method that one part lacks: over the pairs of the others.
    parts[1] = [r for r in parts[1] if r["method"] != NETWORK]
    (line,) = cross_validate.gains(parts, NETWORK).splitlines()
    assert line.endswith(") points of DSC over 12 pairs")


def test_interval_is_that_of_the_patients(folders):
    parts = [cross_validate.read(folder) for folder in folders]
    mine = [
        [r for r in rows if r["method"] == AFFINE and r["task"] == "headneck"]
        for rows in parts
    ]
    same = [np.full(len(rows), 3.0) for rows in mine]
    assert cross_validate.interval(mine, same) == pytest.approx((3, 3))
    # One patient's pairs alone are good: more than pairs drawn one by one would vary.
    first = real_scans.FOLDS[0][0]
    odd = [np.array([10.0 * (first in r["pair"]) for r in rows]) for rows in mine]
    low, high = cross_validate.interval(mine, odd)
    assert low == 0 and high > 4


@pytest.mark.parametrize("fault", ["twice", "absent", "no affine", "landmarks"])
def test_parts_that_do_not_fit_are_refused(folders, tmp_path, fault):
    with pytest.raises(UserError, match="--part: ") as error:
        if fault == "twice":
            cross_validate.check([cross_validate.read(folders[0])] * 2)
        elif fault == "absent":
            cross_validate.read(tmp_path)
        else:  # a part without the affine, or one begun that has no necks yet
            key, value = {"no affine": ("method", NETWORK)}.get(fault, ("task", "lung"))
            rows = cross_validate.read(folders[0])
            cross_validate.check([[r for r in rows if r[key] == value]])
    assert error.value.exit_code == USAGE


def test_rows_left_out_and_starts_that_differ_are_told(tmp_path, capsys):
    folder = part(tmp_path / "a", real_scans.FOLDS[0], 5.0, 4.0)
    path = folder / compare_peers.RESULTS
    rows = json.loads(path.read_text())["rows"]
    rows[0]["start"], rows[1]["start"], rows[2]["start"] = [[1]], [[2]], [[1]]
    path.write_text(json.dumps({"rows": rows}))
    assert len(cross_validate.read(folder)) == len(rows) - 2
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and told[0].endswith(
        "left out: ours: affine, liver: exit code 1"
    )
    assert f"{rows[0]['pair']}: methods began at different affines" in told[1]
