"""What a process says when the work with the others breaks off."""

import concurrent.futures
import math
import threading

import jax
import numpy as np
import pytest

from experiments import launch
from unireg_jax.errors import NOTHING, STORAGE, UserError


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


def _exit_codes(monkeypatch, work):
    """Of two processes, here threads, that do work(number)."""
    me, sent = threading.local(), [0, 0]
    both = threading.Barrier(2, timeout=60)

    def gather(mine):
        sent[me.number] = int(mine)
        both.wait()
        found = np.array(sent)
        both.wait()  # none sends again before the other has read
        return found

    def process(number):
        me.number = number
        try:
            work(number)
        except UserError as error:
            return error.exit_code
        return 0

    monkeypatch.setattr(launch.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(jax, "process_index", lambda: me.number)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, (0, 1)))


@pytest.mark.parametrize(
    ("faults", "codes", "came"),
    [
        ({}, [0, 0], [0, 1]),
        ({0: STORAGE}, [STORAGE, STORAGE], [0]),
        ({1: NOTHING}, [NOTHING, NOTHING], [0, 1]),
    ],
    ids=["none", "the first", "the other"],
)
def test_where_one_process_fails_all_leave_with_its_code(
    monkeypatch, faults, codes, came
):
    order = []

    def work(number):
        with launch.first_alone("data"):
            order.append(number)
            if number in faults:
                raise UserError("storage", "the disk is full", faults[number])

    assert _exit_codes(monkeypatch, work) == codes
    assert order == came  # the first alone


def test_fault_of_ours_in_one_process_ends_the_others(monkeypatch):
    monkeypatch.setattr(
        launch.multihost_utils, "process_allgather", lambda mine: np.array([1, mine])
    )
    with pytest.raises(ZeroDivisionError), launch.together("data"):
        raise ZeroDivisionError
    with pytest.raises(UserError, match="process 0 failed") as error:
        with launch.together("data"):
            pass
    assert error.value.exit_code == 1


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
