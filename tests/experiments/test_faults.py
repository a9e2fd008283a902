"""The campaigns of experiments/faults, small; and the table that names them."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.faults import devices, flips, kills, signals, victim, writes
from unireg_jax.errors import USAGE

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="signals, /proc and preloading as on Linux"
)


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Runs keep all their compiled programs, as for a user, beside those of tests."""
    with pytest.MonkeyPatch.context() as patch:
        cache = Path(jax.config.jax_compilation_cache_dir).with_name("unireg_jax")
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        patch.setenv("UNIREG_CACHE", str(cache))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run of 20 steps, in `run` and `whole`, and its data."""
    folder = tmp_path_factory.mktemp("faults")
    run = victim.Victim(
        folder / "run", victim.make_data(folder / "data"), train__steps=20
    )
    run.make()
    shutil.copytree(run.workdir, folder / "whole")
    return folder


def test_kills_end_bit_identical(folder):
    deletions = int(shutil.which("cc") is not None)
    found = kills.campaign(folder, kills=2, deletions=deletions, steps=20)
    assert found["faults"] == [] and found["litter"] == 0
    assert found["kills"] == 2 + deletions and found["in_start"] == 1
    assert found["in_deletion"] >= deletions
    assert found["digest"] == found["undisturbed"]


@pytest.mark.slow
def test_kills_within_deletions_end_bit_identical(tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    found = kills.campaign(tmp_path, kills=0, deletions=12, steps=80)
    assert found["faults"] == [] and found["litter"] == 0
    assert found["kills"] == found["in_deletion"] == 12
    assert found["digest"] == found["undisturbed"]


def test_no_flip_and_no_damage_to_a_file_is_silent(folder):
    found = flips.campaign(folder, flips=100, restores=4)
    assert found["faults"] == [] and found["silent"] == 0
    assert found["seen"] + found["harmless"] == 100
    assert found["restored_older"] + found["restored"] == 4
    assert found["file_damages"] == 4 * found["files"]
    assert found["file_damages_seen"] > 3 * found["files"] - 5  # empty ones are empty


@pytest.mark.slow
def test_failing_calls_of_a_save_are_refused_and_the_next_save_is_whole(folder):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    found = writes.campaign(folder, every=50, runs=0, disks=0)
    assert found["faults"] == []
    assert found["calls_of_a_save"] > 50 and found["refused"] >= found["cycles"] // 2


def test_a_campaign_tells_of_an_end_that_differs(folder):
    """The comparison can fail: one bit of the log is enough, one of the state too."""
    run = victim.Victim(folder / "whole", folder / "data")
    before = run.digest()
    path = run.workdir / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"train/loss": 1', '"train/loss": 2', 1))
    assert run.digest() != before
    path.write_text(text)
    assert run.digest() == before
    assert run.litter() == []
    (run.workdir / "checkpoints" / "unfinished-7").mkdir()
    (run.workdir / "checkpoints" / "unfinished-7" / "x").write_text("")
    assert run.litter() == ["checkpoints/unfinished-7/x"]
    shutil.rmtree(run.workdir / "checkpoints" / "unfinished-7")


@pytest.mark.slow
def test_signals_lose_no_step(tmp_path):
    found = signals.campaign(tmp_path, signals=8, steps=120)
    assert found["faults"] == [] and found["steps_lost"] == 0
    assert found["exit_75"] >= 6


@pytest.mark.slow
def test_full_disks_and_failing_calls_of_whole_runs(tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    found = writes.campaign(tmp_path, every=12, runs=4, disks=2)
    assert found["faults"] == [] and found["exit_6"] > 0


@pytest.mark.slow
def test_switches_of_devices_restore_the_same_bits(tmp_path):
    found = devices.campaign(tmp_path, switches=3)
    assert found["faults"] == []


def test_lines_of_other_devices_must_be_the_same_lines():
    lines = [{"step": n, "train/loss": 0.5 * n, "train/loss/x": 2.0} for n in (1, 2)]
    near = [row | {"train/loss": 1.01 * row["train/loss"]} for row in lines]
    faults, worst = devices.compare(lines, near)
    assert faults == [] and worst == pytest.approx(0.01 / 1.01)
    task = {"step": 2, "train/loss": 1.0, "train/loss/y": 2.0}
    for last in ([task], [], [lines[1] | {"step": 3}], [lines[1]] * 2):
        (fault,), _ = devices.compare(lines, [lines[0], *last])
        assert "other lines of the log" in fault
    (fault,), _ = devices.compare(lines, [lines[0], lines[1] | {"train/loss": 1.1}])
    assert "a loss differs by 9.1%" in fault


# --- docs/reliability.md ---


def _rows():
    """(number, cell of tests) of every row of the table."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    for line in text.splitlines():
        cells = re.split(r"(?<!\\)\|", line)
        if len(cells) == 6 and cells[1].strip().isdecimal():
            yield int(cells[1]), cells[4]


