"""The training loop under faults: numbers, signals, data; and what it logs of itself.

The step is a real one, of a network with one parameter, so that a run takes seconds.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data_pipeline import loader
from experiments import clock, loop, recent, signals
from unireg_jax.errors import DATA_CHANGED, NUMERICAL, PREEMPTED, UserError
from unireg_jax.training import checkpoint, log
from unireg_jax.training import mesh as train_mesh
from unireg_jax.training import step as train_step
from unireg_jax.training.state import TrainState

ROOT = Path(__file__).resolve().parents[2]


def _loss(factors):
    """Mean of (w - 1 - region)^2 / 2, times the factor of a pair, such as NaN."""

    def loss(params, batch, extractor):
        del extractor
        factor = jnp.float32(1)
        for pair, value in factors.items():
            factor = jnp.where((batch.pair == pair).any(), value, factor)
        region = 1 + batch.region.astype(jnp.float32)
        value = factor * jnp.mean((params["w"] - region) ** 2) / 2
        return value, {"loss": value, "twice": 2 * value}

    return loss


def _order(root, steps):
    """Pair of every step."""
    stream = loader.make_iterator(root, "train", batch_size=1, seed=0)
    return [int(next(stream).pair[0]) for _ in range(steps)]


class _Run:
    """A work folder, and the command that is started in it again and again."""

    def __init__(self, root, workdir, *, factors=None, lr=0.1, **every):
        self.root, self.workdir = root, workdir
        self.factors, self.lr = factors or {}, lr
        self.every = loop.Every(
            **{"steps": 8, "log": 2, "evaluate": 4, "save": 2} | every
        )

    def start(self, *, skip=0, judge=None, names=None):
        dataset = loader.Dataset(self.root)
        pairs, volumes = dataset.pairs("train"), dataset.index["volumes"]
        mesh = train_mesh.make_mesh(jax.devices()[:1])
        tx = optax.sgd(self.lr, momentum=0.5)
        step = train_step.make_train_step(
            _loss(self.factors), tx, mesh=mesh, skip_nonfinite=skip > 0
        )
        params = {"w": jnp.float32(3)}
        key = jax.random.key_data(jax.random.key(0))
        state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), key)
        state = jax.device_put(state, train_mesh.replicated(mesh))
        stream = recent.Followed(
            loader.make_iterator(dataset, "train", batch_size=1, seed=0, num_threads=0)
        )

        def rows(batch):
            pair = pairs[int(batch.pair[0])]
            ends = tuple(volumes[i]["id"] for i in (pair.fixed, pair.moving))
            return [recent.Row(f"pair {int(batch.pair[0])}", pair.task, ends)]

        def validate(params, border, *, brief):
            border()
            return loop.Judged({"val/w": float(params["w"])}, {})

        self.workdir.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            saved = stack.enter_context(
                contextlib.closing(checkpoint.Checkpoints(self.workdir))
            )
            if saved.latest() is not None:
                state = saved.restore(state, stream)
            writer = stack.enter_context(
                contextlib.closing(log.Log(self.workdir, resume_step=int(state.step)))
            )
            return loop.run(
                lambda state, batch: step(state, batch, None),
                state,
                stream,
                every=self.every,
                names=names or rows,
                judge=judge or validate,
                checkpoints=saved,
                writer=writer,
                skip_nonfinite=skip,
                rate=lambda n: self.lr,
            )

    def lines(self, *, times=False):
        """The log, without what is allowed to differ."""
        text = (self.workdir / log.NAME).read_text().splitlines()
        return [
            {k: v for k, v in json.loads(x).items() if times or "time/" not in k}
            for x in text
        ]

    def steps(self):
        return sorted(
            int(p.name) for p in (self.workdir / "checkpoints").glob("[0-9]*")
        )


def _signal_at(step, number=signal.SIGTERM):
    """A validation that a signal hits, and everything after it too."""

    def judge(params, border, *, brief):
        if judge.calls == step:
            os.kill(os.getpid(), number)
        judge.calls += 1
        border()
        return loop.Judged({"val/w": float(params["w"])}, {})

    judge.calls = 0
    return judge


def test_numbers_that_are_not_finite_end_the_run_with_a_dump(phantoms, tmp_path):
    order = _order(phantoms, 8)
    bad = next(n for n in (5, 6, 7) if order[n - 1] not in order[: n - 1])
    run = _Run(phantoms, tmp_path / "run", factors={order[bad - 1]: np.nan})
    with pytest.raises(UserError, match=f"step {bad}: loss nan, .* on pair") as caught:
        run.start()
    assert (caught.value.reason, caught.value.exit_code) == (
        "field_nonfinite",
        NUMERICAL,
    )
    text = (run.workdir / f"nonfinite_step_{bad}.json").read_text()
    dump = json.loads(text, parse_constant=pytest.fail)  # strict: no NaN
    (row,) = dump["rows"]
    assert dump["step"] == bad and row["name"] == f"pair {order[bad - 1]}"
    dataset = loader.Dataset(phantoms)
    pair = dataset.pairs("train")[order[bad - 1]]
    ids = [dataset.index["volumes"][i]["id"] for i in (pair.fixed, pair.moving)]
    assert row["task"] == pair.task and row["volumes"] == ids
    assert all(x in str(caught.value) for x in (*ids, pair.task, "see nonfinite_step"))
    assert dump["scalars"]["loss"] is None and dump["nonfinite"]["twice"] == "nan"
    assert dump["scalars"].keys() == {"loss", "twice", "grad_norm", "param_norm"}
    assert dump["learning_rate"] == run.lr
    assert run.steps()[-1] == (bad - 1) // 2 * 2  # the last that was due before it
    # The same command meets it again; one that may skip it does not.
    with pytest.raises(UserError, match=f"step {bad}"):
        run.start()
    assert int(run.start(skip=1).step) == 8
    assert run.lines()[-2]["train/skipped"] == 1.0
    assert all("train/loss" not in x or x["train/loss"] > 0 for x in run.lines())


def test_skipped_steps_are_counted_over_restarts(phantoms, tmp_path, capsys):
    order = _order(phantoms, 8)
    bad = sorted({order[0], order[2], order[6]}, key=order.index)
    steps = [n for n, pair in enumerate(order, 1) if pair in bad]
    factors = dict.fromkeys(bad, np.inf)
    whole = _Run(phantoms, tmp_path / "whole", factors=factors)
    whole.start(skip=len(steps))
    parts = _Run(phantoms, tmp_path / "parts", factors=factors)
    with pytest.raises(SystemExit):
        parts.start(skip=len(steps), judge=_signal_at(1))
    parts.start(skip=len(steps))
    assert parts.lines() == whole.lines()
    assert whole.lines()[-2]["train/skipped"] == len(steps)
    assert f"skipped, {len(steps)} of {len(steps)}" in capsys.readouterr().err
    short = _Run(phantoms, tmp_path / "short", factors=factors)
    with pytest.raises(SystemExit):
        short.start(skip=len(steps) - 1, judge=_signal_at(1))
    match = f"step {steps[-1]}: .* and {len(steps) - 1} steps were skipped already"
    with pytest.raises(UserError, match=match) as caught:
        short.start(skip=len(steps) - 1)
    assert caught.value.exit_code == NUMERICAL


def _losses(rng, steps):
    """(loss, task) of every step: two levels, and three explosions of the lower one."""
    levels = {"lung": 1.0, "chest": 80.0}
    tasks = ["lung", "chest"] * (steps // 2)
    losses = [levels[task] * rng.uniform(0.9, 1.1) for task in tasks]
    for n in (70, 72, 90):  # lung; far below what chest has all the time
        losses[n] = 8.0
    return list(zip(losses, tasks, strict=True))


def _watch(stream, writer, losses, first, every):
    """Gives losses to what watches them, and returns the numbers of its log lines."""
    watched = recent.Recent(stream, writer, names=lambda row: [row], every=every)
    lines = []
    for n, (loss, task) in enumerate(losses, first):
        row = recent.Row(f"pair {n}", task, ("a", "b"))
        numbers = {"loss": loss, "grad_norm": 1.0, "param_norm": 1.0}
        watched.add(n, row, {k: jnp.float32(v) for k, v in numbers.items()})
        watched.check(behind=0)
        if n % every == 0:
            lines.append(watched.flush())
    return lines


def test_explosion_is_named_once_in_an_interval(phantoms, tmp_path, capsys):
    losses = _losses(np.random.default_rng(0), 100)
    inner = loader.make_iterator(phantoms, "train", batch_size=1, seed=0, num_threads=0)
    whole, halves = recent.Followed(inner), recent.Followed(inner)
    writer = log.Log(tmp_path)
    lines = _watch(whole, writer, losses, 1, 40)
    writer.close()
    written = [json.loads(x) for x in (tmp_path / log.NAME).read_text().splitlines()]
    assert [x["step"] for x in written] == [71, 91]  # 73 is of the interval of 71
    assert "loss 8 of lung is an explosion" in written[0]["warning"]
    assert "pair 71 (lung, a, b)" in written[0]["warning"]
    assert capsys.readouterr().err.count("is an explosion") == 2
    assert "train/exploded" not in lines[0] and lines[1]["train/exploded"] == 2.0
    assert 0.9 < lines[1]["train/ema/lung"] < 1.1  # the explosions hardly move it
    assert 0.02 < lines[0]["train/ema_sigma/lung"] < 0.1  # of U(0.9, 1.1): 0.058
    assert 72 < lines[1]["train/ema/chest"] < 88
    # Saved and restored between two log lines: the same numbers.
    writer = log.Log(tmp_path, silent=True)
    parts = _watch(halves, writer, losses[:55], 1, 40)
    halves.set_state(json.loads(json.dumps(halves.get_state())))
    assert parts + _watch(halves, writer, losses[55:], 56, 40) == lines
    assert halves.memory == whole.memory


@pytest.mark.parametrize("stop", [1, 2])
def test_log_of_a_continued_run_is_that_of_a_whole_one(phantoms, tmp_path, stop):
    """Stopped between two log lines, in the midst of a validation: none is missing."""
    settings = {"steps": 10, "log": 4, "evaluate": 3, "save": 5}
    whole = _Run(phantoms, tmp_path / "whole", **settings)
    end = whole.start()
    parts = _Run(phantoms, tmp_path / "parts", **settings)
    with pytest.raises(SystemExit) as stopped:
        parts.start(judge=_signal_at(stop))
    assert stopped.value.code == PREEMPTED and parts.steps()[-1] == 3 * stop
    assert parts.lines()[-1]["step"] < 3 * stop  # that validation is still to come
    again = parts.start()
    jax.tree.map(np.testing.assert_array_equal, end, again)
    assert parts.lines() == whole.lines()
    steps = [x["step"] for x in whole.lines()]
    assert steps == [0, 3, 4, 6, 8, 9, 10, 10]


def test_validation_that_is_made_up_for_twice_has_one_line(phantoms, tmp_path):
    """A signal within a validation; made up for, and killed before the next save."""
    whole = _Run(phantoms, tmp_path / "whole")
    whole.start()
    parts = _Run(phantoms, tmp_path / "parts")
    with pytest.raises(SystemExit):
        parts.start(judge=_signal_at(1))
    assert parts.steps()[-1] == 4

    class Killed(BaseException):
        pass

    def kill(batch):
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            parts.start(names=kill)
        found = [x["step"] for x in parts.lines() if "val/w" in x]
        assert found == [0, 4] and parts.steps()[-1] == 4
    parts.start()
    assert parts.lines() == whole.lines()


@pytest.mark.parametrize("number", signals.NUMBERS, ids=lambda n: n.name)
def test_every_signal_of_a_scheduler_saves_the_next_step(
    phantoms, tmp_path, number, request
):
    if number == signal.SIGHUP:  # the tests may run under nohup
        ours = signal.signal(number, signal.SIG_DFL)
        request.addfinalizer(lambda: signal.signal(number, ours))
    before = signal.getsignal(number)
    run = _Run(phantoms, tmp_path / "run", evaluate=3, save=100)
    with pytest.raises(SystemExit) as stopped:
        run.start(judge=_signal_at(1, number))
    assert stopped.value.code == PREEMPTED and run.steps() == [3]
    assert signal.getsignal(number) is before
    assert int(run.start().step) == 8


def _dead_pipe():
    """What is left of a `2>&1 | tee` when tee is killed."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


