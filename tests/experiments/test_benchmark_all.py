"""All benchmarks in one call: what fails or takes too long costs no other."""

import importlib
import json

from experiments import benchmark_all
from experiments.benchmark_all import Part

SLEEP = ("timeit", "-n", "1", "-r", "1", "import time; time.sleep(600)")


def test_parts_are_commands_of_this_project():
    for part in benchmark_all.PARTS:
        assert importlib.util.find_spec(part.words[0]), part
    names = [part.name for part in benchmark_all.PARTS]
    assert len(set(names)) == len(names)


def test_run_keeps_what_each_printed_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_all, "_facts", lambda: {"device": "cpu x"})
    parts = (
        Part("bad", ("no_such_module",)),
        Part("good", ("calendar", "20{shape}")),
        Part("slow", SLEEP),
        Part("late", ("calendar",)),
    )
    found = benchmark_all.run(parts, tmp_path, shape="26", limit_s=6)
    assert {name: row["code"] for name, row in found.items()} == {
        "bad": 1,
        "good": 0,
        "slow": None,  # stopped, and nothing begins after it
    }
    assert "no_such_module" in (tmp_path / "bad.txt").read_text()
    assert "2026" in (tmp_path / "good.txt").read_text()
    summary = json.loads((tmp_path / benchmark_all.SUMMARY).read_text())
    assert summary == {"device": "cpu x", "parts": found}

    (tmp_path / "good.txt").unlink()
    capsys.readouterr()
    benchmark_all.run(parts[:2], tmp_path, shape="26", limit_s=60)
    assert capsys.readouterr().out.startswith("bad: exit code 1")
    assert not (tmp_path / "good.txt").exists()  # has succeeded before
    benchmark_all.run(parts[1:2], tmp_path, shape="27", limit_s=60)
    assert "2027" in (tmp_path / "good.txt").read_text()  # another command
