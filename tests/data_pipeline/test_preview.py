"""Pictures of a data set: the right way round, and harmless whatever an id holds."""

import html.parser
import io
import json
import shutil

import numpy as np
import pytest
from matplotlib import image as mpl_image

from data_pipeline import preview, store, synthetic
from data_pipeline.datasets import manifest
from unireg_jax.errors import FAILED, NOTHING, PARTLY, PREEMPTED, STORAGE, USAGE
from unireg_jax.imaging import nifti, orientation

HOSTILE = "<script>alert(1)</script>\"'&$\\frac{x}\n日"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    synthetic.write_dataset(
        root,
        tasks=("chest", "liver"),
        subjects_per_task=2,
        shape=(24, 20, 18),
        spacing_mm=(16.0, 17.0, 18.0),
    )
    return root


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return synthetic.write_nifti(
        tmp_path_factory.mktemp("raw"),
        tasks=("chest",),
        subjects_per_task=2,
        shape=(24, 20, 18),
        spacing_mm=(16.0, 17.0, 18.0),
    )


class _Page(html.parser.HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [v for k, v in attributes if k in ("src", "href")]
        assert not any(k.startswith("on") for k, _ in attributes)

    def handle_data(self, data):
        self.text += data


def test_prepared_data_become_sheets_and_a_page(prepared, tmp_path, capsys):
    options = ["--data", str(prepared), "--out", str(tmp_path), "--workers", "1"]
    assert preview.main(options) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "chest.png",
        "liver.png",
        "index.html",
    }
    assert "chest.png, liver.png, index.html" in capsys.readouterr().out
    sheet = mpl_image.imread(tmp_path / "chest.png")
    assert sheet.shape[1] > 1500 and sheet.std() > 0.1
    page = _Page((tmp_path / "index.html").read_text())
    count = len(store.read_index(prepared)["volumes"])
    assert len(page.links) == count
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert f"{count} scans" in page.text and synthetic.CHEST_LABELS[0] in page.text


def test_manifest_gives_the_same_names(raw, tmp_path):
    options = ["--manifest", str(raw), "--out", str(tmp_path), "--workers", "2"]
    assert preview.main(options) == 0
    assert synthetic.CHEST_LABELS[0] in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("codes", ["LPS", "RAI", "SAR"])
def test_pictures_show_the_patient_from_feet_and_front(tmp_path, codes):
    """Bright at the left, dark at the back, a label at the head."""
    hu = np.zeros((40, 32, 24), np.int16)
    hu[30:] = 500  # patient's left
    hu[:, 24:] = -400  # back
    labels = np.zeros(hu.shape, np.uint8)
    labels[15:25, 10:20, 18:22] = 1  # towards the head
    world = np.diag([5.0, 6.0, 7.0, 1.0])
    for array, name in ((hu, "a"), (labels, "a_label")):
        turned, affine = orientation.reorient(array, world, codes)
        nifti.write_volume(tmp_path / f"{name}.nii.gz", turned, affine)
    (tmp_path / "map.json").write_text('{"1": "liver"}')
    row = dict(id="a", image="a.nii.gz", label="a_label.nii.gz", label_map="map.json")
    row |= dict(task="abdomen", subject="p", split="train")
    (tmp_path / "m.json").write_text(json.dumps([row]))
    (job,) = preview.jobs_of_records(manifest.collect(tmp_path / "m.json").records)
    drawing = preview.draw(job)
    assert drawing.problem == "" and drawing.shown == (0,)
    axial, coronal, sagittal = (t.astype(int) for t in drawing.tiles)
    for tile in (axial, coronal):  # the patient's left is at the right
        assert tile[:, -20:].mean() > tile[:, :20].mean() + 50
    assert axial[-20:].mean() < axial[:20].mean() - 50  # front up, back down
    assert sagittal[:, -20:].mean() < sagittal[:, :20].mean() - 50  # front left
    for tile in (coronal, sagittal):  # the outline is in the upper half
        rows = np.nonzero(np.ptp(tile, axis=2).any(axis=1))[0]
        assert rows.max() < tile.shape[0] / 2
    # True proportions: 200 x 192 x 168 mm.
    assert axial.shape[0] / axial.shape[1] == pytest.approx(192 / 200, abs=0.01)
    assert coronal.shape[0] / coronal.shape[1] == pytest.approx(168 / 200, abs=0.01)


def test_hostile_names_stay_text(prepared, tmp_path):
    root = shutil.copytree(prepared, tmp_path / "data")
    index = store.read_index(root)
    index["volumes"][0].update(id=HOSTILE, subject=HOSTILE)
    index["tasks"]["chest"]["labels"][0] = HOSTILE
    store.write_index(root, index)
    drawings, _ = preview.preview(preview.jobs_of_prepared(root), tmp_path / "out")
    assert all(not drawing.problem for drawing in drawings)
    text = (tmp_path / "out" / "index.html").read_text()
    page = _Page(text)
    assert "script" not in page.tags and "<script" not in text
    assert page.text.count("<script>alert(1)</script>") == 3
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "default-src 'none'" in text