@pytest.mark.parametrize(
    "stderr",
    [_dead_pipe, lambda: open("/dev/full", "w"), contextlib.nullcontext],
    ids=["dead pipe", "full disk", "closed"],
)
def test_run_outlives_its_stderr(phantoms, tmp_path, monkeypatch, stderr):
    run = _Run(phantoms, tmp_path / "run")
    with stderr() as broken, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", broken)
        assert int(run.start().step) == 8
    assert run.steps()[-1] == 8


_CHILD = """
import hashlib, signal, sys, threading
from experiments import signals
# Also where the tests themselves run under nohup.
ignored = "nohup" in sys.argv
signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
saved = "saved" in sys.argv
with signals.listening((lambda: saved) if "starting" in sys.argv else None) as stop:
    print("ready", flush=True)
    if "asleep" in sys.argv:
        sys.stdin.readline()  # the parent has sent its signals
        print(stop.is_set(), flush=True)
    else:  # as long as a compilation, in one call; no handler runs in between
        def tell():
            stop._asked.wait()
            print("asked", flush=True)
        threading.Thread(target=tell, daemon=True).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def _child(*words, numbers, later=()):
    """Exit code of a process that gets these signals, and its last words.

    The later ones it gets more than a second after it has heard the first.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert child.stdout.readline() == "ready\n"
        for number in numbers:
            child.send_signal(number)
        if later:
            assert child.stdout.readline() == "asked\n"
            time.sleep(1.1 * signals._SAME_S)
        for number in later:
            child.send_signal(number)
        out, _ = child.communicate("go\n", timeout=100)
    finally:
        child.kill()
        child.communicate()
    return child.returncode, out.strip()


