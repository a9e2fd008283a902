"""What an input, a name or a folder cannot make this program do; what it does not tell.

One run of `unireg batch` over scans full of a patient's text, watched from outside by
tests/audited.py and cut off from the network where the system allows it, serves most
tests. The page of all this is docs/security.md.
"""

import ast
import base64
import configparser
import csv
import functools
import gzip
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import uuid
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest

from data_pipeline import check, prepare, preview
from experiments.faults import batch as proof
from experiments.faults import scans
from unireg_jax import __main__ as cli
from unireg_jax import errors
from unireg_jax.imaging import nifti
from unireg_jax.locks import lock
from unireg_jax.verbs import outputs, results

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("unireg_jax", "data_pipeline", "experiments")

# A text that is in no file by chance; any part of it of some length holds the core.
CORE = "Zq7Wm1xK9vTb"
MARKER = (CORE * 6)[:64]
# A name with what a terminal, a browser, a spreadsheet and a shell would act on.
ODD = "=m\x1b[31m\u202e<img src=x>$(id)"
FIRST_MM = (-120.0, -110.0, 300.0)  # where the scans of experiments/faults begin


# --- the one run --------------------------------------------------------------------


class Run(NamedTuple):
    """The watched run and what it left."""

    home: Path  # folder of everything
    done: subprocess.CompletedProcess
    seen: list  # events that must not be
    modules: dict  # name -> file
    apart: bool  # from the network, under another host's name
    network: str

    @property
    def out(self):
        return self.home / "out"

    @property
    def inputs(self):
        return self.home / f"{CORE}-patient"


def _place():
    """Words that start a command without network and on a host of the marker's name."""
    for more in ((), ("-r",)):
        words = ["unshare", *more, "-n", "-u", "sh", "-c"]
        words += [f'hostname {CORE} && exec "$@"', "sh"]
        try:
            if not subprocess.run([*words, "true"], capture_output=True).returncode:
                return words
        except OSError:
            pass
    return []


def planted(array, vox2world):
    """A .nii.gz with the marker wherever text fits: header, extension, gzip header."""
    text = MARKER.encode()
    raw = scans.encode(
        array,
        vox2world,
        vox_offset=448,
        descrip=text,
        aux_file=text[:24],
        intent_name=text[:16],
        db_name=text[:18],
    )
    extension = b"\1\0\0\0" + struct.pack("<2i", 96, 6) + text.ljust(88, b"\0")
    raw = raw[:348] + extension + raw[352:]
    pack = zlib.compressobj(wbits=-15)
    extra = struct.pack("<H", 4 + 64) + b"ID" + struct.pack("<H", 64) + text
    head = b"\x1f\x8b\x08" + bytes([4 | 8 | 16]) + struct.pack("<I", 1) + b"\0\3"
    names = extra + text + b"\0" + text + b"\0"
    tail = struct.pack("<2I", zlib.crc32(raw), len(raw))
    return head + names + pack.compress(raw) + pack.flush() + tail


def _spoken(item, k):
    """Tags of a DICOM slice that name a patient."""
    del k
    for tag in ("PatientID", "InstitutionName", "StudyDescription", "ProtocolName"):
        setattr(item, tag, MARKER)
    item.PatientName = item.OperatorsName = MARKER
    item.PatientComments = item.ImageComments = MARKER * 4
    item.AccessionNumber = item.StationName = MARKER[:16]
    item.private_block(0x0029, MARKER, create=True).add_new(0x01, "LT", MARKER)