@functools.cache
def _tests_of(name):
    tree = ast.parse((ROOT / "tests" / name).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_rows_are_all_there_once_and_in_order():
    wanted = [*range(88, 127), *range(135, 145)]
    assert [number for number, _ in _rows()] == wanted


@pytest.mark.parametrize(("number", "tests"), list(_rows()))
def test_every_test_of_the_table_exists(number, tests):
    named = re.findall(r"`([^`]+\.py)(?:::(\w+))?`", tests)
    assert named or "none" in tests, f"row {number} names no test and no reason"
    for path, name in named:
        if name:
            assert name in _tests_of(path), f"row {number}: no {path}::{name}"
        else:
            assert (ROOT / path).is_file(), f"row {number}: no {path}"


# --- rows that fit no other file ---

_COMPILE = """
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
step = jax.jit(lambda x: jnp.tanh(x @ x.T).sum())
print(float(step(jnp.arange(12.0).reshape(3, 4) / 7)))
"""


def _python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_damaged_compiled_programs_are_compiled_anew(tmp_path):
    environment = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    first = _python(_COMPILE, **environment)
    programs = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert first.returncode == 0 and programs
    for i, path in enumerate(programs):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if i % 2 else b"\0" * 99)
    second = _python(_COMPILE, **environment)
    assert (second.returncode, second.stdout) == (0, first.stdout), second.stderr


_WALL = {
    *("time.time", "time.time_ns", "time.CLOCK_REALTIME"),
    *("time.localtime", "time.gmtime"),
    *("datetime.datetime.now", "datetime.datetime.utcnow", "datetime.now"),
}


def _clocks(source):
    """What a module takes from others, by full names such as `time.time`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_training_measures_time_by_the_monotonic_clock():
    """The wall clock jumps; only TensorBoard's events are dated by it."""
    files = [*(ROOT / "unireg_jax" / "training").glob("*.py")]
    names = ("clock", "loop", "recent", "signals", "train", "train_sam")
    files += [ROOT / "experiments" / f"{name}.py" for name in names]
    sources = {path.name: path.read_text() for path in files}
    users = {name for name, source in sources.items() if _clocks(source) & _WALL}
    assert users == {"log.py"}
    # The file that measures: read, monotonic, and it would be found out.
    measures = sources["clock.py"]
    assert "time.monotonic" in _clocks(measures)
    assert _clocks(measures.replace("time.monotonic", "time.time")) & _WALL
    assert _clocks("from time import time") & _WALL


def test_platform_that_is_not_there_is_refused():
    code = "from experiments import cli; from unireg_jax.training import mesh\n"
    code += "cli.one_line_errors(mesh.make_mesh)()"
    done = _python(code, JAX_PLATFORMS="tpu")
    assert done.returncode == USAGE, done.stderr
    assert "error: schema: devices: a tpu device expected" in done.stderr