@pytest.mark.parametrize(
    ("words", "number", "later", "code"),
    [
        (("starting",), signal.SIGTERM, (), 128 + signal.SIGTERM),
        (("starting", "saved"), signal.SIGUSR1, (), PREEMPTED),
        ((), signal.SIGTERM, (signal.SIGHUP,), 128 + signal.SIGHUP),
    ],
    ids=["nothing saved", "saved before", "second signal"],
)
def test_signal_acts_while_the_interpreter_waits(words, number, later, code):
    assert _child(*words, numbers=[number], later=later)[0] == code


def test_signals_that_come_together_are_one_request():
    """As of systemd, and of `timeout`."""
    for numbers in ([signal.SIGTERM, signal.SIGHUP], 2 * [signal.SIGTERM]):
        assert _child("asleep", numbers=numbers) == (0, "True")


def test_end_of_a_terminal_does_not_end_a_run_under_nohup():
    assert _child("asleep", "nohup", numbers=[signal.SIGHUP]) == (0, "False")
    assert _child("asleep", numbers=[signal.SIGHUP]) == (0, "True")


def test_volume_that_goes_bad_is_named_and_the_run_goes_on_later(phantoms, tmp_path):
    """Rot while the run is on, found when the volume is read."""
    root = tmp_path / "data"
    shutil.copytree(phantoms, root)
    dataset = loader.Dataset(root)
    order, seen = _order(root, 8), set()
    for n, position in enumerate(order, 1):
        pair = dataset.pairs("train")[position]
        fresh = {pair.fixed, pair.moving} - seen
        if n > 3 and fresh:
            break
        seen |= {pair.fixed, pair.moving}
    entry = dataset.index["volumes"][min(fresh)]
    path = root / entry["image"]
    sound = path.read_bytes()

    def rot(params, border, *, brief):
        path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        return loop.Judged({"val/w": float(params["w"])}, {})

    run = _Run(root, tmp_path / "run", save=1)
    with pytest.raises(UserError, match=f"{entry['id']}: .*changed since") as caught:
        run.start(judge=rot)
    assert (caught.value.reason, caught.value.exit_code) == ("checksum", DATA_CHANGED)
    assert run.steps()[-1] == n - 1  # every step before it is saved
    path.write_bytes(sound)
    end = run.start()
    whole = _Run(root, tmp_path / "whole", save=1)
    jax.tree.map(np.testing.assert_array_equal, end, whole.start())
    assert run.lines() == whole.lines()


