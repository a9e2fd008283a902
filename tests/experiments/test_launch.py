"""What a process says when the work with the others breaks off."""

import math

import jax
import numpy as np
import pytest

from experiments import launch


def test_volumes_take_half_of_what_is_free_between_the_processes_of_a_machine(
    monkeypatch,
):
    monkeypatch.setattr(launch.memory, "available_bytes", lambda: 8 * 2**30)
    assert launch.volumes_gib() == 4
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    gather = launch.multihost_utils
    monkeypatch.setattr(
        gather, "process_allgather", lambda row: np.stack([row, row, row + 1])
    )
    assert launch.volumes_gib() == 2  # two of the three are here
    monkeypatch.setattr(launch.memory, "available_bytes", lambda: None)
    assert launch.volumes_gib() == math.inf


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL: no answer"), True),
        # As the runtime says it where programs run in the calling thread.
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset"), True),
        (ValueError("shapes do not fit"), False),
    ],
)
def test_only_what_the_runtime_breaks_off_is_a_lost_process(
    monkeypatch, capsys, error, told
):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(type(error)), launch.watched(0):
        raise error
    assert ("lost another one" in capsys.readouterr().err) == told
