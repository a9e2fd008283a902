"""The weights verbs: exit codes, one line per mistake, data alone on stdout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unireg_jax import __main__ as cli
from unireg_jax import errors
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.registration import embedding, weights
from unireg_jax.verbs import weights as verb

REPO = Path(__file__).resolve().parents[1]
SPEC = {
    "architecture": {"encoder": [4, 8]},
    "features": "none",
    "preprocess": PreprocessSpec().to_json(),
    "licence": "CC BY 4.0\n(by its authors)",
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in verb.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tiny.safetensors"
    weights.save_weights(path, {"a": {"kernel": np.ones((2, 3), np.float32)}}, SPEC)
    return path


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.safetensors"
    weights.save_weights(path, {"a": np.ones(3, np.float32)}, SPEC)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A public checkpoint, narrow."""
    torch = pytest.importorskip("torch")
    from tests import sam_twin

    path = tmp_path_factory.mktemp("public") / "SAM.pth"
    torch.save(sam_twin.state_dict_layouts(sam_twin.make_twin())["SAM"], path)
    return path


def run(capsys, *arguments):
    """Exit code, stdout and the lines of stderr."""
    try:
        code = cli.main(["weights", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


# --- convert ------------------------------------------------------------------------


def test_convert_writes_two_files_and_the_card(checkpoint, tmp_path, capsys):
    target = tmp_path / "sam.safetensors"
    words = ("--from", checkpoint, "--to", target, "--licence", "CC BY 4.0", "--json")
    code, out, lines = run(capsys, "convert", *words)
    assert code == 0
    card = json.loads(out)
    assert card == json.loads(target.with_suffix(".json").read_text())
    assert card["licence"] == "CC BY 4.0" and card["source"]["name"] == "SAM.pth"
    assert all(line.startswith("unireg: ") for line in lines)
    assert sorted(os.listdir(tmp_path)) == ["sam.json", "sam.safetensors"]
    assert run(capsys, "verify", target)[0] == 0


def test_convert_is_silent_and_does_not_guess_a_licence(checkpoint, tmp_path, capsys):
    target = tmp_path / "sam.safetensors"
    words = ("convert", "--from", checkpoint, "--to", target, "--quiet")
    assert run(capsys, *words) == (0, "", [])
    assert weights.load_weights(target)[1]["licence"].startswith("unknown")
    code, out, (line,) = run(capsys, *words)
    assert code == errors.USAGE and out == "" and "--overwrite" in line
    assert run(capsys, *words, "--overwrite") == (0, "", [])


@pytest.mark.parametrize(
    ("name", "content", "to", "code", "match"),
    [
        ("absent.pth", None, "a.safetensors", errors.CHECKPOINT, "checkpoint_missing"),
        ("a.pth", b"<html>", "a.safetensors", errors.CHECKPOINT, "a web page"),
        ("a.pth", b"\x80\x02.", "a.safetensors", errors.CHECKPOINT, "weights_only"),
        ("a.pth", b"PK\x03\x04", "a.safetensors", errors.CHECKPOINT, "torn"),
        ("a.pth", b"PK\x03\x04", "a.bin", errors.USAGE, "name_mismatch"),
        ("a.pth", b"PK\x03\x04", "no/a.safetensors", errors.STORAGE, "storage"),
    ],
)
def test_convert_mistake_is_one_line_and_leaves_nothing(
    name, content, to, code, match, tmp_path, capsys
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = os.listdir(tmp_path)
    words = ("--from", tmp_path / name, "--to", tmp_path / to, "--quiet")
    got, out, (line,) = run(capsys, "convert", *words)
    assert got == code, line
    assert out == "" and line.startswith("unireg: error: ") and match in line
    assert os.listdir(tmp_path) == before


@pytest.mark.parametrize("words", [(), ("convert",), ("convert", "--from", "a.pth")])
def test_weights_wrong_usage_is_one_line(words, capsys):
    code, out, (line,) = run(capsys, *words)
    assert code == errors.USAGE and out == "" and "--help" in line


@pytest.mark.parametrize("action", ["convert", "list", "verify"])
def test_weights_help_has_an_example(action, capsys):
    code, out, lines = run(capsys, action, "--help")
    assert code == 0 and lines == []
    assert f"example: unireg weights {action} " in out


# --- list and verify ----------------------------------------------------------------


def test_list_names_package_variables_and_files(saved, capsys, monkeypatch):
    code, out, lines = run(capsys, "list", "--json")
    assert (code, lines) == (0, [])
    packaged = sorted(file.name for file in weights.PACKAGE.glob("*.safetensors"))
    assert [row["name"] for row in json.loads(out)] == packaged
    monkeypatch.setenv(embedding.VARIABLE, str(saved))
    code, out, _ = run(capsys, "list", saved, "--json")
    *_, named, given = json.loads(out)
    assert given == {
        "name": "tiny.safetensors",
        "source": "argument",
        "used": False,
        "kind": "unireg",
        "parameters": 6,
        "licence": SPEC["licence"],
        "sha256": weights.load_weights(saved)[1]["sha256"],
    }
    assert named == given | {"source": "$UNIREG_SAM", "used": True}
    code, out, _ = run(capsys, "list", saved)
    last = out.splitlines()[-1]
    for word in ("tiny.safetensors", "6 parameters", "CC BY 4.0 (by its authors)"):
        assert word in last


def test_list_says_by_which_variable_a_file_is_named(capsys, monkeypatch):
    monkeypatch.setenv(embedding.VARIABLE, "nonsense")
    code, out, (line,) = run(capsys, "list")
    assert code == errors.CHECKPOINT and out.count("\n") == 3
    assert "$UNIREG_SAM: checkpoint_missing: weights nonsense: " in line
    assert "train" not in line


def test_list_says_which_are_used(saved, capsys, monkeypatch):
    def used():
        _, out, _ = run(capsys, "list", saved, "--json")
        return [(row["name"], row["source"]) for row in json.loads(out) if row["used"]]

    network, matcher = weights.find_weights(), embedding.find_embedding()
    assert used() == [(matcher.name, "package"), (network.name, "package")]
    monkeypatch.setenv(weights.VARIABLE, str(saved))
    assert used() == [(matcher.name, "package"), (saved.name, "$UNIREG_WEIGHTS")]
    monkeypatch.delenv(weights.VARIABLE)
    _, out, _ = run(capsys, "list")
    marked = [line for line in out.splitlines() if "used where no others" in line]
    assert [line.split()[0] for line in marked] == [matcher.name, network.name]


def test_list_and_verify_know_what_they_list(capsys, monkeypatch):
    monkeypatch.setenv(weights.VARIABLE, "unireg_heldout")
    monkeypatch.setenv(embedding.VARIABLE, "sam_lite")
    code, out, lines = run(capsys, "list", "unireg", "--json")
    assert (code, lines) == (0, [])
    named = {row["source"]: row["name"] for row in json.loads(out)}
    assert named["$UNIREG_WEIGHTS"] == "unireg_heldout.safetensors"
    assert named["$UNIREG_SAM"] == "sam_lite.safetensors"
    assert named["argument"] == "unireg.safetensors"
    for row in json.loads(out):
        code, out, _ = run(capsys, "verify", row["name"])
        assert code == 0 and out.startswith(f"ok  {row['name']}")


def test_list_shows_what_is_good_and_says_what_is_not(saved, broken, tmp_path, capsys):
    absent = tmp_path / "absent.safetensors"
    code, out, lines = run(capsys, "list", broken, saved, absent)
    assert code == errors.CHECKPOINT
    assert "tiny" in out and "broken" not in out
    assert len(lines) == 2
    assert "checkpoint_changed" in lines[0] and "checkpoint_missing" in lines[1]
    code, out, _ = run(capsys, "list", broken, "--json")
    row = json.loads(out)[-1]
    assert code == errors.CHECKPOINT and "SHA-256" in row["fault"]
    assert set(row) == {"name", "source", "used", "fault"}


def test_verify_says_ok(saved, capsys):
    code, out, lines = run(capsys, "verify", saved)
    assert (code, lines) == (0, [])
    assert out.startswith("ok  tiny.safetensors  unireg  6 parameters  ")
    code, out, _ = run(capsys, "verify", saved, "--json")
    assert code == 0 and json.loads(out)["parameters"] == 6


def test_verify_says_the_fault(saved, broken, tmp_path, capsys):
    nonfinite = tmp_path / "nan.safetensors"
    weights.save_weights(nonfinite, {"a": np.full(2, np.nan, np.float32)}, SPEC)
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes(saved.read_bytes())
    for path, reason in (
        (broken, "checkpoint_changed"),
        (nonfinite, "checkpoint_nonfinite"),
        (lone, "checkpoint_missing"),
        (tmp_path / "absent.safetensors", "checkpoint_missing"),
        (saved.with_suffix(".json"), "checkpoint_missing"),
    ):
        code, out, (line,) = run(capsys, "verify", path, "--json")
        assert code == errors.CHECKPOINT and out == ""
        assert reason in line and str(path) in line


def test_verify_shows_a_card_of_odd_types_in_one_line(tmp_path, capsys):
    path = tmp_path / "odd.safetensors"
    odd = {**SPEC, "kind": 7, "licence": {"a": ["\x1b[2J"]}}
    weights.save_weights(path, {"params": np.ones(3, np.float32)}, odd)
    code, out, _ = run(capsys, "verify", path)
    assert code == 0 and out.count("\n") == 1 and "\x1b" not in out


def test_variables_are_those_of_the_registration_room():
    assert tuple(verb.VARIABLES) == (weights.VARIABLE, embedding.VARIABLE)


# --- as a process -------------------------------------------------------------------


def test_weights_verbs_import_neither_jax_nor_torch(saved, tmp_path):
    source = tmp_path / "a.pth"
    source.write_bytes(b"PK\x03\x04")
    convert = [
        "convert",
        "--from",
        str(source),
        "--to",
        str(tmp_path / "b.safetensors"),
    ]
    code = (
        "import sys\nfrom unireg_jax.__main__ import main\n"
        f"assert main(['weights', *{convert!r}]) == 9\n"
        f"assert main(['weights', 'list', {str(saved)!r}]) == 0\n"
        f"assert main(['weights', 'verify', {str(saved)!r}]) == 0\n"
        "assert not {'jax', 'torch', 'flax'} & set(sys.modules)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