def _bodies():
    """Name -> scan: good ones, metal, and one that is nothing but air."""
    shifted, place = proof.body(np.array([8.0, 0.0, -5.0]))
    metal = shifted.copy()
    metal[4:9, 5:8, 6:9], metal[12:14] = 32767, -32768
    return {
        "fixed": proof.body(np.zeros(3))[0],
        ODD: shifted,
        "metal": metal,
        "air": np.full_like(shifted, -1000),
    }, place


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("watched")
    inputs = home / f"{CORE}-patient"
    inputs.mkdir()
    bodies, place = _bodies()
    for name, array in bodies.items():
        (inputs / f"{name}.nii.gz").write_bytes(planted(array, place))
    seg = (bodies["fixed"] > -200).astype("u1")
    (inputs / "seg.nii.gz").write_bytes(planted(seg, place))
    (inputs / "cut.nii.gz").write_bytes(planted(bodies["metal"], place)[:-9])
    network = str(proof.make_network(home / "tiny.safetensors"))
    rows = [
        {"id": "odd", "moving": f"{ODD}.nii.gz", "fixed_label": "seg.nii.gz"},
        {"id": "metal", "moving": "metal.nii.gz"},
        {"id": "air", "moving": "air.nii.gz"},
        {"id": "+cut", "moving": "cut.nii.gz"},
        {"id": "absent", "moving": f"{ODD}-absent.nii.gz"},
    ]
    rows[0] |= {"moving_label": "seg.nii.gz", "type": "intra"}
    rows[0] |= {"fixed_subject": MARKER, "moving_subject": MARKER + "2"}
    if importlib.util.find_spec("pydicom"):
        _write_series(inputs / f"{CORE}-study" / "series", bodies["fixed"])
        rows.append({"id": "dicom", "moving": f"{CORE}-study/series"})
    proof.write_list(
        inputs / "list.csv", [{"fixed": "fixed.nii.gz"} | row for row in rows]
    )
    empty = [home / name for name in (f"{CORE}-home", "tmp")]
    for folder in (*empty, home / "out"):
        folder.mkdir()
    environment = {
        **{"PATH": os.environ["PATH"], "HOME": str(empty[0]), "TMPDIR": str(empty[1])},
        # The tests' own, for the same bits as in their process.
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        **{"UNIREG_CACHE": str(home / "cache"), "JAX_PLATFORMS": "cpu"},
        **{"SECRET": MARKER, "AWS_SECRET_ACCESS_KEY": MARKER, "USER": MARKER},
        "PYTHONDONTWRITEBYTECODE": "1",  # of the packages, not ours
    }
    record = home / "seen.json"
    apart = _place()
    words = [
        *(*apart, sys.executable, "-m", "tests.audited", str(record)),
        f"{home / 'out'}:{home / 'cache'}",
        *command(inputs / "list.csv", home / "out", network),
        "--html",
    ]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, umask=0o027
    )
    told = json.loads(record.read_text() or "{}")
    assert done.returncode == errors.PARTLY, done.stderr.decode()
    return Run(home, done, told["seen"], told["modules"], bool(apart), network)


def _write_series(folder, array):
    import pydicom  # an extra

    from tests.dicom_files import write_series

    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    write_series(
        folder, array, spacing_mm=proof.SPACING, first_mm=FIRST_MM, edit=_spoken
    )


def command(path, out, network, *more):
    return [
        *("batch", str(path), "--out", str(out), "--task", "lung"),
        *("--affine", "none", "--weights", network, "--io-iterations", "0", *more),
    ]


@pytest.fixture
def left(run, tmp_path):
    """A copy of the results, to be spoiled."""
    shutil.copytree(run.out, tmp_path / "out", symlinks=True)
    return tmp_path / "out"


# --- nothing runs, nothing is reached -----------------------------------------------

# What packages do when they are imported, not we, and not with anything of the user's:
# nibabel imports pydicom where it is installed, that requests, and its urllib3 asks the
# system for a port on ::1 to see whether it knows IPv6; h5py asks for the processor.
_OF_PACKAGES = (
    ("urllib3", "socket.__new__", ""),
    ("urllib3", "socket.bind", "('::1', 0)"),
    ("h5py", "subprocess.Popen", "('uname', ['uname', '-p'], None, None)"),
)


def test_run_starts_no_program_and_reaches_no_network(run):
    """And writes nothing outside its output and its cache."""
    left = [
        (by, event, told)
        for by, event, told in run.seen
        if not any(
            by == package and event == what and end in told
            for package, what, end in _OF_PACKAGES
        )
    ]
    assert left == []


def test_run_leaves_no_file_elsewhere(run):
    """Also what the interpreter does not see: C++ code writes files too."""
    for name in (f"{CORE}-home", "tmp"):
        assert list((run.home / name).iterdir()) == []
    assert {p.name for p in run.home.iterdir()} == {
        *(f"{CORE}-patient", f"{CORE}-home", "tmp", "out", "cache", "seen.json"),
        *("tiny.safetensors", "tiny.json"),
    }
    names = {"odd", "metal", "air", "dicom"} & {p.name for p in run.out.iterdir()}
    assert names >= {"odd", "metal", "air"}
    assert {p.name for p in run.out.iterdir()} - names == {
        *("batch.csv", "failed.csv", "batch.json", "batch.jsonl"),
        ".unireg-batch.lock",
    }


def test_run_works_without_a_network(run):
    if not run.apart:
        pytest.skip("this system allows no network namespace: unshare -n")
    assert json.loads((run.out / "batch.json").read_text())["done"] >= 3


