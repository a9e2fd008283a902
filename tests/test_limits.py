"""What is done where little is left: memory, descriptors, somebody who reads."""

import gzip
import json
import os
import resource
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest

from experiments.faults import batch as proof
from experiments.faults import scans
from unireg_jax import __main__ as cli
from unireg_jax import errors
from unireg_jax.imaging import grids, nifti, transforms
from unireg_jax.verbs import results

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="limits as Linux keeps them"
)


@pytest.fixture
def pair(tmp_path):
    """Scans f.nii and m.nii, a transform t.h5, and a list of the pair."""
    for name, shift in (("f", 0.0), ("m", 8.0)):
        array, place = proof.body(np.array([shift, 0.0, 0.0]))
        (tmp_path / f"{name}.nii").write_bytes(scans.encode(array, place))
    transforms.write_parts(tmp_path / "t.h5", [np.eye(4)])
    row = {"id": "a", "fixed": "f.nii", "moving": "m.nii", "task": "none"}
    proof.write_list(tmp_path / "list.csv", [row])
    return tmp_path


def warp(folder, moving="m.nii"):
    pair = ["-f", str(folder / "f.nii"), "-m", str(folder / moving)]
    where = ["-t", str(folder / "t.h5"), "-o", str(folder / "out.nii.gz")]
    return ["warp", *pair, *where, "--quiet"]


def batch(folder, *more):
    return ["batch", str(folder / "list.csv"), "-o", str(folder / "out"), *more]


def unireg(*words, before=(), **options):
    """The command in a process of its own; `before` starts it."""
    return subprocess.run(
        [*before, sys.executable, "-m", "unireg_jax", *words],
        **dict(cwd=ROOT, capture_output=True, text=True) | options,
    )


def test_more_memory_than_there_is_ends_in_one_line(pair):
    """A scan of 800 MB in 4 MB, within the limit of voxels, and 1 GiB to put it in."""
    shape = (700, 800, 800)
    head = scans.encode(
        np.zeros((1, 1, 1), "i2"), np.eye(4), dim=[3, *shape, 1, 1, 1, 1]
    )
    with gzip.open(pair / "large.nii.gz", "wb", 1) as file:
        file.write(head[:352])
        for _ in range(shape[2]):
            file.write(bytes(2 * shape[0] * shape[1]))

    # By a shell: between fork and exec this process, with JAX in it, is beyond it.
    limit = ["sh", "-c", 'ulimit -v 1048576 && exec "$@"', "sh"]
    few = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    assert unireg(*warp(pair), before=limit, env=few).returncode == 0
    (pair / "out.nii.gz").unlink()
    done = unireg(*warp(pair, "large.nii.gz"), before=limit, env=few)
    assert done.returncode == errors.LIMIT, done.stderr
    assert done.stderr.startswith("unireg: error: out_of_memory: ")
    assert done.stderr.count("\n") == 1 and not (pair / "out.nii.gz").exists()


def _all_but(left, folder):
    """Takes all descriptors but so many; gives those taken, and the old limit."""
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 20, old[1]))
    held = []
    try:
        while True:
            held.append(os.open(folder, os.O_RDONLY))
    except OSError:
        for descriptor in held[:left]:
            os.close(descriptor)
    return held[left:], old


@pytest.mark.parametrize("left", [2, 3])
def test_two_descriptors_left_do_or_are_a_storage_fault(pair, capsys, left):
    network = str(proof.make_network(pair / "tiny.safetensors"))
    words = batch(pair, "--weights", network, "--io-iterations", "0", "--quiet")
    assert cli.main(["info"]) == 0 and cli.main(warp(pair)) == 0  # all is imported
    (pair / "out.nii.gz").unlink()
    held, old = _all_but(left, pair)
    try:
        warped, listed = cli.main(warp(pair)), cli.main([*words, "--dry-run"])
        done = cli.main(words) if left == 2 else errors.STORAGE
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
    assert (warped, listed) == (0, 0)
    assert done == errors.STORAGE, capsys.readouterr().err


def test_no_terminal_no_home_no_stdin_and_a_file_that_cannot_be_written(pair):
    """Only PATH in the environment, everything closed that can be."""
    bare = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    done = unireg(*warp(pair), env=bare, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    closed = f'exec "{sys.executable}" -m unireg_jax info <&- >&-'
    words = ["sh", "-c", closed]
    done = subprocess.run(words, cwd=ROOT, env=bare, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(unireg("info", "--json", env=bare).stdout)["version"]


def test_reader_that_leaves_ends_the_command_quietly():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        done = unireg("info", stdout=gone, capture_output=False, stderr=subprocess.PIPE)
    assert done.stderr == "" and done.returncode == errors.STORAGE


def test_transforms_are_written_with_two_fields_at_most(tmp_path, monkeypatch):
    shape = (64, 96, 80)
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1000, shape).astype(np.int16)
    nifti.write_volume(tmp_path / "f.nii", hu, np.diag([-1.0, 1.0, 1.0, 1.0]))
    fixed = nifti.read_image(tmp_path / "f.nii")
    matrix = np.eye(4)
    matrix[0, 1] = 0.1
    result = types.SimpleNamespace(
        disp_mm=rng.normal(size=(*shape, 3)).astype(np.float32),
        vox2world=fixed.vox2world,
        affine=matrix,
        warped=fixed.data,
    )
    # What is worked on at a time is small beside this field, as beside a large one.
    monkeypatch.setattr(transforms.itk_containers, "_SLAB_NUMBERS", 2**15)
    monkeypatch.setattr(transforms.itk_containers, "_CHUNK", 2**14)
    monkeypatch.setattr(grids, "SLAB_POINTS", 2**12)
    results._write_transforms(tmp_path / "x", result, fixed)  # imports, once
    tracemalloc.start()
    try:
        results._write_transforms(tmp_path / "x", result, fixed)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The residual field and its turned copy: registration/memory.py counts on it.
    assert peak < (12 + 12 + 2) * hu.size
