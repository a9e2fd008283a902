"""Pages of docs/ do what they say: their Python runs, their commands are accepted.

The examples of a page run in order, in one namespace and in one folder that holds a
made pair: fixed and moving scans, labels, points, and the files that `register` writes.
To add a page, name it in PAGES; ```python fences are executed, and in ```sh fences each
line that begins with `unireg`.
"""

import contextlib
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from tests import test_cli_transforms as made
from unireg_jax import __main__ as cli
from unireg_jax.imaging import mapping, transforms
from unireg_jax.imaging.mapping import Mapping

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("transforms.md", "evaluation.md", "control.md")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


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
    transforms.write_field(tmp_path / "case_residual.nii.gz", *field)
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


def examples(page, kind):
    """(number of the line, text) of each fence of one kind."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [
        (text[: found.start(2)].count("\n") + 1, found[2])
        for found in FENCE.finditer(text)
        if found[1] == kind
    ]


@pytest.mark.parametrize("page", PAGES)
def test_python_of_the_page_runs(pair, page):
    fences = examples(page, "python")
    assert fences, f"docs/{page} has no example"
    namespace: dict = {}
    for line, code in fences:
        # Blank lines before it: an error names the line of the page.
        compiled = compile("\n" * (line - 1) + code, f"docs/{page}", "exec")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compiled, namespace)


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_page_are_done(pair, page, capsys):
    for first, text in examples(page, "sh"):
        for n, line in enumerate(text.splitlines()):
            if line.startswith("unireg "):
                code = cli.main(shlex.split(line, comments=True)[1:])
                complaint = capsys.readouterr().err
                assert code == 0, f"docs/{page}:{first + n}: {line}\n{complaint}"


@pytest.mark.parametrize("page", PAGES)
def test_tests_and_pages_that_the_page_names_exist(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for name in re.findall(r"tests/[\w/]+\.py", text):
        assert (DOCS.parent / name).is_file(), name
    sources = [p.read_text(encoding="utf-8") for p in DOCS.parent.glob("tests/**/*.py")]
    for name in re.findall(r"::(test_\w+)", text):
        assert any(f"def {name}(" in source for source in sources), name
    for name in re.findall(r"\]\(([\w./]+\.md)\)", text):
        assert (DOCS / name).is_file(), name
