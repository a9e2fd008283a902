"""The benchmark of network and training step: what it states without running."""

import pytest

from experiments import benchmark


@pytest.mark.slow
def test_memory_states_a_size_for_every_program(capsys):
    benchmark.memory((32, 32, 32))
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == [
        "forward",
        "step",
        "step with Dice",
    ]
    for line in lines:
        assert all(float(size) > 0 for size in line.split("|")[2:4])
