"""The run that is hurt: experiments/train.py itself, as small as it can be.

Real data of the loader (phantoms), real network, losses, optimiser, running mean of the
parameters, log, validation and checkpoints; 32 x 16 x 16 voxels and 4 channels.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import flags

from data_pipeline import synthetic
from experiments import cli, unireg
from unireg_jax.training import checkpoint, log
from unireg_jax.training.steps import Steps

ROOT = Path(__file__).resolve().parents[2]
_SOURCE = Path(__file__).with_name("fail_calls.c")
STEPS_KEPT = 2  # saved steps, see checkpoint.Checkpoints
SHAPE, SPACING_MM = (32, 16, 16), 12.0
FIELDS = {
    "data.shape": SHAPE,
    "data.spacing_mm": SPACING_MM,
    "data.batch_size": 1,
    "data.weights.headneck": 1.0,
    "train.init_from": "",
    "train.ema": 0.9,
    "train.log_every": 1,
    "train.eval_every": 200,
    "train.eval_pairs": 1,
    "train.image_every": 0,
    "train.checkpoint_every": 5,
    "model.encoder": (4, 4),
    "model.decoder": (4, 4),
    "model.remaining": (4,),
}
_HANGS = 3600.0  # seconds; on a machine that others use, too, a start takes minutes
# What may be in a work folder at the end, as patterns.
_KEPT = (
    r"config\.json",
    r"\.lock",
    r"metrics\.jsonl",
    r"times\.json",
    r"weights\.(json|safetensors)",
    r"tb/[^/]+",
    r"checkpoints/\d+/.+",
)


class Process(NamedTuple):
    """A start of the run.

    Attributes:
        handle: of the process.
        errors: file of its stderr.
    """

    handle: subprocess.Popen
    errors: Path

    def said(self) -> str:
        """Its stderr so far."""
        return self.errors.read_text(errors="replace")

    def last_step(self) -> int | None:
        """The last step that it has told of."""
        told = re.findall(r"^step (\d+)/", self.said(), re.M)
        return int(told[-1]) if told else None

    def wait_for(self, pattern: str) -> bool:
        """Returns True when its stderr matches; False when it ended before."""
        return self.wait_until(lambda: re.search(pattern, self.said()) is not None)

    def wait_until(self, reached: Callable[[], bool], seconds: float = _HANGS) -> bool:
        """Returns True when that is so; False when it ended before."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            ended = self.handle.poll() is not None
            if reached():
                return True
            if ended:
                return False
            time.sleep(0.002)
        raise TimeoutError(f"{self.errors}: {self.said()[-300:]}")

    def end(self, number: int | None = None, seconds: float = _HANGS) -> int:
        """Sends a signal, if any, and returns the exit code."""
        if number is not None:
            self.handle.send_signal(number)
        return self.handle.wait(seconds)


