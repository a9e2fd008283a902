"""The table docs/malformed_inputs.md is true, and the rows that fit no other file."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import prepare, store, synthetic
from data_pipeline.datasets import manifest
from experiments import loop, train, unireg
from unireg_jax.errors import USAGE, UserError
from unireg_jax.manifest import stem
from unireg_jax.training import optimizer
from unireg_jax.training.state import TrainState

ROOT = Path(__file__).resolve().parents[1]
SHORT = {
    "nifti": "imaging/test_nifti.py",
    "manifest": "data_pipeline/test_manifest.py",
    "check": "data_pipeline/test_check.py",
    "pairs": "test_manifest.py",
    "batch": "test_cli_batch.py",
    "cli": "test_cli.py",
    "training": "training/test_training.py",
    "security": "test_security.py",
    "here": "test_malformed_inputs.py",
}
ROW = dict(id="a", image="a.nii.gz", task="lung", subject="p", split="train")


def _rows():
    """(number, tests) of every row of the table."""
    text = (ROOT / "docs" / "malformed_inputs.md").read_text()
    for line in text.splitlines():
        cells = re.split(r"(?<!\\)\|", line)
        if len(cells) == 6 and cells[1].strip().isdecimal():
            tests = cells[4].replace("(slow)", "").split(",")
            yield int(cells[1]), [test.strip() for test in tests]


@functools.cache
def _tests_of(name):
    tree = ast.parse((ROOT / "tests" / name).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_rows_are_all_there_once_and_in_order():
    assert [number for number, _ in _rows()] == list(range(1, 71))


@pytest.mark.parametrize(("number", "tests"), list(_rows()))
def test_every_test_of_the_table_exists(number, tests):
    assert tests != [""], f"row {number} names no test"
    for test in tests:
        file, _, name = test.partition("::")
        assert name in _tests_of(SHORT.get(file, file)), f"row {number}: no {test}"


# --- rows that fit no other file ---


def test_case_name_keeps_the_dots_of_a_uid():
    assert stem("/d/1.2.840.113619.2.55.nii.gz") == "1.2.840.113619.2.55"
    assert stem("A.B.NII.GZ") == "A.B" and stem("x.nii") == "x"


def test_json_manifest_with_a_byte_order_mark_is_read(tmp_path):
    text = json.dumps([ROW]).encode()
    (tmp_path / "m.json").write_bytes(b"\xef\xbb\xbf" + text)
    assert manifest.collect(tmp_path / "m.json").records[0].id == "a"


@pytest.mark.parametrize("column", ["image", "label", "label_map"])
def test_nul_in_a_path_is_refused(tmp_path, column):
    row = ROW | {"label": "l.nii", "label_map": "m.json", column: "a\0.nii"}
    (tmp_path / "m.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match="a plain path expected") as caught:
        manifest.collect(tmp_path / "m.json")
    assert caught.value.reason == "path_escape"


@pytest.mark.parametrize("lr", [np.nan, 0.0, -1e-3, np.inf])
def test_learning_rate_that_no_run_can_have_is_refused(lr):
    with pytest.raises(ValueError, match="lr must"):
        optimizer.make_optimizer("adam", lr=lr)


def test_fewer_steps_than_a_run_has_done_are_refused():
    state = TrainState(np.int32(7), None, None, None)
    with pytest.raises(UserError, match="train.steps: 7 or more expected") as caught:
        loop.run(
            None,
            state,
            None,
            every=loop.Every(5, 1, 1, 1),
            names=None,
            judge=None,
            checkpoints=None,
            writer=None,
        )
    assert caught.value.exit_code == USAGE


def test_second_training_in_one_work_folder_is_refused(tmp_path):
    """At once, and before it touches what the first has written."""
    grid = {"shape": (32, 16, 16), "spacing_mm": 12.0}
    root = synthetic.write_dataset(
        tmp_path / "data", subjects_per_task=4, tasks=("headneck",), **grid
    )
    config = unireg.get_config("demo")
    with config.unlocked():
        config.train.init_from = ""
        config.data.update({"root": str(root), "weights": {"headneck": 1.0}, **grid})
        config.model.update({"encoder": (4,) * 4, "decoder": (4,) * 4})
        config.model.update({"remaining": (4,), "conv_impl": "direct"})
    workdir = tmp_path / "run"
    workdir.mkdir()
    with store.lock(workdir):
        with pytest.raises(UserError, match="another run is writing to it") as caught:
            train.train(config, workdir)
    assert caught.value.exit_code == USAGE
    assert not {"config.json", "checkpoints", "metrics.jsonl"} & {
        path.name for path in workdir.iterdir()
    }


def test_prepared_data_among_the_raw_scans_are_refused(tmp_path, capsys):
    raw = synthetic.write_nifti(
        tmp_path / "raw",
        tasks=("chest",),
        subjects_per_task=2,
        shape=(24, 20, 18),
        spacing_mm=(16.0, 17.0, 18.0),
    )
    before = sorted(tmp_path.rglob("*"))
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "raw")
    for out in (raw.parent, link):
        assert prepare.main(["--manifest", str(raw), "--out", str(out)]) == USAGE
        assert "--out: a folder apart from the raw scans" in capsys.readouterr().err
    options = ["--dataset", "nnunet", "--raw", str(tmp_path / "raw"), "--task", "chest"]
    inside = prepare._parser().parse_args([*options, "--out", str(link / "a" / "b")])
    with pytest.raises(UserError, match="got --raw, or one inside"):
        prepare._check_out(inside)
    link.unlink()
    assert sorted(tmp_path.rglob("*")) == before


_MILLION = """
import re, sys
from data_pipeline.datasets import manifest
records = manifest.collect(sys.argv[1]).records
# Not getrusage: its peak is that of the process that started this one, if higher.
status = open("/proc/self/status").read()
print(len(records), int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_manifest_of_a_million_entries(tmp_path):
    header = "id,image,label,label_map,task,subject,split\n"
    (tmp_path / "map.json").write_text('{"1": "liver"}')
    with open(tmp_path / "m.csv", "w") as file:
        file.write(header)
        for i in range(1_000_000):
            file.write(f"i{i},s/{i}.nii.gz,l/{i}.nii.gz,map.json,liver,p{i // 3},")
            file.write("train\n")
    command = [sys.executable, "-c", _MILLION, str(tmp_path / "m.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    count, gib = map(float, done.stdout.split())
    # 1.4 GiB when written, and 32 CPU s on a shared core.
    assert count == 1_000_000 and gib < 2


def test_reports_do_not_depend_on_zone_locale_or_clock(tmp_path):
    path = synthetic.write_nifti(
        tmp_path / "raw",
        tasks=("chest",),
        subjects_per_task=2,
        shape=(24, 20, 18),
        spacing_mm=(16.0, 17.0, 18.0),
    )
    reports = []
    for zone, language, day in (
        ("UTC", "C", 0),
        ("Pacific/Kiritimati", "de_DE.UTF-8", 2**31 + 86400),  # beyond 2038
    ):
        for file in path.parent.rglob("*.nii.gz"):
            os.utime(file, (day, day))
        out = tmp_path / f"{day}.json"
        command = [sys.executable, "-m", "data_pipeline.check", "--workers", "1"]
        command += ["--manifest", str(path), "--json", str(out)]
        environment = {**os.environ, "TZ": zone, "LC_ALL": language}
        if zone == "UTC":
            del environment["TZ"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode in (0, 2, 4, 5), done.stderr
        reports.append((done.stdout, out.read_bytes()))
    assert reports[0] == reports[1]
