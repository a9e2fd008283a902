"""README and docs/ do what they say: their Python runs, their commands are accepted.

The examples of a page run in order, in one namespace and in one folder that holds a
made pair: fixed and moving scans, labels, points, and the files that `register` writes.
```python fences are executed, and in ```sh fences each line that begins with `unireg`;
of all other commands the options are parsed.
"""

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from experiments import unireg
from tests import test_cli_transforms as made
from tests.registration import test_pipeline
from unireg_jax import __main__ as cli
from unireg_jax.imaging import mapping, transforms
from unireg_jax.imaging.mapping import Mapping

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
# A language or none; the fence may be indented within a list.
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Working folder with the files that the pages name."""
    g = made.FIXED
    residual = Mapping((mapping.Field(made.shift(made.positions(g)), g.vox2world),))
    whole = mapping.compose([residual, mapping.affine(made.matrix())])
    there = mapping.points(whole, made.positions(g))
    for name, values, place in (
        ("fixed", made.hu(there), g.vox2world),
        ("moving", made.hu(made.positions(made.MOVING)), made.MOVING.vox2world),
    ):
        whole_hu = np.rint(values).astype(np.int16)
        made.save(tmp_path / f"{name}.nii.gz", whole_hu, place)
        labels = (values > -300).astype(np.uint8) + 2 * (values > 150).astype(np.uint8)
        made.save(tmp_path / f"{name}_seg.nii.gz", labels, place)
    (field,) = residual.parts
    mapping.write(tmp_path / "to_atlas.h5", residual)
    mapping.write(tmp_path / "atlas_to_moving.h5", mapping.affine(made.matrix()))
    transforms.write_affine_txt(tmp_path / "case_0GenericAffine.txt", made.matrix())
    transforms.write_composite(tmp_path / "case_Composite.h5", made.matrix(), *field)
    mapping.write(tmp_path / "case_1Warp.nii.gz", whole)
    (tmp_path / "points.csv").write_text("name,x,y,z\na,8,-160,710\nb,20,-140,700\n")
    (tmp_path / "voxels.csv").write_text("x,y,z\n12,14,9\n3,20,11\n")
    (tmp_path / "cases.csv").write_text(
        "id,transform,fixed_label,moving_label\n"
        "a,case_1Warp.nii.gz,fixed_seg.nii.gz,moving_seg.nii.gz\n"
    )
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def walk(pair, tmp_path, monkeypatch):
    """What the README's own examples name besides; a network that compiles at once."""
    monkeypatch.setenv("UNIREG_WEIGHTS", str(test_pipeline.saved(tmp_path)))
    (tmp_path / "fixed_points.csv").write_text("name,x,y,z\na,8,-160,710\n")
    hu = np.zeros(test_pipeline.SPEC.shape, np.int16)
    return {
        "paths": ["moving.nii.gz", "absent.nii.gz"],
        "write": lambda pair, result, fixed, moving: result.qc["ncc_after"],
        "fixed_hu": hu,
        "moving_hu": hu,
        "regions": np.arange(8) % 4,
        "pair_types": np.arange(8) % 2,
    }


def examples(page, *kinds):
    """(number of the line, text) of each fence of these kinds, "" for one of none."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: found.start(2)].count("\n") + 1, found[2])
        for found in FENCE.finditer(text)
        if found[1] in kinds
    ]


def python(page, namespace):
    """Runs a page's Python."""
    for line, code in examples(page, "python"):
        # Blank lines before it: an error names the line of the page.
        compiled = compile("\n" * (line - 1) + code, page.name, "exec")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compiled, namespace)


def do(page, fences, capsys):
    """Runs the `unireg` lines of fences; returns how many there were."""
    done = 0
    for first, text in fences:
        for n, line in enumerate(text.splitlines(), first):
            if line.startswith("unireg "):
                code = cli.main(shlex.split(line, comments=True)[1:])
                complaint = capsys.readouterr().err
                assert code == 0, f"{page.name}:{n}: {line}\n{complaint}"
                done += 1
    return done