def test_time_is_split_and_repeated_steps_are_lost(phantoms, tmp_path):
    order = _order(phantoms, 8)
    bad = next(n for n in (6, 7, 8) if order[n - 1] not in order[: n - 1])
    run = _Run(phantoms, tmp_path / "run", factors={order[bad - 1]: np.nan}, log=1)
    run.every = run.every._replace(save=4)
    with pytest.raises(UserError):
        run.start()
    first = json.loads((run.workdir / clock.NAME).read_text())
    assert first["starts"] == 1 and all(v > 0 for v in first["seconds"].values())
    run.start(skip=1)
    last = [x for x in run.lines(times=True) if "time/total_s" in x][-1]
    parts = [last[f"time/{k}_s"] for k in first["seconds"]]
    np.testing.assert_allclose(sum(parts), last["time/total_s"])
    assert last["time/total_s"] > sum(first["seconds"].values())
    assert last["time/starts"] == 2.0 and last["time/lost_s"] > 0
    useful = last["time/step_s"] - last["time/lost_s"]
    np.testing.assert_allclose(last["time/goodput"], useful / last["time/total_s"])
    assert last["time/pairs_per_s"] > 0


def test_clean_stop_between_two_log_lines_loses_no_time(phantoms, tmp_path):
    run = _Run(phantoms, tmp_path / "run", log=5, evaluate=3)
    with pytest.raises(SystemExit):
        run.start(judge=_signal_at(1))
    assert run.steps()[-1] == 3  # before the first log line
    run.start()
    lost = [x["time/lost_s"] for x in run.lines(times=True) if "time/lost_s" in x]
    np.testing.assert_allclose(lost, [0, 0], atol=1e-9)  # two sums of the same floats


