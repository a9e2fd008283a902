"""Logs of several stages and runs come together at the right steps."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import curves, figures
from unireg_jax.errors import USAGE, UserError


def log(folder, losses, dsc):
    """One loss per step from 1, a validation at the steps of `dsc`."""
    folder.mkdir(parents=True)
    rows = [{"step": s, "val/mean_dsc/headneck": v} for s, v in dsc.items()]
    rows += [
        {"step": s, "train/loss/headneck": v, "train/loss/lung": v / 2}
        for s, v in enumerate(losses, 1)
    ]
    rows.sort(key=lambda row: row["step"])
    text = "\n".join(map(json.dumps, rows))
    (folder / "metrics.jsonl").write_text(text + "\n")
    return folder


@pytest.fixture
def runs(tmp_path):
    found = []
    for name, more in (("a", 0.0), ("b", 0.1)):
        first = log(
            tmp_path / name / "first", [4, 3, 2, 1], {0: 0.4 + more, 4: 0.5 + more}
        )
        second = log(tmp_path / name / "second", [8, 6], {0: 0.55, 2: 0.6 + more})
        found.append(curves.read([first, second]))
    return found


def test_stages_follow_each_other(runs):
    run = runs[0]
    assert run.name == "a/first" and run.ends == [4, 6]
    assert run.loss["headneck"] == ([1, 2, 3, 4, 5, 6], [4, 3, 2, 1, 8, 6])
    assert run.dsc["headneck"][0] == [0, 4, 4, 6]


def test_table_has_means_over_the_steps_between_validations(runs):
    head, _, *rows = curves.table(runs).splitlines()
    assert head == (
        "| step | loss, headneck | loss, lung | DSC % unseen, headneck (each run) |"
    )
    assert rows == [
        "| 0 | - | - | **45.0** (40.0, 50.0) |",
        "| 4 | 2.500 | 1.250 | **55.0** (55.0, 55.0) |",
        "| 6 | 7.000 | 3.500 | **65.0** (60.0, 70.0) |",
    ]


def test_curves_are_drawn(runs, tmp_path):
    path = tmp_path / "curves.png"
    panels = {"loss": {r.name: r.loss["headneck"] for r in runs}}
    panels["DSC"] = {r.name: r.dsc["headneck"] for r in runs}
    figures.save_curves(path, panels, marks=[4])
    with Image.open(path) as picture:
        assert picture.size == (960, 320)


def test_running_median_keeps_a_ramp_and_drops_a_peak():
    values = np.arange(100.0)
    np.testing.assert_allclose(curves.smoothed(values)[5:-5], values[5:-5])
    values[50] = 1e3
    assert curves.smoothed(values).max() < 100


def test_smoothing_ends_where_a_stage_does():
    steps, values = curves.staged((range(1, 101), [1.0] * 50 + [9.0] * 50), [50, 100])
    assert np.isnan(steps).sum() == 2 and len(steps) == 102
    assert set(values[:50]) == {1.0} and set(values[51:-1]) == {9.0}


def test_a_folder_without_a_log_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl is not there") as caught:
        curves.read([tmp_path])
    assert caught.value.exit_code == USAGE
