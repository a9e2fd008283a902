"""All benchmarks in one call: what fails or takes too long costs no other."""

import importlib
import json
import re
from pathlib import Path

import pytest

from experiments import benchmark_all
from experiments.benchmark_all import Part
from unireg_jax.errors import USAGE, UserError

SLEEP = ("timeit", "-n", "1", "-r", "1", "import time; time.sleep(600)")


def test_parts_are_commands_of_this_project():
    for part in benchmark_all.PARTS:
        module, *words = part.words
        path = importlib.util.find_spec(module).origin
        if not module.startswith("experiments."):
            continue
        known = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', Path(path).read_text())
        for word in words:
            assert word.removeprefix("--").partition("=")[0] in known, part
    names = [part.name for part in benchmark_all.PARTS]
    assert len(set(names)) == len(names)


def test_run_keeps_what_each_printed_and_goes_on(tmp_path, monkeypatch, capsys):
    here = {"device": "cpu x", "jax": "1", "sources": "a"}
    monkeypatch.setattr(benchmark_all, "facts", lambda: dict(here))
    parts = (
        Part("bad", ("no_such_module",)),
        Part("good", ("calendar", "20{shape}")),
        Part("slow", SLEEP),
        Part("late", ("calendar",)),
    )
    benchmark_all.run(parts[:2], tmp_path, shape="26", limit_s=60)
    found = benchmark_all.run(parts[2:], tmp_path, shape="26", limit_s=1)
    assert {name: row["code"] for name, row in found.items()} == {
        "bad": 1,
        "good": 0,
        "slow": None,  # stopped, and nothing begins after it
    }
    assert "no_such_module" in (tmp_path / "bad.txt").read_text()
    assert "2026" in (tmp_path / "good.txt").read_text()
    summary = json.loads((tmp_path / benchmark_all.SUMMARY).read_text())
    assert summary == {"parts": found}
    assert here.items() <= found["good"].items()

    (tmp_path / "good.txt").unlink()
    capsys.readouterr()
    benchmark_all.run(parts[:2], tmp_path, shape="26", limit_s=60)
    assert capsys.readouterr().out.startswith("bad: exit code 1")
    assert not (tmp_path / "good.txt").exists()  # has succeeded before
    here["device"] = "gpu y"  # figures of another device are not these
    found = benchmark_all.run(parts[1:2], tmp_path, shape="26", limit_s=60)
    assert found["good"]["device"] == "gpu y" and found["bad"]["device"] == "cpu x"
    (tmp_path / "good.txt").unlink()
    here["sources"] = "b"  # nor are those of other code
    benchmark_all.run(parts[1:2], tmp_path, shape="26", limit_s=60)
    assert (tmp_path / "good.txt").exists()
    benchmark_all.run(parts[1:2], tmp_path, shape="27", limit_s=60)
    assert "2027" in (tmp_path / "good.txt").read_text()  # another command


@pytest.mark.parametrize(
    "name",
    (
        "unireg_jax/ops/warp.py",
        "unireg_jax/weights/unireg.json",
        "data_pipeline/loader.py",
        "experiments/benchmark.py",
        "tests/ops/test_warp.py",
    ),
)
def test_sources_are_all_that_a_part_runs(tmp_path, monkeypatch, name):
    monkeypatch.setattr(benchmark_all, "_ROOT", tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text("1")
    before = benchmark_all._digest_of_sources()
    path.write_text("2")
    assert benchmark_all._digest_of_sources() != before


def test_facts_refuses_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert benchmark_all.facts()["device"].startswith("cpu")
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    with pytest.raises(UserError, match="no_such_platform") as error:
        benchmark_all.facts()
    assert error.value.exit_code == USAGE