_MISDEEDS = """
import collections, os, pickle, shutil, socket, subprocess, sys
from tests import audited
inside, outside = sys.argv[1:]
seen = audited.watch([inside])
open(os.path.join(inside, "a"), "w").close()
open(__file__ if "__file__" in globals() else os.devnull).close()
count = [len(seen)]
def misdeed(act):
    before = len(seen)
    try:
        act()
    except OSError:
        pass
    count.append(len(seen) - before)
misdeed(lambda: pickle.loads(pickle.dumps(collections.OrderedDict())))
misdeed(lambda: os.system("true"))
misdeed(lambda: subprocess.run(["true"]))
misdeed(lambda: socket.getaddrinfo("localhost", 9))
misdeed(lambda: socket.create_connection(("127.0.0.1", 9), 0.1))
misdeed(lambda: open(os.path.join(outside, "b"), "w").close())
misdeed(lambda: os.rename(os.path.join(inside, "a"), os.path.join(outside, "c")))
misdeed(lambda: os.remove(os.path.join(outside, "c")))
misdeed(lambda: os.mkdir(os.path.join(outside, "d")))
misdeed(lambda: os.symlink(inside, os.path.join(outside, "link")))
os.symlink(outside, os.path.join(inside, "link"))
misdeed(lambda: open(os.path.join(inside, "link", "e"), "w").close())
misdeed(lambda: shutil.rmtree(os.path.join(outside, "d")))
misdeed(lambda: os.execv("/nowhere", ["nowhere"]))
print(count)
"""


def test_watch_sees_every_kind_of_misdeed(tmp_path):
    folders = [tmp_path / name for name in ("inside", "outside")]
    for folder in folders:
        folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _MISDEEDS, *map(str, folders)],
        **dict(cwd=ROOT, capture_output=True, text=True, check=True),
    )
    allowed, *misdeeds = json.loads(done.stdout)
    assert allowed == 0 and len(misdeeds) == 13 and all(misdeeds), done.stdout


# Modules that build objects, run programs, unpack archives or reach a network.
_MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal"),
    *("shelve", "yaml", "subprocess", "pty", "urllib", "urllib3", "requests", "http"),
    *("httpx", "aiohttp", "ftplib", "smtplib", "telnetlib", "xmlrpc", "socketserver"),
    *("socket", "asyncio", "webbrowser", "tarfile", "code", "codeop", "runpy"),
}
_CALLS = {
    *("eval", "exec", "compile", "__import__", "mktemp", "extractall"),
    *("unpack_archive", "unsafe_load", "full_load", "memmap"),
    *("system", "popen", "execv", "execve", "execvp", "spawnv", "posix_spawn", "fork"),
}
_SWITCHES = {"shell": True, "allow_pickle": True, "weights_only": False}
# File -> what it may, and why.
_ALLOWED = {
    "unireg_jax/reports/index.py": {"urllib"},  # .parse.quote: spells a link, no more
    "unireg_jax/training/log.py": {"socket"},  # .gethostname: TensorBoard's file names
    # Start this program's own commands, as lists and never through a shell.
    "experiments/demo.py": {"subprocess"},
    "experiments/benchmark_all.py": {"subprocess"},
    "experiments/benchmark_batch.py": {"subprocess"},
    "experiments/conventional.py": {"subprocess"},
    "experiments/processes.py": {"subprocess"},
    "experiments/faults/batch.py": {"subprocess"},
    "experiments/faults/victim.py": {"subprocess"},
    "experiments/faults/writes.py": {"subprocess"},
}


@functools.cache
def _sources():
    """Name -> syntax tree of every file of the project but the tests."""
    paths = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in paths}