def test_time_left_is_that_of_steps(phantoms, tmp_path, monkeypatch, capsys):
    """A second for each; none of the validation that compiles, and of the first."""
    now = [0.0]
    monkeypatch.setattr(clock, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def validate(params, border, *, brief):
        now[0] += 1000
        return loop.Judged({"val/w": float(params["w"])}, {})

    def rows(batch):
        now[0] += 1 if now[0] > 1000 else 100
        return [recent.Row("pair", "lung")]

    run = _Run(phantoms, tmp_path / "run", evaluate=100)
    run.start(judge=validate, names=rows)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("step ")]
    assert [x.partition(" left ")[2] for x in lines] == [
        f"0:00:0{n}" for n in (6, 4, 2, 0)
    ]


def test_clock_of_a_damaged_file_starts_anew(tmp_path):
    (tmp_path / clock.NAME).write_text('{"starts": ')
    writer = log.Log(tmp_path)
    times = clock.Clock(writer, step=0)
    times.lap("startup")
    assert times.scalars()["time/starts"] == 1.0
    writer.close()


def test_process_began_before_it_ran_this():
    assert clock.process_began() < clock.time.monotonic()


def test_checkpoint_of_an_earlier_release_has_no_memory(phantoms):
    stream = recent.Followed(
        loader.make_iterator(phantoms, "train", batch_size=1, seed=0, num_threads=0)
    )
    stream.memory["skipped"] = 3
    state = stream.get_state()
    assert state["loop"] == {"skipped": 3} and state["next_index"] == 0
    stream.set_state({"next_index": 2})
    assert stream.memory == {} and stream.get_state()["next_index"] == 2
    stream.set_state(state)
    assert stream.memory == {"skipped": 3}
