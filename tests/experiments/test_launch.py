"""What a process says when the work with the others breaks off."""

import jax
import pytest

from experiments import launch


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