def _risks(tree):
    """What a source imports, calls or switches on that could run or reach something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from {a.name.split(".")[0] for a in node.names} & _MODULES
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from {(node.module or "").split(".")[0]} & _MODULES
            if node.module in ("os", "shutil", "tempfile", "builtins"):
                yield from {a.name for a in node.names} & _CALLS
        elif isinstance(node, ast.Call):
            owner = getattr(getattr(node.func, "value", None), "id", None)
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            # `re.compile` and a compiled program's `.compile()` are methods.
            if name in _CALLS and not (name in ("compile",) and owner != "builtins"):
                yield name
            if isinstance(node.func, ast.Name) and name == "compile":
                yield name
            for word in node.keywords:
                value = getattr(word.value, "value", None)
                if word.arg in _SWITCHES and value == _SWITCHES[word.arg]:
                    yield word.arg
            if owner in ("yaml", "torch") and name == "load":
                yield f"{owner}.load"


def test_no_source_can_run_what_it_reads():
    found = {}
    for name, tree in _sources().items():
        if risks := set(_risks(tree)) - _ALLOWED.get(name, set()):
            found[name] = risks
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from subprocess import run", "import urllib.request"),
        *("eval(x)", "exec(x)", "compile(x, '', 'exec')", "os.system(x)", "a.popen(x)"),
        *("from os import system", "f(x, shell=True)", "np.load(f, allow_pickle=True)"),
        *("torch.load(f, weights_only=False)", "yaml.load(f)", "z.extractall(x)"),
        *("tempfile.mktemp()", "from tempfile import mktemp", "np.memmap(f)"),
    ],
)
def test_risk_in_a_source_is_seen(source):
    assert list(_risks(ast.parse(source)))


def test_harmless_source_has_no_risk():
    source = "re.compile(x); lowered.compile(); np.load(f, allow_pickle=False)"
    source += "\nfrom . import code\nimport pickletools"
    assert not list(_risks(ast.parse(source)))


# --- packages -----------------------------------------------------------------------

# Imported by a package of ours only where they are installed, without being required:
# by nibabel (pydicom and what that imports) and by jax (the last line).
_WHERE_INSTALLED = {
    *("pydicom", "pillow", "requests", "urllib3", "certifi", "idna", "simplejson"),
    *("charset-normalizer", "chardet", "pylibjpeg", "gdcm", "pyjpegls"),
    *("cloudpickle", "filelock", "flatbuffers", "zstandard", "matplotlib"),
}


def _plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def _declared(*extras):
    """What setup.cfg requires, with these extras; * for all."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    more = config["options.extras_require"]
    lines = config["options"]["install_requires"].splitlines()
    for name in more if extras == ("*",) else extras:
        lines += more[name].splitlines()
    lines = [line.strip() for line in lines]
    return {
        _plain(re.match(r"[\w.-]+", line)[0]) for line in lines if line[:1].isalpha()
    }


def _requirements(name):
    """Names that a distribution requires without an extra."""
    lines = importlib.metadata.requires(name) or ()
    return {_plain(re.match(r"[\w.-]+", x)[0]) for x in lines if "extra ==" not in x}


def _closure(names):
    """And what those require, and so on, as far as it is installed."""
    found, waiting = set(), set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        try:
            waiting |= _requirements(name) - found
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def _distributions(modules):
    """Distributions that own these modules."""
    owners = importlib.metadata.packages_distributions()
    found = set()
    for name in modules:
        found |= {_plain(owner) for owner in owners.get(name, [name])[:1]}
    return found


def test_run_imports_only_what_is_required(run):
    """A new package, or one of a dependency that nobody declared, is noticed here."""
    site = f"{os.sep}site-packages{os.sep}"
    files = [file.rpartition(site)[2] for file in run.modules.values() if file]
    tops = {file.split(os.sep)[0].partition(".")[0] for file in files}
    tops = {top for top in tops if top and not top.startswith("__editable__")}
    imported = _distributions(tops) - {"setuptools"}
    assert imported >= {"jax", "jaxlib", "flax", "numpy", "nibabel", "safetensors"}
    assert imported - _closure(_declared()) <= _WHERE_INSTALLED


def test_sources_import_only_what_setup_cfg_declares():
    """What is imported and is not Python's own is required, or an extra."""
    found = set()
    for tree in _sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    found -= {*sys.stdlib_module_names, *ROOMS, "tests"}
    named = {"SimpleITK": "simpleitk", "orbax": "orbax-checkpoint", "absl": "absl-py"}
    named |= {"surface_distance": "surface-distance"}
    named |= {"itk": "itk-elastix", "ants": "antspyx"}
    found = {_plain(named.get(name, name)) for name in found}
    # jax brings jaxlib of its own version, voxelmorph neurite.
    assert found - _declared("*") <= {"jaxlib", "neurite"}


# --- a patient's text ---------------------------------------------------------------


def contents(data):
    """A file's bytes, and those of whatever is packed in it."""
    yield data
    if data[:2] == b"\x1f\x8b":
        yield from contents(gzip.decompress(data))
    elif data[:4] == b"PK\3\4":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield from contents(archive.read(name))
    elif data[:8] == b"\x89HDF\r\n\x1a\n":
        with h5py.File(io.BytesIO(data), "r") as file:
            yield from _datasets(file)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        yield from _chunks(data)
    for text in re.findall(rb"base64,([A-Za-z0-9+/=]+)", data):
        yield from contents(base64.b64decode(text))


def _datasets(file):
    found = []

    def visit(name, item):
        found.append(f"{name} {dict(item.attrs)}".encode())
        if isinstance(item, h5py.Dataset):
            found.append(np.asarray(item[()]).tobytes())

    file.visititems(visit)
    return found


def _chunks(data):
    """Of a PNG, inflated where they are deflated."""
    place = 8
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + size]
        yield kind + body
        if kind in (b"zTXt", b"iCCP", b"iTXt"):
            body = body.partition(b"\0")[2].lstrip(b"\0\1")
        if kind in (b"IDAT", b"zTXt", b"iCCP", b"iTXt"):
            packed = zlib.decompressobj()
            try:
                yield packed.decompress(body)
            except zlib.error:
                pass  # a text that is not deflated, or a further IDAT
        place += 12 + size


