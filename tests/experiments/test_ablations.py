"""The arithmetic of the ablations: intervals, landmark errors, tables."""

import itertools
import json

import nibabel as nib
import numpy as np
import pytest

from experiments import ablations, benchmark_matching, mr_results
from experiments.benchmark_quality import SCANS, Scans
from unireg_jax.errors import UserError
from unireg_jax.imaging.nifti import Volume

PAIRS = [{"patients": pair} for pair in itertools.permutations("abcd", 2)]


def test_interval_is_that_of_draws_of_patients():
    assert ablations.interval(PAIRS, np.full(12, 5.0)) == pytest.approx((5, 5))
    # Pairs with patient a are worse: draws without a, and with much of a, differ.
    worse = np.array(["a" in pair["patients"] for pair in PAIRS], float)
    low, high = ablations.interval(PAIRS, worse)
    assert low == 0 and high == 1
    three = [{"patients": pair} for pair in itertools.permutations("abc", 2)]
    assert np.isnan(ablations.interval(three, np.ones(6))).all()


def test_table_compares_with_the_right_condition():
    rows = []
    for n, pair in enumerate(PAIRS):
        for region, kind, score in (
            (None, None, 40.0),
            ("headneck", "inter", 50.0 + n),
            ("chest", "inter", 49.0 + n),
        ):
            rows.append(
                {"group": "headneck", "region": region, "type": kind, "dsc": 0.5}
                | {"patients": pair["patients"], "score": score, "shift_mm": 1.0}
                | {"fold_percent_network": 0.25, "sdlogj_network": 0.5}
            )
    text = ablations.table_of_conditions(rows, "headneck").splitlines()
    assert text[2].startswith("| pre-alignment alone | 40.00 (40.00 … 40.00) | -15.50")
    assert text[3].startswith("| **headneck, inter** (right) | 55.50")
    assert "| -1.00 (-1.00 … -1.00) | < 0.001 | 1.00 | 0.25 | 0.50 |" in text[4]


def test_table_of_trainings_has_the_change_of_each(tmp_path):
    for number in range(2):
        rows = [
            {"group": group, "region": region, "type": kind, "patients": names}
            | {"score": score + number * (group == "lung"), "fold_percent_network": 0.5}
            for group, pairs in (
                ("headneck", itertools.permutations("abcd" if number else "efgh", 2)),
                ("lung", [("lung", "lung")]),
            )
            for names in pairs
            for region, kind, score in (
                (None, None, 40.0),
                ("headneck", "inter", 50.0),
                ("chest", "inter", 49.0 + number),
            )
        ]
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "conditions.json").write_text(json.dumps({"conditions": rows}))
    folders = [str(tmp_path / "0"), str(tmp_path / "1")]
    _, _, *lines = ablations.table_of_trainings(ablations.read(folders)).splitlines()
    assert lines[0].endswith("| -10.00, -10.00 | 0.50 | 40.50 (40.00 … 41.00) |")
    assert lines[1].startswith("| headneck, inter | 50.00 (50.00 … 50.00) |  |  |")
    assert "| 49.50 (49.33 … 49.67) | -0.50 (-0.67 … -0.33) | -1.00, +0.00" in lines[2]
    with pytest.raises(UserError, match="each patient in one training"):
        ablations.read(folders[:1] * 2)
    with pytest.raises(UserError, match="is not there"):
        ablations.read([str(tmp_path)])


