"""Two processes on loopback train as one run."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline import store
from unireg_jax.errors import PREEMPTED, USAGE

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
_FIELDS = {
    "data.shape": "32,16,32",
    "data.spacing_mm": "12.0",
    "data.weights.headneck": "1.0",
    "data.batch_size": "4",
    "train.init_from": "",
    "model.encoder": "4,4,4,4",
    "model.decoder": "4,4,4,4",
    "model.remaining": "4,",
    "train.log_every": "1",
    "train.eval_every": "100000",
    "train.eval_pairs": "1",
    "train.watchdog_s": "10",
}

_LONG = ({"train.steps": "100000"},) * 2


@contextlib.contextmanager
def _running(phantoms, workdir, own):
    """Two processes of one run, gone at the end; `own` are fields of each alone."""
    processes = _start(phantoms, workdir, own)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def _start(phantoms, workdir, own):
    address = _free_address()
    processes = []
    for i, more in enumerate(own):
        fields = _FIELDS | {"data.root": str(phantoms)} | more
        command = [sys.executable, "-m", "experiments.train"]
        command += ["--config=experiments/unireg.py:demo", f"--workdir={workdir}"]
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i),
        }
        env.pop("XLA_FLAGS", None)
        with open(f"{workdir}.{i}.err", "w") as errors:
            processes.append(
                subprocess.Popen(
                    command + [f"--config.{k}={v}" for k, v in fields.items()],
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    cwd=ROOT,
                    env=env,
                )
            )
    return processes


def _wait_for(text, path, processes):
    """Until a line begins so; fails if a process ends before."""
    for _ in range(18_000):  # of 0.1 s: others may use the machine, too
        if any(x.startswith(text) for x in path.read_text().splitlines()):
            return
        assert all(p.poll() is None for p in processes), path.read_text()[-2000:]
        time.sleep(0.1)
    raise AssertionError(f"no {text!r} in {path}")


def _ends(processes):
    return [p.wait(timeout=1800) for p in processes]


def test_one_signal_stops_both_at_the_same_step(phantoms, tmp_path):
    workdir = tmp_path / "run"
    with _running(phantoms, workdir, _LONG) as both:
        _wait_for("step 2/", tmp_path / "run.1.err", both)
        both[1].send_signal(signal.SIGTERM)
        assert _ends(both) == [PREEMPTED, PREEMPTED]
    said = [(tmp_path / f"run.{i}.err").read_text().splitlines()[-1] for i in (0, 1)]
    assert said[0] == said[1] and said[0].startswith("stopped at step ")
    step = said[0].split()[3].rstrip(";")
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == [step]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(x)["step"] for x in lines]
    assert steps == list(range(int(step) + 1))  # no line twice: one process writes


# The loop alone, with a validation that works together and is hit in its midst.
_JUDGING = """
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from experiments import loop, recent
from unireg_jax.training import log
from unireg_jax.training.state import TrainState

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
calls = 0

class Stream:
    memory = {}
    def __next__(self):
        return None

class Checkpoints:
    def check(self):
        pass
    def save(self, state, stream):
        print("saved", int(state.step))

def step(state, batch):
    numbers = dict.fromkeys(("loss", "grad_norm", "param_norm"), jnp.float32(1))
    return state._replace(step=state.step + 1), numbers

def judge(params, border, *, brief):
    global calls
    calls += 1
    for pair in range(20):
        if (calls, pair, sys.argv[2]) == (2, 10, "1"):
            os.kill(os.getpid(), signal.SIGTERM)
        border()
        multihost_utils.process_allgather(np.ones(1))
        print("judged", calls, pair)
    return loop.Judged({}, {})

loop.run(
    step,
    TrainState(jnp.int32(0), {}, (), None),
    Stream(),
    every=loop.Every(steps=9, log=9, evaluate=3, save=9),
    names=lambda batch: [recent.Row("pair", "lung")],
    judge=judge,
    checkpoints=Checkpoints(),
    writer=log.Log(".", silent=True),
)
"""


def test_one_signal_ends_a_validation_of_both_after_the_same_pair(tmp_path):
    address = _free_address()
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env.pop("XLA_FLAGS", None)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", _JUDGING, address, str(i)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=env,
        )
        for i in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=1800)[0] for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    for text in said:  # a pair later, as a signal within the steps is a step later
        assert text.splitlines()[-2:] == ["judged 2 10", "saved 3"]
    assert _ends(both) == [PREEMPTED, PREEMPTED]


@pytest.mark.parametrize("folder", ["phantoms", ""], ids=["data", "work folder"])
def test_what_the_first_process_cannot_have_ends_both(phantoms, tmp_path, folder):
    """Another run holds it: nobody waits for a process that has left."""
    workdir = tmp_path / "run"
    own = ({"data.root": ""} if folder else {},) * 2
    with (
        store.lock(store.make_folders(workdir / folder)),
        _running(phantoms, workdir, own) as both,
    ):
        assert _ends(both) == [USAGE, USAGE]
    said = [(tmp_path / f"run.{i}.err").read_text() for i in (0, 1)]
    assert "another run is writing to it" in said[0]
    assert "process 0 failed" in said[1] and "lost another" not in said[1]


def test_different_configs_refuse_to_start(phantoms, tmp_path):
    own = ({}, {"optim.lr": "0.01"})
    with _running(phantoms, tmp_path / "run", own) as both:
        assert _ends(both) == [USAGE, USAGE]
    for i in (0, 1):
        text = (tmp_path / f"run.{i}.err").read_text()
        assert "one config expected" in text and "in process 1;" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_other_which_names_it(phantoms, tmp_path, number):
    with _running(phantoms, tmp_path / "run", _LONG) as both:
        _wait_for("step 2/", tmp_path / "run.0.err", both)
        both[1].send_signal(number)
        assert _ends(both[:1]) != [0]
    text = (tmp_path / "run.0.err").read_text()
    # One that is only stopped breaks nothing off: it is not heard of, that is all.
    assert ("process 0 of 2 lost another one" in text) == (number == signal.SIGKILL)
    assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in text