def mentions(data, *words):
    """Which of these words the bytes hold, in any case and in one or two bytes."""
    found = set()
    for part in contents(data):
        for word in (CORE, *words):
            for spelled in (word.encode(), word.encode("utf-16-le")):
                if spelled.lower() in part.lower():
                    found.add(word)
    return found


def test_marker_is_seen_wherever_it_hides(run):
    for path in run.inputs.rglob("*"):
        if path.is_file() and path.name != "cut.nii.gz":
            assert mentions(path.read_bytes()), path.name
    raw = gzip.decompress((run.inputs / "metal.nii.gz").read_bytes())
    assert len(re.findall(CORE.encode(), raw)) == 5 + 2 + 1 + 1 + 5
    hidden = io.BytesIO()
    with zipfile.ZipFile(hidden, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", gzip.compress(MARKER.encode()))
    assert mentions(hidden.getvalue())
    assert mentions(b"src=data:x;base64," + base64.b64encode(hidden.getvalue()))
    for kind, body in (("zTXt", b"a\0\0"), ("iTXt", b"a\0\1\0\0\0"), ("IDAT", b"")):
        chunk = body + zlib.compress(MARKER.encode())
        png = struct.pack(">I", len(chunk)) + kind.encode() + chunk + bytes(4)
        assert mentions(b"\x89PNG\r\n\x1a\n" + png), kind
    hidden = io.BytesIO()
    with h5py.File(hidden, "w") as file:
        file.create_dataset("a", data=[MARKER.encode()] * 9, compression="gzip")
    assert mentions(hidden.getvalue())
    assert not mentions(b"nothing")


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_no_text_of_a_patient_host_or_folder_in_what_a_batch_leaves(run):
    """Nor secrets of the environment; the names of the scans' own files are kept."""
    places = (str(run.home), str(ROOT))
    assert len(files_of(run.out)) > 20
    for path in files_of(run.out):
        assert not mentions(path.read_bytes(), *places), path.name
    assert not mentions(run.done.stdout + run.done.stderr.replace(b"\n", b""))


def test_record_does_not_say_which_patients_contradict_a_pairs_type(run):
    record = json.loads((run.out / "odd" / "odd_run.json").read_text())
    assert any(line.startswith("subjects: ") for line in record["warnings"])


def test_no_text_of_a_patient_in_what_other_verbs_make(run, left, tmp_path, capsys):
    made = tmp_path / "made"
    made.mkdir()
    case = left / "metal"
    field, composite = (f"{case}/metal_{x}" for x in ("1Warp.nii.gz", "Composite.h5"))
    moving = str(run.inputs / "metal.nii.gz")
    pair = ["-f", str(run.inputs / "fixed.nii.gz"), "-m", moving]
    words = [
        ["warp", "-t", composite, *pair, "-o", f"{made}/w.nii.gz"],
        ["convert", "-t", field, "--to", "itk", *pair, "-o", f"{made}/c.h5"],
        ["convert", "-t", composite, "--to", "nifti1006", "-o", f"{made}/c.nii.gz"],
        ["convert", "-t", field, "--to", "slicer", *pair, "-o", f"{made}/c.nrrd"],
        ["convert", "-t", field, "--to", "l2r", *pair, "-o", f"{made}/disp_1_2.npz"],
        ["invert", "-t", field, *pair, "-o", f"{made}/i.nii.gz"],
        ["jacobian", "-t", field, "-o", f"{made}/j.nii.gz"],
        ["report", str(case), *pair, "--overwrite"],
        ["report", str(left), "--list", str(run.inputs / "list.csv"), "--overwrite"],
        ["evaluate", "-t", field],
    ]
    for line in words:
        assert cli.main([*line, "--json"]) == 0, capsys.readouterr().err
        told = capsys.readouterr()
        assert not mentions(told.out.encode()), line
    assert len(files_of(made)) == 7
    for path in (*files_of(made), *files_of(left)):
        assert not mentions(path.read_bytes()), path.name


def test_no_text_of_a_patient_in_the_trace_of_a_fault(
    run, tmp_path, capsys, monkeypatch
):
    """One pair of a batch, and a command: both keep a trace."""

    def fail(folder, inputs, *args, **kwargs):
        raise RuntimeError("odd")

    monkeypatch.setattr(results, "write", fail)
    monkeypatch.setenv("SECRET", MARKER)
    out = tmp_path / "out"
    words = ["--task", "none", "--affine", "none", "--weights", run.network]
    words += ["--io-iterations", "0"]
    row = {"id": "a", "fixed": "fixed.nii.gz", "moving": "metal.nii.gz"}
    proof.write_list(run.inputs / "one.csv", [row])
    lists = ["batch", str(run.inputs / "one.csv"), "--out", str(out), *words]
    assert cli.main(lists) == errors.FAILED
    pair = ["-f", str(run.inputs / "fixed.nii.gz")]
    pair += ["-m", str(run.inputs / "metal.nii.gz")]
    assert cli.main(["register", *pair, "--out", str(out), *words]) == 1
    (run.inputs / "one.csv").unlink()
    logs = [path for path in files_of(out) if path.suffix == ".log"]
    assert len(logs) == 2
    for path in logs:
        assert "RuntimeError: odd" in path.read_text()
        assert not mentions(path.read_bytes()), path.name
    assert not mentions(capsys.readouterr().err.encode())


# --- what outputs are made of -------------------------------------------------------


def test_headers_are_built_from_nothing(run):
    """No text, no extension, no name or time of gzip."""
    paths = list(run.out.rglob("*.nii.gz"))
    assert len(paths) >= 7
    for path in paths:
        data = path.read_bytes()
        assert data[3:8] == bytes(5), path.name  # flags and time of gzip
        head = gzip.decompress(data)[:352]
        # data_type, db_name, extents, session_error, regular; descrip, aux_file;
        # intent_name; the four bytes that announce extensions.
        for begin, end in ((4, 39), (148, 252), (328, 344), (348, 352)):
            assert not any(head[begin:end]), (path.name, begin)


def test_hostile_pairs_change_nothing_for_their_mates(run, tmp_path):
    """The same bytes as alone, in another process and in another order."""
    rows = [
        {"id": "metal", "fixed": "fixed.nii.gz", "moving": "metal.nii.gz"},
        {"id": "air", "fixed": "fixed.nii.gz", "moving": "air.nii.gz"},
    ]
    for row in rows:
        listed = run.inputs / "alone.csv"
        proof.write_list(listed, [row])
        words = command(listed, tmp_path / row["id"], run.network, "--quiet")
        assert cli.main(words) == 0
        listed.unlink()
        ours, alone = run.out / row["id"], tmp_path / row["id"] / row["id"]
        same = [path.name for path in files_of(alone) if "run.json" not in path.name]
        assert len(same) == 4
        for name in same:
            assert (ours / name).read_bytes() == (alone / name).read_bytes(), name


def test_umask_is_kept(run):
    """The run had 027: nothing for others, nothing that a group can write."""
    for path in (run.out, *run.out.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path != run.out:
            assert mode == (0o750 if path.is_dir() else 0o640), path.name
    for path in files_of(run.home / "cache"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o022


# --- links --------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path):
    """A file elsewhere; what is written through a link would show in it."""
    path = tmp_path / "elsewhere" / "victim"
    path.parent.mkdir()
    path.write_text("mine")
    return path


@pytest.mark.parametrize("name", ["batch.jsonl", ".unireg-batch.lock"])
@pytest.mark.parametrize("dangling", [False, True])
def test_file_that_grows_is_no_link(run, tmp_path, victim, capsys, name, dangling):
    if dangling:
        victim.unlink()
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to(victim)
    words = command(run.inputs / "list.csv", out, run.network)
    assert cli.main(words) == errors.STORAGE
    assert "storage" in capsys.readouterr().err
    assert not victim.exists() if dangling else victim.read_text() == "mine"
    assert {path.name for path in out.iterdir()} <= {name, ".unireg-batch.lock"}


def test_link_under_the_name_of_an_output_is_replaced(run, left, victim, tmp_path):
    """The link, not what it leads to."""
    for name in ("batch.csv", "failed.csv", "batch.json"):
        (left / name).unlink()
        (left / name).symlink_to(victim)
    words = command(run.inputs / "list.csv", left, run.network, "--html", "--quiet")
    assert cli.main(words) == errors.PARTLY
    page = left / "metal" / "qc.html"
    page.unlink()
    page.symlink_to(victim)
    pair = [str(run.inputs / f"{name}.nii.gz") for name in ("fixed", "metal")]
    words = ["report", str(page.parent), "-f", pair[0], "-m", pair[1], "--quiet"]
    assert cli.main([*words, "--overwrite"]) == 0
    made = tmp_path / "w.h5"
    made.symlink_to(victim)
    field = str(left / "metal" / "metal_1Warp.nii.gz")
    words = ["convert", "-t", field, "--to", "itk", "-o", str(made), "--quiet"]
    assert cli.main(words) == errors.USAGE
    assert cli.main([*words, "--overwrite"]) == 0
    for path in (left / "batch.csv", left / "failed.csv", left / "batch.json"):
        assert not path.is_symlink() and path.stat().st_size > 9
    assert not page.is_symlink() and not made.is_symlink()
    assert victim.read_text() == "mine" and os.listdir(victim.parent) == ["victim"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_case_that_is_a_link_is_refused(tmp_path, victim, overwrite):
    """Results there would be deleted and replaced."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(victim.parent)
    (victim.parent / "a_run.json").write_text("mine")
    with pytest.raises(errors.UserError) as caught:
        with outputs.case_folder(tmp_path / "out", "a", overwrite):
            raise AssertionError("nothing is made")
    assert caught.value.exit_code == errors.USAGE
    assert sorted(os.listdir(victim.parent)) == ["a_run.json", "victim"]


def test_guessed_name_of_a_temporary_file_is_not_written_to(
    tmp_path, victim, monkeypatch
):
    guess = uuid.UUID(int=7)
    monkeypatch.setattr(uuid, "uuid4", lambda: guess)
    waiting = tmp_path / f".unireg-{guess.hex}.tmp"
    waiting.symlink_to(victim)
    with pytest.raises(errors.UserError) as caught:
        with nifti.atomic_path(tmp_path / "a.json") as temp:
            temp.write_text("secret")
    assert caught.value.exit_code == errors.STORAGE
    waiting.symlink_to(victim.parent)
    with pytest.raises(errors.UserError) as caught:
        with outputs.case_folder(tmp_path, "a", False):
            raise AssertionError("nothing is made")
    assert caught.value.exit_code == errors.STORAGE
    assert victim.read_text() == "mine" and os.listdir(victim.parent) == ["victim"]


def test_guessed_name_of_a_trace_is_not_written_to(tmp_path, victim, monkeypatch):
    guess = uuid.UUID(int=7)
    monkeypatch.setattr(uuid, "uuid4", lambda: guess)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    (tmp_path / f"unireg-error-{guess.hex[:8]}.log").symlink_to(victim)
    monkeypatch.setattr("unireg_jax.verbs.info.run", lambda args: 1 / 0)
    assert cli.main(["info"]) == 1
    assert victim.read_text() == "mine"


def test_lock_is_no_link(tmp_path, victim):
    (tmp_path / ".lock").symlink_to(victim.parent / "new")
    with pytest.raises(errors.UserError, match="symbolic link"):
        with lock(tmp_path):
            raise AssertionError("nothing is held")
    assert os.listdir(victim.parent) == ["victim"]


# --- texts for people ---------------------------------------------------------------


def test_odd_names_are_spelled_out_in_all_texts_of_a_batch(run):
    """On the terminal, in tables, records and pages; RLO turns a name around."""
    texts = [path.read_bytes() for path in files_of(run.out) if _is_text(path)]
    texts += [run.done.stdout, run.done.stderr]
    assert len(texts) >= 10
    for text in texts:
        assert b"\x1b" not in text and "\u202e".encode() not in text
    assert b"\\x1b[31m\\u202e" in run.done.stderr
    page = (run.out / "odd" / "qc.html").read_text()
    assert "&lt;img src=x&gt;" in page and "<img src=x" not in page


def _is_text(path):
    return path.suffix in (".json", ".jsonl", ".csv", ".html", ".log", ".txt")


@pytest.mark.parametrize(
    "words",
    [
        ["register", "-f", ODD, "-m", ODD, "-o", "o", "--task", "lung"],
        ["register", f"--{ODD}"],
        ["register", "-f", "a", "-m", "b", "-o", "o", "--task", ODD],
        [
            "register",
            *("-f", "a", "-m", "b", "-o", "o", "--task", "lung"),
            "--case",
            ODD,
        ],
        ["register", "-f", "a", "-m", "b", "-o", ODD, "--task", "lung"],
        ["batch", ODD, "-o", "o"],
        ["batch", "a", "-o", "o", "--workers", ODD],
        ["warp", "-f", ODD, "-m", ODD, "-t", ODD, "-o", f"{ODD}.nii.gz"],
        ["convert", "-t", f"{ODD}.h5", "--to", "itk", "-o", f"{ODD}.h5"],
        ["check-transform", ODD],
        ["report", ODD],
        ["evaluate", "--manifest", ODD],
        ["weights", "verify", f"{ODD}.safetensors"],
        [ODD],
    ],
)
def test_odd_words_are_spelled_out_on_the_terminal(
    words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    assert code not in (0, 1), told.err
    assert "\x1b" not in told.err + told.out and "\u202e" not in told.err + told.out


def test_list_with_odd_words_is_refused_in_plain_text(tmp_path, capsys):
    for row in (
        {"id": ODD, "fixed": "a.nii", "moving": "b.nii"},
        {"id": "a", "fixed": f"../{ODD}", "moving": f"~{ODD}"},
        {"id": "a", "fixed": "a.nii", "moving": "b.nii", "task": ODD, ODD: "c"},
    ):
        proof.write_list(tmp_path / f"{ODD[:9]}.csv", [row])
        words = ["batch", str(tmp_path / f"{ODD[:9]}.csv"), "-o", str(tmp_path / "o")]
        assert cli.main(words) == errors.USAGE
        told = capsys.readouterr().err
        assert "\x1b" not in told and "\u202e" not in told


@pytest.mark.parametrize("column", ["id", "image", "task", "subject", "split", ODD])
def test_odd_words_are_spelled_out_by_the_data_commands(
    column, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    row = {"id": "a", "image": "a.nii", "task": "lung", "subject": "p"}
    row |= {"split": "train", column: ODD}
    proof.write_list(tmp_path / "list.csv", [row])
    for module, more in (
        (check, []),
        (preview, ["--out", ODD.replace("<", "")]),
        (prepare, ["--out", "o", "--shape", "32,16,16", "--spacing", "12"]),
    ):
        for given in (["--manifest", "list.csv"], ["--manifest", ODD]):
            try:
                code = module.main([*given, *more])
            except SystemExit as stop:
                code = stop.code
            told = capsys.readouterr()
            assert code not in (0, 1), told.err
            assert "\x1b" not in told.err + told.out
            assert "\u202e" not in told.err + told.out


def test_tables_of_a_batch_hold_no_formula(run, left, capsys):
    """Ids may begin with a plus; the page has them back as they were."""
    for name in ("batch.csv", "failed.csv"):
        with open(run.out / name, newline="") as file:
            table = list(csv.reader(file))
        assert "'+cut" in [row[0] for row in table]
        for row in table:
            for cell in row:
                assert not cell.startswith(("=", "+", "@")), cell
                assert not cell.startswith("-") or float(cell) < 0
    assert cli.main(["report", str(left), "--json", "--overwrite"]) == 0
    listed = json.loads(capsys.readouterr().out)["cases"]
    assert "+cut" in {row["case"] for row in listed}


def test_tables_are_written_in_one_place():
    """Elsewhere only numbers, words of ours, and the names of a user's own points."""
    found = {
        str(path.relative_to(ROOT))
        for room in ROOMS[:2]
        for path in (ROOT / room).rglob("*.py")
        if re.search(r"csv\.(Dict)?[wW]riter", path.read_text())
    }
    assert found == {
        "unireg_jax/evaluation/tables.py",
        "unireg_jax/imaging/points.py",
        "unireg_jax/verbs/sweep.py",
    }


def test_pages_of_a_batch_ask_for_nothing(left):
    assert cli.main(["report", str(left), "--quiet", "--overwrite"]) == 0
    pages = list(left.rglob("*.html"))
    assert len(pages) >= 4
    for path in pages:
        text = re.sub(r"[A-Za-z0-9+/=]{60,}", "", path.read_text())
        assert "default-src 'none'" in text and "unsafe" not in text
        assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|<iframe|<base", text)
        for source in re.findall(r"<[^>]*\bsrc=\"?([^\s>]{0,22})", text):
            assert source.startswith("data:image/png;base64,"), source


# --- the page -----------------------------------------------------------------------

_SHORT = {
    "here": "test_security.py",
    "hostile": "test_hostile_files.py",
    "limits": "test_limits.py",
    "torch": "registration/test_torch_file.py",
    "weights": "registration/test_weights.py",
    "batch": "test_cli_batch.py",
    "nifti": "imaging/test_nifti.py",
}


def _rows():
    """(what, tests) of every row of the page's tables."""
    for line in (ROOT / "docs" / "security.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and cells[1] not in ("what", "---"):
            yield cells[1], [test.strip() for test in cells[3].split(",")]


@functools.cache
def _tests_of(name):
    tree = ast.parse((ROOT / "tests" / name).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_page_names_tests_that_exist():
    rows = list(_rows())
    assert len(rows) >= 28
    for what, tests in rows:
        for test in tests:
            file, _, name = test.partition("::")
            assert name in _tests_of(_SHORT.get(file, file)), f"{what}: no {test}"


def test_every_test_of_this_file_is_on_the_page():
    named = {test for _, tests in _rows() for test in tests}
    ours = {f"here::{name}" for name in _tests_of("test_security.py")}
    ours |= {f"hostile::{name}" for name in _tests_of("test_hostile_files.py")}
    ours |= {f"limits::{name}" for name in _tests_of("test_limits.py")}
    ours = {name for name in ours if "::test_" in name and "of_the_page" not in name}
    assert ours - named == {"here::test_every_test_of_this_file_is_on_the_page"}
