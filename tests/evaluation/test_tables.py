"""CSV without formulas, strict JSON, LaTeX that compiles."""

import csv
import io
import json
import math

import numpy as np
import pytest

from unireg_jax.evaluation import results, tables

NASTY = ["=1+1", "+a", "-a", "@SUM(A1)", "'=x", "''@", "a,b", 'q"q', "ü"]


def read(text):
    return list(csv.reader(io.StringIO(text)))


def test_csv_has_no_cell_that_is_a_formula():
    text = tables.csv_text(["id", "n"], [{"id": cell, "n": -1.5} for cell in NASTY])
    rows = read(text)[1:]
    for (cell, number), given in zip(rows, NASTY, strict=True):
        assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
        assert tables.unescape(cell) == given
        assert float(number) == -1.5


def test_csv_cells_are_one_line():
    text = tables.csv_text(["id"], [{"id": "\t=a\r\n b\nc"}])
    assert text == "id\n'=a b c\n"


def test_csv_guards_its_header():
    assert tables.csv_text(["=cmd"], []) == "'=cmd\n"


def test_csv_numbers_are_whole_and_undefined_ones_empty():
    row = {"a": 0.1 + 0.2, "b": math.nan, "c": None, "d": np.float32(0.5), "e": True}
    text = tables.csv_text("abcdef", [row])
    assert text.splitlines()[1] == "0.30000000000000004,,,0.5,true,"


def test_json_is_strict():
    value = {"a": math.nan, 3: [np.float32("inf"), np.int64(2)], "c": {"d": -math.inf}}
    text = tables.json_text(value)

    def refuse(word):
        raise AssertionError(word)

    found = json.loads(text, parse_constant=refuse)
    assert found == {"a": None, "3": [None, 2], "c": {"d": None}}


def test_latex_text_has_no_command():
    text = tables.latex_text("a_1 & 50% #2 $x$ {y} \\z ~ ^\n<b>")
    assert text == (
        r"a\_1 \& 50\% \#2 \$x\$ \{y\} \textbackslash{}z \textasciitilde{} "
        r"\textasciicircum{} \textless{}b\textgreater{}"
    )


def test_latex_spread():
    assert tables.latex_spread(0.5, 0.25) == r"$0.500 \pm 0.250$"
    assert tables.latex_spread(0.5, math.nan) == "$0.500$"
    assert tables.latex_spread(None, None) == "--"


def test_tables_without_a_line_have_their_header():
    assert results.label_csv([]) == "id,label\n"
    assert results.case_csv([]) == "id,status\n"


# --- tables read again --------------------------------------------------------------


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_read_scores_takes_what_is_a_number(tmp_path):
    text = "\ufeffid,status,dsc,tre_mm,note\na,ok,0.5,,x\n'=b,failed,,2e0,\n"
    found = results.read_scores(write(tmp_path / "a.csv", text))
    assert found.labels == ("",)
    assert set(found.columns) == {"dsc", "tre_mm"}
    assert found.columns["dsc"]["a", ""] == 0.5
    assert math.isnan(found.columns["dsc"]["=b", ""])
    assert found.columns["tre_mm"]["=b", ""] == 2.0


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "empty"),
        ("name,dsc\na,1\n", "a column id"),
        ("id,dsc,dsc\na,1,1\n", "no column twice"),
        ("id,dsc\na,1,2\n", "2 cells a line, got 3 in line 2"),
        ("id,dsc\n", "one case or more"),
        ("id,dsc\na,1\na,2\n", "every case once"),
        ("id,dsc\na,x\n", "a column of numbers"),
        ("id,dsc\na,inf\n", "a column of numbers"),
        ("id,hd95_mm,dsc\na,9,1\nb,inf,1\n", "in column hd95_mm, got inf in line 3"),
        ("id,hd95_mm,dsc\na,lost,1\nb,9,1\n", "in column hd95_mm, got lost in line 2"),
    ],
)
def test_read_scores_refuses(text, match, tmp_path):
    with pytest.raises(results.UserError, match=match):
        results.read_scores(write(tmp_path / "a.csv", text))


def scores(rows):
    return {("p" + str(i), ""): value for i, value in enumerate(rows)}


def test_compare_scores_of_cases():
    better = np.linspace(0.8, 0.9, 8)
    methods = {"x_1": scores(better), "y": scores(better - 0.1), "z": scores(better)}
    found = results.compare_scores(methods, "dsc")
    assert found["better"] == "higher"
    assert [t["significant"] for t in found["tests"]] == [True, False, True]
    assert found["tests"][0]["p_holm"] == pytest.approx(2 * 2 / 2**8)
    assert [m["n"] for m in found["methods"]] == [8, 8, 8]
    latex = results.comparison_latex([found])
    lines = {line.split(" & ")[0]: line for line in latex.splitlines() if " & " in line}
    assert "^{*}" in lines["y"] and "^{*}" not in lines["z"]
    assert r"x\_1" in lines
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 1
    head, *rows = read(results.comparison_csv([found]))
    assert len(rows) == 3 and head[:4] == ["metric", "label", "a", "b"]
    assert "*" in results.comparison_text([found])


def test_compare_scores_of_labels_are_one_family():
    rng = np.random.default_rng(0)
    methods = {
        name: {(str(i), label): rng.normal() for i in range(9) for label in ("1", "2")}
        for name in ("a", "b")
    }
    found = results.compare_scores(methods, "hd95_mm")
    assert [t["label"] for t in found["tests"]] == ["1", "2"]
    p = sorted(t["p"] for t in found["tests"])
    corrected = sorted(t["p_holm"] for t in found["tests"])
    assert corrected == pytest.approx([min(1, 2 * p[0]), max(2 * p[0], p[1])])
    assert "method & 1 & 2" in results.comparison_latex([found])
