"""What is kept for later, and what is not."""

import weakref

import numpy as np
import pytest

from unireg_jax.errors import LIMIT, UserError
from unireg_jax.registration.kept import Kept


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (UserError("not_nifti", "no scan"), True),
        (UserError("too_large", "no memory", LIMIT), False),
        (MemoryError(), False),
    ],
)
def test_failures_are_kept_where_the_input_is_to_blame(error, kept):
    made, cache = [], Kept(2)

    def fail():
        made.append(1)
        raise error

    for _ in range(2):
        with pytest.raises(type(error)):
            cache.get("a", fail)
    assert len(made) == (1 if kept else 2)
    if not kept:
        assert cache.get("a", lambda: 3) == cache.get("a", fail) == 3


def test_a_kept_failure_holds_nothing_of_those_who_get_it():
    cache, seen = Kept(2), []

    def fail():
        raise UserError("not_nifti", "no scan")

    def pair():
        scan = np.zeros(3)
        seen.append(weakref.ref(scan))
        cache.get("a", fail)

    for _ in range(3):
        with pytest.raises(UserError, match="no scan"):
            pair()
    assert [ref() for ref in seen] == [None] * 3


def test_the_oldest_goes():
    cache = Kept(2)
    assert [cache.get(n, lambda n=n: n) for n in (0, 1, 0, 2)] == [0, 1, 0, 2]
    assert cache.get(0, lambda: 9) == 0 and cache.get(1, lambda: 9) == 9