def of(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


@of([page for page in PAGES[1:] if examples(page, "python")])
def test_python_of_the_page_runs(pair, page):
    python(page, {})


@of([page for page in PAGES[1:] if examples(page, "sh")])
def test_commands_of_the_page_are_done(pair, page, capsys):
    assert do(page, examples(page, "sh"), capsys)


def test_examples_of_the_readme_run(walk, capsys):
    """The first registration, by commands and by Python."""
    (first,) = [x for x in examples(README, "") if "-o OUT" in x[1]]
    assert do(README, [first], capsys) == 4
    assert Path("OUT/pair/qc.html").is_file()
    python(README, walk)
    assert walk["seg"].GetSize() == walk["fixed"].GetSize()
    assert walk["outcome"].error.reason == "not_found"
    assert walk["disp"].shape == (8, *test_pipeline.SPEC.shape, 3)


def commands(program):
    """(page, words, whole) of blocks and of code within a line, maybe a part."""
    for page in PAGES:
        blocks = [text for _, text in examples(page, "", "sh", "text")]
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        inline = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
        for text in (*map(str.strip, lines), *inline):
            text = text.removeprefix("srun ")
            if text.startswith(f"{program} "):
                whole = text not in inline and not re.search("[$…]", text)
                yield page.name, shlex.split(text, comments=True), whole


@functools.cache
def options(verb):
    """All words of a verb's parsers that begin with --."""
    parser = argparse.ArgumentParser()
    module = importlib.import_module(f"unireg_jax.verbs.{verb.replace('-', '_')}")
    module.add_arguments(parser)
    found, parsers = set(), [parser]
    for parser in parsers:
        for action in parser._actions:
            found.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return found


def test_unireg_commands_of_the_pages_are_real():
    shown = set()
    for page, words, whole in commands("unireg"):
        verb, *rest = itertools.takewhile(lambda x: x not in (">", "|"), words[1:])
        assert verb in cli.VERBS, (page, words)
        for option in (x.partition("=")[0] for x in rest if x.startswith("--")):
            assert option in options(verb), (page, words)
        if whole:
            cli._parse([verb, *rest])  # argparse exits on what it does not know
            shown.add(verb)
    assert shown >= {*cli.VERBS} - {"info", "export"}


def test_commands_that_go_on_can_be_pasted():
    """A line of options continues one that ends in a backslash; the tests join them."""
    read = {
        (page, word)
        for program in ("unireg", "python -m")
        for page, words, _ in commands(program)
        for word in words
    }
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for fence in FENCE.finditer(text):
            first = text[: fence.start(2)].count("\n") + 1
            lines = ["", *fence[2].splitlines()]
            for n, (before, line) in enumerate(itertools.pairwise(lines), first):
                # A list of YAML goes on after a comma.
                if not re.match(r"\s*--\w", line) or before.endswith(","):
                    continue
                told = f"{page.name}:{n}: the line before must end in a backslash"
                assert before.endswith("\\"), told
                words = shlex.split(line.rstrip("\\"), comments=True)
                assert {(page.name, word) for word in words} <= read, (page, n)


def test_python_commands_of_the_pages_are_real():
    for page, (_, _, name, *rest), _ in commands("python -m"):
        if name in ("unireg_jax", "pytest"):
            continue
        module = ROOT / (name.replace(".", "/") + ".py")
        assert module.is_file(), (page, name)
        # Some flags are shared by the scripts of a room.
        source = "".join(p.read_text() for p in module.parent.glob("*.py"))
        for flag in (x for x in rest if x.startswith("--")):
            name = flag[2:].split("=")[0].split(".")[0]
            known = rf'"(--)?{name}"|\b{name}=\('  # the faults' flags are keywords
            assert re.search(known, source), (page, flag)
    for preset in ("paper", "real_small", "demo"):
        assert unireg.get_config(preset).preset == preset


@of(PAGES)
def test_tests_and_pages_that_the_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"tests/[\w/]+\.py", text):
        assert (ROOT / name).is_file(), name
    sources = [p.read_text(encoding="utf-8") for p in ROOT.glob("tests/**/*.py")]
    for name in re.findall(r"::(test_\w+)", text):
        assert any(f"def {name}(" in source for source in sources), name
    for name, anchor in re.findall(r"\]\(([\w./]*\.md)?(#[\w-]+)?\)", text):
        target = page.parent / name if name else page
        assert target.is_file(), name
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
        assert anchor[1:] in ("", *map(anchored, titles)), (name, anchor)


def anchored(title):
    """A heading's anchor on GitHub."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
