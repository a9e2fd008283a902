"""Every benchmark of speed and memory in one call, within a time limit.

    JAX_PLATFORMS=cuda,cpu python -m experiments.benchmark_all --out=runs/speed \
        [--limit_s=1500] [--shape=192,192,160] [--skip=ops,...]

In this order, what matters most first: the tests that need an accelerator; network and
training step as JAX is set (on recent GPUs TF32), in bfloat16 and in float32; instance
optimisation; operators; scratch and memory of the training step; SAM; many heads. Each
is a process of its own, so that peaks are its own and one that fails or takes too long
costs no other; what is left when the time is up is named. OUT holds what each printed,
`NAME.txt`, and summary.json: command, exit code, seconds, device, versions and date of
each. A second call goes on with those that have not succeeded on this device with this
code, tests and weights; give --limit_s the time that the device is there for.
"""

import datetime
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags

from data_pipeline import store
from experiments import cli, processes
from unireg_jax.errors import PARTLY, USAGE, UserError

SUMMARY = "summary.json"
# Of a part that is not run again.
_SAME = ("command", "device", "jax", "sources", "code")
_ROOT = Path(__file__).resolve().parents[1]


class Part(NamedTuple):
    """A command.

    Attributes:
        name: of its file.
        words: after `python -m`; {shape} is filled in.
    """

    name: str
    words: tuple[str, ...]


def _part(name: str, text: str) -> Part:
    return Part(name, tuple(text.split()))


PARTS = (
    _part("tests", "pytest -m gpu -q -p no:cacheprovider"),
    _part("default", "experiments.benchmark --shape={shape}"),
    _part("bfloat16", "experiments.benchmark --shape={shape} --dtype=bfloat16"),
    _part("float32", "experiments.benchmark --shape={shape} --precision=highest"),
    _part("refine", "experiments.benchmark_refine --shape={shape}"),
    _part("ops", "experiments.benchmark_ops --shape={shape}"),
    _part("scratch", "experiments.benchmark --shape={shape} --memory"),
    _part("memory", "experiments.benchmark_memory --shape={shape} --space=1"),
    _part("sam", "experiments.benchmark_sam --shape={shape}"),
    _part("heads", "experiments.benchmark_batch --only=heads"),
)


def run(
    parts: tuple[Part, ...], out: Path, *, shape: str, limit_s: float
) -> dict[str, dict]:
    """Runs what has not succeeded yet, one after another.

    Args:
        parts: in this order.
        out: folder of the results; made.
        shape: X,Y,Z.
        limit_s: for all of them together.

    Returns:
        For each part that has run, now or before: command, code (None: stopped because
        the time was up), seconds, and what `facts` says.

    Raises:
        UserError: `device`, exit code 2: JAX finds none.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / SUMMARY
    known = json.loads(path.read_text())["parts"] if path.is_file() else {}
    here = facts()
    ends = time.monotonic() + limit_s
    for part in parts:
        words = [word.replace("{shape}", shape) for word in part.words]
        command = " ".join(("python -m", *words))
        old = known.get(part.name)
        same = {"command": command, **here, "code": 0}
        if old and all(old.get(key) == same.get(key) for key in _SAME):
            continue
        began = time.monotonic()
        if began >= ends:
            break
        with (out / f"{part.name}.txt").open("w", encoding="utf-8") as file:
            code = processes.exit_code(
                [sys.executable, "-m", *words], file, ends - began, cwd=_ROOT
            )
        seconds = round(time.monotonic() - began, 1)
        known[part.name] = same | {"code": code, "seconds": seconds}
        store.write_json(path, {"parts": known})
        print(f"{part.name}: exit code {code}, {seconds} s", flush=True)
    return known


def facts() -> dict[str, str]:
    """What the figures are of: device, jax, python, digest of the sources, date.

    Raises:
        UserError: `device`, exit code 2: JAX finds none.
    """
    # In a process of its own, which gives the device back.
    code = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)"
    asked = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        said = (asked.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise UserError(
            "device", f"a device that JAX can use expected, got: {said[:200]}", USAGE
        )
    return {
        "device": asked.stdout.strip(),
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "sources": _digest_of_sources(),
        "date": datetime.date.today().isoformat(),
    }


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for room in ("unireg_jax", "data_pipeline", "experiments", "tests"):
        for path in sorted((_ROOT / room).rglob("*")):
            # A card, which is JSON, names the digest of its weights.
            if path.suffix in (".py", ".json"):
                name = path.relative_to(_ROOT)
                digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def main(argv) -> None:
    del argv
    processes.end_on_signals()  # a benchmark left running would hold the device
    options = flags.FLAGS
    parts = tuple(part for part in PARTS if part.name not in options.skip)
    found = run(parts, Path(options.out), shape=options.shape, limit_s=options.limit_s)
    if bad := [p.name for p in parts if found.get(p.name, {"code": 1})["code"] != 0]:
        raise UserError(
            "failed",
            f"{options.out}: {', '.join(bad)} not done; read NAME.txt there, and call "
            "again to go on",
            PARTLY,
        )


if __name__ == "__main__":
    # Here, so that one script can import another.
    names = ", ".join(part.name for part in PARTS)
    flags.DEFINE_string("out", "runs/speed", "Where the results go.")
    flags.DEFINE_string("shape", "192,192,160", "X,Y,Z voxels, multiples of 16.")
    flags.DEFINE_integer("limit_s", 1500, "For all together.", lower_bound=1)
    flags.DEFINE_list("skip", [], f"Of {names}.")
    cli.run(main)