class Victim:
    """A run that can be started again and again in one work folder."""

    def __init__(self, workdir: Path, data: Path, **fields: Any):
        """Says what to run; nothing is made.

        Args:
            workdir: of the run; stderr goes to `<workdir>.err`.
            data: prepared folder, see `make_data`.
            fields: of the config, with `__` for the dot.
        """
        self.workdir = Path(workdir).resolve()
        self.data = data
        own = {k.replace("__", "."): v for k, v in fields.items()}
        self._fields = FIELDS | {"data.root": str(data.resolve())} | own

    def start(
        self,
        *,
        env: Mapping[str, str] | None = None,
        largest: int | None = None,
        errors: Path | None = None,
        **fields: Any,
    ) -> Process:
        """Starts the command once more, in a process of its own.

        Args:
            env: further variables.
            largest: bytes of a file that it may write; None: no limit.
            errors: file for its stderr; None: `<workdir>.err`.
            fields: of the config, as for the class.
        """
        own = {k.replace("__", "."): v for k, v in fields.items()}
        command = [sys.executable, "-m", "experiments.train"]
        command += ["--config=experiments/unireg.py:demo", f"--workdir={self.workdir}"]
        for name, value in (self._fields | own).items():
            if isinstance(value, tuple):
                value = ",".join(map(str, value)) + ","
            command.append(f"--config.{name}={value}")
        if largest is not None:
            command = ["prlimit", f"--fsize={largest}", *command]
        errors = errors or self.workdir.with_name(self.workdir.name + ".err")
        with open(errors, "w") as file:
            handle = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=file,
                cwd=ROOT,
                env={**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})},
            )
        return Process(handle, errors)

    def finish(self, **kwargs: Any) -> None:
        """Runs it to its end.

        Raises:
            RuntimeError: it does not end with 0.
        """
        process = self.start(**kwargs)
        if code := process.end():
            raise RuntimeError(f"exit code {code}: {process.said()[-2000:]}")

    def make(self, **kwargs: Any) -> None:
        """Runs it to its end, unless it has been; `kwargs` as for `start`."""
        if not (self.workdir / "weights.safetensors").exists():
            self.finish(**kwargs)

    def config(self) -> ml_collections.ConfigDict:
        """Its config, for use in this process."""
        config = unireg.get_config("demo")
        config.update_from_flattened_dict(self._fields)
        return config

    @property
    def steps(self) -> Steps:
        """Its saved steps, to look at."""
        return Steps(self.workdir / checkpoint.FOLDER, keep=STEPS_KEPT, tidies=False)

    def digest(self) -> str:
        """Of all that a run is: state, place in the data, memory of the loop, log."""
        step = self.steps.find_sound()
        whole = hashlib.sha256(state_digest(self.steps[step]).encode())
        whole.update((self.workdir / "weights.safetensors").read_bytes())
        for line in (self.workdir / log.NAME).read_text().splitlines():
            kept = [(k, v) for k, v in json.loads(line).items() if log.TIMES not in k]
            whole.update(json.dumps(kept).encode())
        return whole.hexdigest()

    def litter(self) -> list[str]:
        """Files that do not belong in a work folder."""
        names = [
            str(path.relative_to(self.workdir))
            for path in self.workdir.rglob("*")
            if path.is_file()
        ]
        pattern = "|".join(_KEPT)
        return [name for name in names if not re.fullmatch(pattern, name)]


def make_data(folder: Path) -> Path:
    """Writes the prepared folder that the run trains on, or finds it."""
    if not (folder / "index.json").exists():
        synthetic.write_dataset(
            folder,
            shape=SHAPE,
            spacing_mm=SPACING_MM,
            subjects_per_task=4,
            tasks=("headneck", "lung"),
        )
    return folder


def known_rows(path: Path) -> list[dict]:
    """What an interrupted campaign has found out, see `add_row`."""
    path.touch()
    return [json.loads(line) for line in path.read_text().splitlines()]


def add_row(path: Path, row: dict) -> None:
    """Keeps what a part of a campaign has found out, and tells of it."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{path.stem}: {row}", file=sys.stderr, flush=True)


def compile_library(folder: Path) -> Path:
    """Compiles fail_calls.c, for LD_PRELOAD.

    Raises:
        OSError: there is no compiler.
        subprocess.CalledProcessError: it fails.
    """
    path = folder.resolve() / "fail_calls.so"
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(path), str(_SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return path


def state_digest(folder: Path) -> str:
    """Of every array of a saved step, and of the place in the data."""
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(folder / "state")
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        leaf, name = np.asarray(leaf), jax.tree_util.keystr(path)
        digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    for path in sorted((folder / "data").glob("process_*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main(name: str, campaign: Callable[..., dict], **numbers: tuple[int, str]) -> None:
    """Runs a campaign from the command line.

    Args:
        name: of the campaign.
        campaign: campaign(folder, **numbers) -> counts, see `report`.
        numbers: default and help of each of its numbers, which become flags.
    """

    def run(argv) -> None:
        del argv
        cli.setup()
        given = flags.FLAGS
        folder = Path(given.workdir).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        counts = campaign(folder, **{key: given[key].value for key in numbers})
        report(campaign=name, **counts)

    flags.DEFINE_string("workdir", None, "Folder of the campaign; empty or absent.")
    for key, (default, text) in numbers.items():
        flags.DEFINE_integer(key, default, text)
    flags.mark_flags_as_required(["workdir"])
    cli.run(run)


def report(**counts: Any) -> None:
    """Prints the JSON line of a campaign; a promise that is broken is `faults`.

    Raises:
        SystemExit: 1 when `faults` is not empty.
    """
    print(json.dumps(counts), flush=True)
    if counts["faults"]:
        sys.exit(1)


def parse(text: str) -> dict[str, Any]:
    """The JSON line among what a campaign printed."""
    return json.loads(next(x for x in text.splitlines() if x.startswith("{")))


def kill(process: Process) -> int:
    """SIGKILL: nothing of the process runs after it."""
    return process.end(signal.SIGKILL)
