"""Sweeps of instance optimisation: which runs they name, and the picture of them."""

import itertools
import subprocess
import sys

import matplotlib.image
import pytest

from experiments import benchmark_refine
from experiments.benchmark_refine import Run
from unireg_jax.errors import USAGE, UserError
from unireg_jax.registration import Plan


def row(run, task, **scores):
    more = {"seconds": 1.0, "sdlogj_network": 0.2, "fold_percent_network": 0.0}
    return {"run": run, "task": task, **more, **scores}


def test_sweeps_change_one_field_each():
    runs = benchmark_refine.swept("iterations=5,50")
    assert runs == [Run("auto", False, Plan(n)) for n in (5, 50)]
    (run,) = benchmark_refine.swept("smoothness=2")
    assert run.plan == Plan(smoothness=2.0) and isinstance(run.plan.smoothness, float)


@pytest.mark.parametrize("text", ["speed=1", "iterations=many", "iterations", ""])
def test_sweep_that_cannot_be_read_is_refused(text):
    with pytest.raises(UserError, match="--sweep: FIELD=A,B,C") as error:
        benchmark_refine.swept(text)
    assert error.value.exit_code == USAGE


def test_sweeps_of_one_field_add_up():
    sweeps = benchmark_refine.merged(["step=0.3", "window=5", "step=0.7,1"])
    steps = [run.plan.step for run in sweeps["step"]]
    assert list(sweeps) == ["step", "window"] and steps == [0.3, 0.7, 1.0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--plot=a.png", "--data=."], "--plot: a --sweep to draw expected"),
        (["--sweep=step=1"], "--sweep, --plot: --data expected"),
    ],
)
def test_what_would_draw_nothing_is_refused(words, expected):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark_refine", *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == USAGE and expected in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_torch_ends_where_ours_does():
    pytest.importorskip("torch")
    lines = benchmark_refine.measure((32, 32, 32), 5, 1)
    assert len(lines) == 3
    for line in lines:
        ours, *_, theirs = (part.strip() for part in line.split("|")[7:13])
        assert float(ours) == pytest.approx(float(theirs), abs=2e-3), line


def test_sweeps_are_drawn(tmp_path):
    sweeps = benchmark_refine.merged(["iterations=5,50", "smoothness=0.5,2"])
    rows = []
    for i, run in enumerate({run: None for part in sweeps.values() for run in part}):
        rows += [row(run, "headneck", dsc=0.6 + i / 100, seconds=1.0 + i)]
        rows += [row(run, task, tre_mm=2.0 - i / 10) for task in ("liver", "lung")]
    path = tmp_path / "sweeps.png"
    benchmark_refine.plot(path, rows, sweeps)
    picture = matplotlib.image.imread(path)
    height, width = picture.shape[:2]
    # Three rows of two, and coloured lines in each.
    for i, j in itertools.product(range(3), range(2)):
        part = picture[i * height // 3 : (i + 1) * height // 3]
        part = part[:, j * width // 2 : (j + 1) * width // 2, :3]
        assert (part.std(axis=-1) > 0.1).any()