def test_scan_that_cannot_be_drawn_is_named_beside_the_others(raw, tmp_path, capsys):
    folder = shutil.copytree(raw.parent, tmp_path / "raw")
    records = manifest.collect(folder / raw.name).records
    (folder / records[0].image).write_bytes(b"<html>")
    options = ["--manifest", str(folder / raw.name), "--out", str(tmp_path / "out")]
    assert preview.main([*options, "--workers", "1"]) == PARTLY
    told = capsys.readouterr().err
    text = (tmp_path / "out" / "index.html").read_text()
    for content in (told, text):
        assert "not_nifti: expected a NIfTI file, got an HTML page" in content
        assert str(tmp_path) not in content
    for record in records[1:]:
        (folder / record.image).write_bytes(b"")
    assert preview.main([*options, "--workers", "1"]) == FAILED


def test_many_scans_are_thinned_out_and_paged(prepared, tmp_path):
    (job, *_) = preview.jobs_of_prepared(prepared)
    jobs = [job._replace(id=f"s{i:02}") for i in range(60)]
    drawings, names = preview.preview(jobs, tmp_path, most=15)
    assert [d.job.id for d in drawings][:3] == ["s00", "s04", "s08"]
    assert names == ["chest.png", "chest_2.png", "index.html"]
    assert "45 more were left out" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "out_of_memory: "),
        (OSError(5, "Input/output error", "/secret"), "storage: Input/output error"),
        (KeyError("x"), "internal: KeyError: 'x'"),
    ],
)
def test_what_escapes_costs_one_scan(prepared, tmp_path, monkeypatch, error, told):
    jobs = preview.jobs_of_prepared(prepared)
    plain = preview._load

    def fail(job):
        if job == jobs[1]:
            raise error
        return plain(job)

    monkeypatch.setattr(preview, "_load", fail)
    options = ["--data", str(prepared), "--out", str(tmp_path), "--workers", "1"]
    assert preview.main(options) == PARTLY
    page = _Page((tmp_path / "index.html").read_text())
    assert len(page.links) == len(jobs) - 1
    assert told in page.text and "/secret" not in page.text


@pytest.mark.parametrize(
    "more", [["--task", "chest"], ["--raw", "r"], ["--data-root", "r"]]
)
def test_options_of_raw_scans_do_not_go_with_prepared_ones(
    prepared, tmp_path, more, capsys
):
    options = ["--data", str(prepared), "--out", str(tmp_path / "out"), *more]
    assert preview.main(options) == USAGE
    assert "are for raw scans" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_outlines_are_borders_of_the_label():
    labels = np.zeros((7, 9), np.uint8)
    labels[2:6, 3:8] = 2
    edges = preview._edges(labels)
    assert edges[2:6, 3:8].min() == 0 and (edges[3:5, 4:7] == 0).all()
    assert edges[2, 3] == 2 and edges[1].max() == 0


def test_without_matplotlib_one_line_names_the_extra(
    prepared, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(preview, "Figure", None)
    options = ["--data", str(prepared), "--out", str(tmp_path / "out")]
    assert preview.main(options) == USAGE
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "not_installed" in told
    assert "pip install unireg-jax[report]" in told
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line(prepared, tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]
    assert preview.main(["--data", str(tmp_path), *out]) == NOTHING
    assert preview.main(["--manifest", str(tmp_path / "no.csv"), *out]) == USAGE
    (tmp_path / "file").write_text("")
    file = ["--out", str(tmp_path / "file"), "--workers", "1"]
    assert preview.main(["--data", str(prepared), *file]) == USAGE
    index = {**store.read_index(prepared), "volumes": []}
    store.write_index(store.make_folders(tmp_path / "none"), index)
    assert preview.main(["--data", str(tmp_path / "none"), *out]) == NOTHING
    assert len(capsys.readouterr().err.splitlines()) == 4
    with pytest.raises(SystemExit) as caught:
        preview.main(out)
    assert caught.value.code == USAGE

    def stop(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(preview, "draw", stop)
    assert preview.main(["--data", str(prepared), *out]) == PREEMPTED


def test_full_disk_is_a_storage_fault(prepared, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nifti.os, "fsync", full)
    options = ["--data", str(prepared), "--out", str(tmp_path), "--workers", "1"]
    assert preview.main(options) == STORAGE
    assert list(tmp_path.iterdir()) == []


def test_real_scan_is_drawn(data_root, tmp_path):
    folder = data_root / "chest_lidc0001"
    if not folder.is_dir():
        pytest.skip("no chest scan among the real scans")
    row = dict(
        id="lidc",
        image=str(folder / "ct.nii.gz"),
        label=str(folder / "labels_totalseg.nii.gz"),
        label_map=str(folder / "labels.json"),
        task="chest",
        subject="p",
        split="train",
    )
    (tmp_path / "m.json").write_text(json.dumps([row]))
    records = manifest.collect(tmp_path / "m.json", roots=[data_root]).records
    jobs = preview.jobs_of_records(records)
    drawings, names = preview.preview(jobs, tmp_path / "out")
    assert len(drawings[0].shown) > 60 and names == ["chest.png", "index.html"]
    picture = mpl_image.imread(io.BytesIO((tmp_path / "out/chest.png").read_bytes()))
    assert picture.shape[2] == 4
