"""Threads on many items: in order, a few ahead, and none waited for in vain."""

import threading
import time

import pytest

from unireg_jax.registration.threads import NAME, GivenUp, in_threads

WAIT = 60  # seconds, of a test that hangs


def alive():
    return [t for t in threading.enumerate() if t.name == NAME]


def settle():
    for thread in alive():
        thread.join(WAIT)
    assert not alive()


def test_items_end_in_order():
    ends = list(in_threads(range(20), lambda i, claim: i * i, workers=3))
    assert [end.item for end in ends] == list(range(20))
    assert [end.value for end in ends] == [i * i for i in range(20)]
    assert not any(end.timed_out for end in ends) and not alive()


@pytest.mark.parametrize("workers", [1, 2])
def test_hung_item_is_given_up_and_its_claim_refused(workers):
    release, refused, published = threading.Event(), [], []

    def work(item, claim):
        if item == 1:
            release.wait(WAIT)
        try:
            claim()
        except GivenUp:
            refused.append(item)
            raise
        published.append(item)
        return item

    ends = list(in_threads(range(5), work, workers=workers, timeout_s=2.0))
    assert [end.timed_out for end in ends] == [i == 1 for i in range(5)]
    assert [end.value for end in ends] == [0, None, 2, 3, 4]
    release.set()
    settle()
    assert refused == [1] and sorted(published) == [0, 2, 3, 4]


def test_item_that_claimed_in_time_is_waited_for():
    claimed = threading.Event()

    def work(item, claim):
        claim()
        claimed.set()
        time.sleep(1.5)  # beyond the limit
        return item

    (end,) = in_threads(["a"], work, workers=1, timeout_s=1.0)
    assert end.value == "a" and not end.timed_out and claimed.is_set()


def test_all_threads_hung_and_the_caller_still_comes_to_the_end():
    release = threading.Event()

    def work(item, claim):
        release.wait(WAIT)

    ends = list(in_threads(range(6), work, workers=2, timeout_s=0.05))
    assert all(end.timed_out for end in ends) and len(ends) == 6
    release.set()
    settle()


def test_time_of_an_item_counts_from_its_own_start():
    """Not from when it was put into the queue behind others."""

    def work(item, claim):
        time.sleep(0.2)
        return item

    ends = list(in_threads(range(8), work, workers=1, timeout_s=5.0))
    assert not any(end.timed_out for end in ends)


def test_caller_that_stops_waits_for_items_in_work_only():
    begun, ended = [], []

    def work(item, claim):
        begun.append(item)
        time.sleep(0.1)
        ended.append(item)

    ends = in_threads(range(100), work, workers=2)
    next(ends)
    ends.close()
    assert sorted(begun) == sorted(ended) and len(begun) < 6 and not alive()


def test_fault_in_work_is_raised_at_its_turn():
    def work(item, claim):
        if item == 2:
            raise KeyError("odd")
        return item

    got = []
    with pytest.raises(KeyError, match="odd"):
        for end in in_threads(range(9), work, workers=3):
            got.append(end.item)
    assert got == [0, 1] and not alive()