def test_table_of_prealignments_tells_all_groups():
    def result(gain):
        rows = [
            {"patients": pair["patients"], "dsc_affine": 0.4, "dsc_network": 0.4 + gain}
            | {"fold_percent_network": 0.25}
            for pair in PAIRS
        ]
        marks = {"tre_affine": 2.0, "tre_network": 2.0 - gain}
        chest = [
            {"dsc_affine": 0.8, "dsc_network": 0.8 + g, "folds": 1.0} for g in (gain, 0)
        ]
        return {"headneck": rows, "liver": marks, "lung": marks, "chest": chest}

    found = {"auto": result(0.1), "coarse": result(-0.1)}
    head, _, *lines = ablations.table_of_prealignments(found).splitlines()
    assert head.endswith(
        "| lung TRE mm | chest DSC %, folds % |"
    )  # others lacked files
    assert lines[0] == (
        "| auto | 40.0 (40.0 … 40.0) | **50.0** (50.0 … 50.0) | +10.0 (10.0 … 10.0) | "
        "12 of 12 | 0.25 | 2.00 → 1.90 | 2.00 → 1.90 | 80.0 → 85.0, 1.00 |"
    )
    assert "| 0 of 12 | 0.25 | 2.00 → 2.10 | 2.00 → 2.10 | 80.0 → 75.0" in lines[1]


def test_mr_is_stretched_to_air_and_tissue():
    data = np.linspace(0, 200, 1001).reshape(7, 11, 13).astype(np.float32)
    hu = mr_results.stretched(Volume(data, np.eye(4), warnings=("hu_range: x",)))
    assert hu.data.dtype == np.int16 and hu.warnings == ()
    assert hu.data.min() == -1000 and 195 < hu.data.max() < 210


def test_mr_of_another_contrast_is_no_line_of_the_first():
    data = np.arange(0, 201, dtype=np.uint8).reshape(3, 67, 1)
    bent = mr_results.bent(Volume(data, np.eye(4))).data.ravel()
    assert bent[0] == 0 and bent[1:].min() >= 1  # background stays background
    assert 80 < bent.argmax() < 120 and bent[20] < 0.5 * bent.max() > bent[190]


def test_table_of_scans_onto_themselves_has_a_line_per_way_of_asking():
    rows = [
        {
            "patient": "a",
            "asked": name,
            "max_mm_network": 5.0 / n,
            "p99_mm_network": 2.0,
        }
        | {"fold_percent_network": 0.25}
        for n, name in enumerate(ablations.ASKED, 1)
    ]
    _, _, *lines = ablations.table_of_itself(rows).splitlines()
    assert lines == [
        "| a | one pass | 5.0 | 2.0 | 0.25 |",
        "| a | two, both ways | 2.5 | 2.0 | 0.25 |",
    ]


def test_between_gives_pairs_whose_files_are_there_with_labels_of_both(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("abdomen_lidc", "abdomen_ts"):
        _, image, labels, ids = SCANS[name]
        for file in (image, labels):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        # 4 is of the file alone, in no table.
        data = rng.choice([0, 4, *ids], (16, 12, 14)).astype(np.uint8)
        for file, values in ((image, data.astype(np.int16)), (labels, data)):
            nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / file)
    found = list(ablations.between(Scans(tmp_path), ("chest", "abdomen")))
    assert [(group, names) for group, names, _ in found] == [
        ("abdomen", ("abdomen_lidc", "abdomen_ts")),
        ("abdomen", ("abdomen_ts", "abdomen_lidc")),
    ]
    for _, names, truth in found:
        for name, volume in zip(names, truth, strict=True):
            assert set(np.unique(volume.data)) == {0, *SCANS[name][3].values()}
    assert not list(ablations.between(Scans(tmp_path), ("chest",)))
    # Without labels no pair.
    (tmp_path / SCANS["abdomen_ts"][2]).unlink()
    assert not list(ablations.between(Scans(tmp_path), ("abdomen",)))


def test_matching_table_has_a_column_of_both_directions():
    rows = [
        {"method": "intensity", "task": task, "score": score, "seconds": 1.0}
        for task, score in (
            *(("headneck", 40.0), ("headneck", 44.0), ("liver", 2.0), ("lung", 6.0)),
            *(("abdomen", 37.0), ("abdomen", 42.1)),
        )
    ]
    *_, line = benchmark_matching.table_maps(rows).splitlines()
    assert line.startswith("| intensity | **42.0** (40.0 … 44.0) |")
    assert line.endswith("| -, 37.0 / 42.1 |")
