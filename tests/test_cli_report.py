"""`unireg report`, `--html`, `--qc-gate` and `--inverse-consistency`."""

import json
import os
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.test_cli import command, save_network, write_pair
from unireg_jax import __main__ as cli
from unireg_jax import errors, registration
from unireg_jax.evaluation import quality
from unireg_jax.imaging import nifti
from unireg_jax.reports import case as told
from unireg_jax.reports import index
from unireg_jax.verbs import batch, judging, sweep

CASE = "fixed__moving"


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory, network):
    """A case with labels, registered both ways; its folder and its scans."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "in").mkdir()
    paths = write_pair(folder / "in")
    for name in ("fixed", "moving"):
        image = nib.load(paths[name])
        data, header = np.asarray(image.dataobj), image.header
        header["descrip"] = "DOE^JOHN"
        nib.save(nib.Nifti1Image(data, image.affine, header), paths[name])
    labels = [
        *("--fixed-label", paths["fixed_label"]),
        *("--moving-label", paths["moving_label"]),
    ]
    argv = command(paths, folder / "out", network, *labels, "--inverse-consistency")
    assert cli.main([*argv, "--html", "--quiet"]) == 0
    return folder / "out", paths


@pytest.fixture
def out(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "out")
    return tmp_path / "out"


def record(out, case=CASE):
    return json.loads((out / case / f"{case}_run.json").read_text())


def scans(paths):
    return ["--fixed", paths["fixed"], "--moving", paths["moving"]]


def test_register_records_quality_of_the_written_map(made):
    out, _ = made
    found = record(out)
    numbers = found["quality"]
    assert numbers["coverage"] > 0.9 and 0 < numbers["local_ncc"] <= 1
    assert numbers["inverse_mm"] < numbers["inverse_p95_mm"]
    assert set(numbers["volume_change"]) == {"1", "3"}
    factors = [max(c, 1 / c) for c in numbers["volume_change"].values()]
    assert numbers["volume_factor"] == pytest.approx(max(factors))
    mean = found["scores"]["mean"]
    assert numbers["dsc_gain"] == pytest.approx(mean["dsc"] - mean["dsc_affine"])
    expected = quality.judge(
        {k: v for k, v in numbers.items() if not isinstance(v, dict)}, told.kind(found)
    )
    assert [f.line for f in expected] == [
        w for w in found["warnings"] if w.split(":")[0] in {f.reason for f in expected}
    ]


def test_the_way_back_is_a_registration_of_its_own(made, network):
    out, paths = made
    fixed, moving = (nifti.read_image(paths[k]) for k in ("fixed", "moving"))
    there, back = (
        registration.register(*pair, task="lung", weights=network)
        for pair in ((fixed, moving), (moving, fixed))
    )
    expected = quality.inverse_consistency(fixed, there.disp_mm, moving, back.disp_mm)
    found = record(out)["quality"]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    still = quality.inverse_consistency(
        fixed, there.disp_mm, moving, np.zeros_like(back.disp_mm)
    )
    assert abs(still["inverse_mm"] - expected["inverse_mm"]) > 1.0


def test_register_compares_where_the_mask_says(made, network, tmp_path):
    out, paths = made
    image = nib.load(paths["fixed_label"])
    mask = (np.asarray(image.dataobj) == 1).astype(np.uint8)
    nib.save(nib.Nifti1Image(mask, image.affine), tmp_path / "mask.nii.gz")
    argv = command(paths, tmp_path / "out", network, "--affine", "none", "--quiet")
    plain, masked = ("--case", "a"), ("--case", "b")
    assert cli.main([*argv, *plain]) == 0
    given = ("--fixed-mask", str(tmp_path / "mask.nii.gz"))
    assert cli.main([*argv, *masked, *given]) == 0
    found = {name: record(tmp_path / "out", name) for name in ("a", "b")}
    fields = [
        nib.load(tmp_path / "out" / name / f"{name}_1Warp.nii.gz").get_fdata()
        for name in found
    ]
    # The network does not look at it: only judges do.
    np.testing.assert_array_equal(*fields)
    for part, name in (("qc", "ncc_after"), ("quality", "local_ncc")):
        assert found["a"][part][name] != found["b"][part][name], name
    assert "fixed_mask" not in found["a"]["inputs"]
    assert found["b"]["inputs"]["fixed_mask"]["name"] == "mask.nii.gz"
    # A search and instance optimisation do look at it.
    argv = [*command(paths, tmp_path / "more", network), "--quiet"]
    argv[argv.index("--io-iterations") + 1] = "3"
    assert cli.main([*argv, *plain]) == 0
    assert cli.main([*argv, *masked, *given]) == 0
    fields = [
        nib.load(tmp_path / "more" / name / f"{name}_1Warp.nii.gz").get_fdata()
        for name in found
    ]
    assert np.abs(fields[0] - fields[1]).max() > 0.1  # mm


def test_folds_and_sdlogj_are_named_by_where_they_are_counted(made, tmp_path, capsys):
    """See the glossary in docs/quality.md: no two verbs share a name for two things."""
    out, paths = made
    prefix = out / CASE / CASE

    def names(found):
        return {k for k in found if k.startswith(("fold", "sdlogj"))}

    def spelled(ending):
        return {f"fold_percent{ending}", f"sdlogj{ending}"}

    def printed(*argv):
        assert cli.main([*map(str, argv), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert names(record(out)["qc"]) == spelled("_network")
    assert names(record(out)["quality"]) == spelled("_body")
    assert names(index.COLUMNS) == names(quality.CHECKS) == spelled("_body")
    assert names(sweep.COLUMNS) == names(batch._COLUMNS) == spelled("_network")
    field, labels = f"{prefix}_1Warp.nii.gz", paths["fixed_label"]
    asked = ["jacobian", "-t", field, "-f", paths["fixed"]]
    whole, masked = printed(*asked), printed(*asked, "--mask", labels)
    assert names(whole) == spelled("_whole") and names(masked) == spelled("")
    checked = printed("check-transform", field)
    assert names(checked["parts"][0]) == {"fold_percent_whole"}
    asked = ["evaluate", "-t", field, "--fixed-label", labels]
    found = printed(*asked, "--moving-label", paths["moving_label"])["field"]
    assert names(found) == spelled("") | spelled("_whole") | {"sdlogj_l2r"}
    # The border, where only the Jacobian has one-sided differences, is smooth here.
    for name in spelled("_whole"):
        assert whole[name] == pytest.approx(found[name], abs=0.02), name
    for name in spelled(""):
        assert masked[name] == pytest.approx(found[name], abs=0.02), name
    told = (Path(__file__).parents[1] / "docs" / "quality.md").read_text()
    glossary = told.partition("## Folds and SDlogJ")[2].partition("\n## ")[0]
    for ending in ("", "_whole", "_body", "_network"):
        assert all(f"`{name}`" in glossary for name in spelled(ending))


def test_register_writes_the_page_beside_the_results(made):
    out, paths = made
    text = (out / CASE / "qc.html").read_text()
    assert "local_ncc" in text and "volume change" in text
    assert str(out) not in text and paths["fixed"] not in text
    assert "DOE^" not in text  # base64 has no such sign
    assert "qc.html" not in record(out)["outputs"]  # a view, not a result


def test_report_of_a_case_is_the_page_that_register_wrote(made, out, capsys):
    before = (out / CASE / "qc.html").read_text()
    labels = ["--fixed-label", made[1]["fixed_label"]]
    argv = ["report", str(out / CASE), *scans(made[1]), *labels, "--quiet", "--json"]
    assert cli.main(argv) == errors.USAGE  # never over a file unasked
    assert cli.main([*argv, "--overwrite"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == "qc.html" and told["case"] == CASE
    # The written image is rounded to whole HU, the field to float32: so were they.
    assert (out / CASE / "qc.html").read_text() == before


def outlined(page):
    """Layer -> labels that have a path."""
    found = re.search(r'id="outlines">(.*?)</script>', page.read_text())
    if found is None:
        return {}
    return {
        layer["name"]: {k for p in layer["planes"].values() for s in p for k in s}
        for layer in json.loads(found[1])["layers"]
    }


def test_page_outlines_the_labels_that_are_at_hand(made, out):
    """The warped ones lie beside it; those of the fixed scan have to be named."""
    folder, paths = out / CASE, made[1]
    page = folder / "qc.html"
    both = outlined(page)
    assert set(both) == {"fixed", "warped"} and {"1", "3"} <= both["fixed"]
    argv = ["report", str(folder), *scans(paths), "--overwrite", "--quiet"]
    assert cli.main(argv) == 0
    assert outlined(page) == {"warped": both["warped"]}
    (folder / f"{CASE}_warped_label.nii.gz").unlink()
    assert cli.main([*argv, "--fixed-label", paths["fixed_label"]]) == 0
    assert outlined(page) == {"fixed": both["fixed"]}
    assert cli.main(argv) == 0
    assert outlined(page) == {}


def test_register_outlines_labels_of_the_moving_scan_alone(made, tmp_path, network):
    paths = made[1]
    labels = ["--moving-label", paths["moving_label"]]
    argv = command(paths, tmp_path, network, *labels, "--html", "--quiet")
    assert cli.main(argv) == 0
    assert outlined(tmp_path / CASE / "qc.html").keys() == {"warped"}


def test_report_refuses_labels_that_do_not_belong_to_the_case(made, out, capsys):
    folder, paths = out / CASE, made[1]
    argv = ["report", str(folder), "--overwrite"]
    named = [*argv, "--fixed-label", paths["fixed_label"]]
    assert cli.main(named) == errors.USAGE
    assert "--fixed-label needs --fixed" in capsys.readouterr().err
    other = [*argv, *scans(paths), "--fixed-label", paths["moving_label"]]
    assert cli.main(other) == errors.DATA_CHANGED
    assert "has as fixed_label" in capsys.readouterr().err


def test_report_says_that_a_case_has_no_labels_of_the_fixed_scan(made, out, capsys):
    path = out / CASE / f"{CASE}_run.json"
    found = record(out)
    del found["inputs"]["fixed_label"]
    path.write_text(json.dumps(found))
    named = [*scans(made[1]), "--fixed-label", made[1]["fixed_label"], "--overwrite"]
    assert cli.main(["report", str(path.parent), *named]) == errors.USAGE
    assert "was registered without labels of the fixed" in capsys.readouterr().err


def other_values(path):
    """The same grid, other labels."""
    image = nib.load(path)
    data = np.asarray(image.dataobj)[::-1]
    nib.save(nib.Nifti1Image(data, image.affine, image.header), path)


def other_grid(path):
    image = nib.load(path)
    data = np.asarray(image.dataobj)[1:]
    nib.save(nib.Nifti1Image(data, image.affine), path)


def torn(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (other_values, "checksum"),
        (other_grid, "grid_mismatch"),
        (torn, "truncated"),
        (Path.unlink, "not_found"),
    ],
)
def test_warped_labels_are_outlined_only_as_they_were_written(
    made, out, damage, reason, capsys
):
    damage(out / CASE / f"{CASE}_warped_label.nii.gz")
    labels = ["--fixed-label", made[1]["fixed_label"]]
    argv = ["report", str(out / CASE), *scans(made[1]), *labels, "--overwrite"]
    assert cli.main([*argv, "--quiet"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("unireg: warning: ") and f"{reason}:" in line
    assert outlined(out / CASE / "qc.html").keys() == {"fixed"}


@pytest.mark.parametrize("damage", [other_values, other_grid, torn, Path.unlink])
def test_batch_has_pages_of_cases_whose_labels_are_gone(made, out, damage, capsys):
    listed = out.parent / "pairs.csv"
    columns = ("fixed", "moving", "fixed_label", "moving_label")
    names = [Path(made[1][column]).name for column in columns]
    for column in columns:
        shutil.copy(made[1][column], listed.parent)
    listed.write_text(f"id,{','.join(columns)}\n{CASE},{','.join(names)}\n")
    damage(listed.parent / names[2])
    torn(out / CASE / f"{CASE}_warped_label.nii.gz")
    argv = ["report", str(out), "--list", str(listed), "--overwrite", "--quiet"]
    assert cli.main(argv) == 0
    fixed, warped = capsys.readouterr().err.splitlines()
    assert "labels of the fixed scan are not outlined" in fixed
    assert "warped labels are not outlined" in warped
    assert outlined(out / CASE / "qc.html") == {}
    assert (out / "index.html").read_text().count("<img") == 2


def test_report_of_a_record_without_quality_measures_it(made, out):
    path = out / CASE / f"{CASE}_run.json"
    found = record(out)
    kept = found.pop("quality")
    path.write_text(json.dumps(found))
    argv = ["report", str(out / CASE), *scans(made[1]), "--quiet"]
    assert cli.main([*argv, "--out", str(out / "new.html")]) == 0
    text = (out / "new.html").read_text()
    cells = dict(re.findall(r"<td>(\w+)</td><td class=n>([-0-9.e]+)", text))
    for name in ("coverage", "local_ncc", "p99_mm"):
        assert float(cells[name]) == pytest.approx(kept[name], rel=2e-3)  # 4 digits


def test_report_refuses_other_scans(made, out, capsys):
    paths = made[1]
    argv = ["report", str(out / CASE), "--overwrite", "--fixed", paths["fixed"]]
    assert cli.main(argv) == errors.USAGE
    assert "--fixed and --moving" in capsys.readouterr().err
    argv += ["--moving", paths["fixed"]]
    assert cli.main(argv) == errors.DATA_CHANGED
    assert "digest" in capsys.readouterr().err
    assert cli.main(["report", str(out / CASE), "--overwrite"]) == errors.USAGE
    assert "holds results and no scans" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_text("{"),
        lambda p: p.write_text("[]"),
        lambda p: p.write_text('{"case": "other"}'),
        lambda p: p.write_text("[" * 100_000),
        lambda p: p.write_bytes(b"\xff\xfe"),
        lambda p: p.write_text(json.dumps({**json.loads(p.read_text()), "affine": 1})),
    ],
)
def test_report_refuses_a_damaged_record_in_one_line(made, out, damage, capsys):
    damage(out / CASE / f"{CASE}_run.json")
    argv = ["report", str(out / CASE), *scans(made[1]), "--overwrite", "--quiet"]
    assert cli.main(argv) == errors.FAILED
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "schema" in captured.err


def test_report_refuses_a_warped_image_of_another_grid(made, out, capsys):
    path = out / CASE / f"{CASE}_warped.nii.gz"
    image = nib.load(path)
    data = np.asarray(image.dataobj)[1:]
    nib.save(nib.Nifti1Image(data, image.affine), path)
    argv = ["report", str(out / CASE), *scans(made[1]), "--overwrite", "--quiet"]
    assert cli.main(argv) == errors.FAILED
    assert "grid_mismatch" in capsys.readouterr().err


def lists(out, paths):
    """`report` of the batch OUT with a list of its one case."""
    listed = out.parent / "pairs.csv"
    listed.write_text(f"id,fixed,moving\n{CASE},{paths['fixed']},{paths['moving']}\n")
    argv = ["report", str(out), "--list", str(listed), "--overwrite", "--quiet"]
    return [*argv, "--data-root", str(Path(paths["fixed"]).parent)]


@pytest.mark.parametrize("name", ["warped", "1Warp"])
def test_report_refuses_results_that_are_not_those_of_the_record(
    made, out, name, capsys
):
    other_values(out / CASE / f"{CASE}_{name}.nii.gz")
    before = (out / CASE / "qc.html").read_bytes()
    argv = ["report", str(out / CASE), *scans(made[1]), "--overwrite", "--quiet"]
    assert cli.main(argv) == errors.DATA_CHANGED
    line = capsys.readouterr().err
    assert "checksum" in line and f"{CASE}_{name}.nii.gz" in line
    assert cli.main(lists(out, made[1])) == 0
    assert "no page: checksum: " in capsys.readouterr().err
    assert (out / CASE / "qc.html").read_bytes() == before
    assert "<img" not in (out / "index.html").read_text()


def test_report_refuses_a_case_that_is_replaced_meanwhile(
    made, out, monkeypatch, capsys
):
    path, before = (
        out / CASE / f"{CASE}_run.json",
        (out / CASE / "qc.html").read_bytes(),
    )
    plain, runs = judging.page_text, iter(range(2))

    def replaced(found, drawn):
        path.write_text(json.dumps(record(out) | {"timings": next(runs)}))
        return plain(found, drawn)

    monkeypatch.setattr(judging, "page_text", replaced)
    argv = ["report", str(out / CASE), *scans(made[1]), "--overwrite", "--quiet"]
    assert cli.main(argv) == errors.DATA_CHANGED
    assert "replaced while being drawn" in capsys.readouterr().err
    assert cli.main(lists(out, made[1])) == 0
    assert "no page: checksum: " in capsys.readouterr().err
    assert (out / CASE / "qc.html").read_bytes() == before


def test_report_of_a_batch_whose_folder_is_called_rejected(made, out, capsys):
    folder = out.rename(out.with_name("rejected"))
    assert cli.main(["report", str(folder), "--json", "--quiet"]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert case["status"] == record(folder)["status"] != "failed"


def test_report_of_a_batch_lists_all_cases_and_makes_their_pages(made, out, capsys):
    paths = made[1]
    shutil.copytree(out / CASE, out / "second")
    (out / "second" / "qc.html").unlink()
    for file in (out / "second").glob(f"{CASE}_*"):
        file.rename(file.with_name(file.name.replace(CASE, "second")))
    path = out / "second" / "second_run.json"
    path.write_text(path.read_text().replace(f'"{CASE}', '"second'))
    (out / "torn").mkdir()
    (out / "torn" / "torn_run.json").write_text("{")
    for parent in (out, out / "rejected"):  # of a run at work
        shutil.copytree(out / CASE, parent / f".unireg-batch-{'0' * 32}.tmp")
    (out / "failed.csv").write_text("id,reason,message\nlost,not_found,=gone <b>\n")
    listed = out.parent / "pairs.csv"
    columns = ("fixed", "moving", "fixed_label", "moving_label")
    names = [paths[k].rsplit("/", 1)[1] for k in columns]
    listed.write_text(f"id,{','.join(columns)}\nsecond,{','.join(names)}\n")
    folder = paths["fixed"].rsplit("/", 1)[0]
    argv = ["report", str(out), "--list", str(listed), "--data-root", folder]
    for column in columns:
        shutil.copy(paths[column], listed.parent)
    assert cli.main([*argv, "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [c["case"] for c in told["cases"]][:2] == ["lost", "torn"]
    text = (out / "index.html").read_text()
    assert "=gone &lt;b&gt;" in text and "4 cases" in text
    assert set(re.findall(r'href="([^"]*)"', text)) == {
        f"{CASE}/qc.html",
        "second/qc.html",
    }
    assert text.count("<img") == 2
    # Of the worst N alone: both that can be read are as bad, the other comes first.
    (out / "second" / "qc.html").unlink()
    for pages, drawn in (("1", False), ("2", True)):
        more = ["--pages", pages, "--overwrite", "--quiet"]
        assert cli.main([*argv, *more]) == 0
        assert (out / "second" / "qc.html").is_file() == drawn, pages
    assert outlined(out / "second" / "qc.html").keys() == {"fixed", "warped"}
    assert str(out) not in text


def test_report_lists_what_failed_when_done_again_as_failed(made, out, capsys):
    table = out / "failed.csv"
    table.write_text(f"id,reason,message\n{CASE},not_found,scan gone\n")
    record = out / CASE / f"{CASE}_run.json"

    def listed():
        assert cli.main(["report", str(out), "--overwrite", "--json", "--quiet"]) == 0
        (case,) = json.loads(capsys.readouterr().out)["cases"]
        return case

    since = record.stat().st_mtime
    os.utime(table, (since + 5, since + 5))
    again = listed()
    assert again["status"] == "failed" and again["reasons"][0] == "scan gone"
    # Refused, the results of before are the ones that stay.
    row = f"{CASE},id_duplicate,id_duplicate: in the way"
    table.write_text(f"id,reason,message\n{row}\n")
    os.utime(table, (since + 5, since + 5))
    assert listed()["status"] != "failed"
    # Mended since, or told by the table of a part that is older than the whole run's.
    os.utime(table, (since - 5, since - 5))
    assert listed()["status"] != "failed"
    table.rename(out / "failed-1.csv")
    table.write_text("id,reason,message\n")
    os.utime(out / "failed-1.csv", (since + 5, since + 5))
    os.utime(table, (since + 9, since + 9))
    assert listed()["status"] != "failed"


def test_report_names_the_kinds_of_warnings_as_batch_counts_them(made, out, capsys):
    path = out / CASE / f"{CASE}_run.json"
    lines = ["fixed: hu_range: odd", "moving: hu_range: odd", "moving: padding: odd"]
    path.write_text(json.dumps(record(out) | {"status": "warn", "warnings": lines}))
    assert cli.main(["report", str(out), "--json", "--quiet"]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert case["reasons"] == ["hu_range", "padding"]


@pytest.mark.parametrize("case", [False, True])
def test_report_never_replaces_an_input(made, out, case, capsys):
    listed = out / "pairs.csv"
    listed.write_text("id,fixed,moving\na,f.nii,m.nii\n")
    fixed = out / "fixed.nii.gz"
    shutil.copy(made[1]["fixed"], fixed)
    words = [str(out), "--list", str(listed)]
    if case:
        pair = ["--fixed", str(fixed), "--moving", made[1]["moving"]]
        words = [str(out / CASE), *pair]
    path = fixed if case else listed
    before = path.read_bytes()
    argv = ["report", *words, "-o", str(path), "--overwrite"]
    assert cli.main(argv) == errors.USAGE
    assert "a name that ends in .html" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_report_of_a_folder_without_cases_has_nothing_to_do(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == errors.NOTHING
    assert cli.main(["report", str(tmp_path / "absent")]) == errors.USAGE
    assert cli.main(["report", str(tmp_path / ("o" * 300))]) == errors.USAGE
    assert "index.html" not in capsys.readouterr().err
    assert not (tmp_path / "index.html").exists()


@pytest.fixture
def apart(tmp_path):
    """The moving scan mirrored: no pair."""
    folder = tmp_path / "in"
    folder.mkdir()
    paths = write_pair(folder)
    image = nib.load(paths["moving"])
    data = np.full(image.shape, 40, np.int16)
    nib.save(nib.Nifti1Image(data, image.affine), paths["moving"])
    return paths


def test_gate_keeps_a_bad_case_apart(apart, tmp_path, network, capsys):
    out = tmp_path / "out"
    argv = command(apart, out, network, "--qc-gate", "--html", "--affine", "none")
    assert cli.main(argv) == errors.FAILED
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("unireg: error: constant") and "rejected/" in line
    assert sorted(p.name for p in out.iterdir()) == ["rejected"]
    kept = out / "rejected"
    found = record(kept)
    assert found["status"] == "failed" and found["reason"] == "constant"
    assert (kept / CASE / "qc.html").is_file()
    assert (kept / CASE / f"{CASE}_1Warp.nii.gz").is_file()
    assert cli.main(["report", str(out), "--json", "--quiet", "--overwrite"]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert case["status"] == "failed"
    # Without the gate it is a warning.
    argv.remove("--qc-gate")
    assert cli.main(argv) == 0
    assert record(out)["status"] == "warn"
    # It is in the index once.
    assert cli.main(["report", str(out), "--quiet", "--overwrite"]) == 0
    assert "1 cases: 1 to look at. " in (out / "index.html").read_text()


def test_gate_of_a_batch_fails_the_bad_case_alone(apart, tmp_path):
    folder = tmp_path / "good"
    folder.mkdir()
    good = write_pair(folder)
    # The same scan, and a network that moves nothing.
    shutil.copy(good["fixed"], good["moving"])
    shutil.copytree(tmp_path / "in", tmp_path / "bad")
    still = save_network(tmp_path / "still.safetensors", scale=0.0)
    listed = tmp_path / "pairs.csv"
    rows = [f"{n},{n}/fixed.nii.gz,{n}/moving.nii.gz" for n in ("good", "bad")]
    listed.write_text("\n".join(["id,fixed,moving", *rows]) + "\n")
    out = tmp_path / "out"
    argv = [
        *("batch", str(listed), "--out", str(out), "--task", "chest"),
        *("--weights", still, "--affine", "none", "--qc-gate", "--quiet"),
        *("--io-iterations", "0"),
    ]
    assert cli.main(argv) == errors.PARTLY
    assert record(out, "good")["status"] == "ok"
    assert not (out / "bad").exists()
    assert os.listdir(out / "rejected") == ["bad"]
    table = (out / "failed.csv").read_text()
    assert "bad,constant," in table and "good" not in table
