"""Commands that choose: sweep, doctor, --task auto, --fov, --device, kinds of scans."""

import csv
import importlib.util
import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import SimpleITK as sitk

from data_pipeline import synthetic
from tests import dicom_files
from tests.test_cli import (
    command,
    process,
    refused,
    save_network,
    write,
    write_pair,
)
from unireg_jax import __main__ as cli
from unireg_jax import errors
from unireg_jax.errors import UserError
from unireg_jax.evaluation import metrics
from unireg_jax.imaging import mapping, nifti
from unireg_jax.registration import devices, selftest, sweeps, tiles
from unireg_jax.registration.compiled import compile_register
from unireg_jax.registration.network import load_model
from unireg_jax.registration.pipeline import as_volume, register
from unireg_jax.tasks import PairType, Region
from unireg_jax.verbs import results
from unireg_jax.verbs import sweep as sweep_verb


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("scans"))


def swept(scans, network, *more):
    pair = ["--fixed", scans["fixed"], "--moving", scans["moving"]]
    labels = ["--fixed-label", scans["fixed_label"]]
    labels += ["--moving-label", scans["moving_label"]]
    arguments = ["sweep", *pair, *labels, "--weights", network, "--affine", "com"]
    return [*arguments, "--quiet", *more]


# --- sweep --------------------------------------------------------------------------


@pytest.mark.parametrize("dsc", [{}, {"dsc": 0.5}])
def test_legend_of_the_plot_hides_no_point(dsc):
    rows = [
        {"region": None, "type": None, "ncc_after": 0.1, "fold_percent_network": 0.0}
        | dsc
    ]
    for region, pair_type in sweeps.CONDITIONS:
        names = {"region": region.name.lower(), "type": pair_type.name.lower()}
        rows.append(names | {"ncc_after": 0.3, "fold_percent_network": 0.2} | dsc)
    figure = sweep_verb.chart(rows)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.texts) == len(sweeps.CONDITIONS)
    for axes in figure.axes:
        assert axes.get_legend() is None
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_sweep_rows_are_what_register_finds(scans, network, tmp_path, capsys):
    picture = tmp_path / "sweep.png"
    assert cli.main(swept(scans, network, "--plot", str(picture), "--json")) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == ""
    rows = found["rows"]
    assert [row["region"] for row in rows[1::2]] == [r.name.lower() for r in Region]
    assert rows[0]["region"] is None and rows[0]["ncc_after"] == rows[0]["ncc_before"]
    assert {row["task"] for row in rows} == {*results.TASKS, None}
    # Every condition has a field of its own, so that none can stand for another.
    assert len({round(row["max_mm_network"], 1) for row in rows[1:]}) == 8
    fixed, moving = (nifti.read_image(scans[n]) for n in ("fixed", "moving"))
    for row in (rows[2], rows[7]):
        task = {"headneck": "headneck", "liver": "liver"}[row["region"]]
        one = register(
            fixed,
            moving,
            task=task,
            pair_type=row["type"],
            weights=network,
            affine="com",
        )
        for name in (
            "ncc_before",
            "ncc_after",
            "fold_percent_network",
            "sdlogj_network",
            "max_mm_network",
        ):
            # The heads of a sweep run side by side: another order of sums.
            assert row[name] == pytest.approx(one.qc[name], rel=1e-3, abs=1e-4), name
        labels = (nifti.read_labels(scans[f"{n}_label"]) for n in ("fixed", "moving"))
        fixed_label, moving_label = labels
        onto = one.network_grid
        # Of its own grid: by way of the scan's one nearest labels change, by 5e-3.
        disp_mm = one.network_disp @ onto.vox2world[:3, :3].T
        field = mapping.Field(disp_mm, onto.vox2world)
        there = mapping.Mapping((field, one.affine))
        judged = {"": mapping.resample(there, moving_label, onto, interp="nearest")}
        on_grid = mapping.resample(
            mapping.Mapping(()), fixed_label, onto, interp="nearest"
        )
        mine = nifti.Volume(np.asarray(on_grid), onto.vox2world)
        scores = metrics.overlap(mine, moving_label, judged, surface=False)
        assert row["dsc"] == pytest.approx(scores["mean"]["dsc"], abs=1e-3)
        assert abs(row["dsc"] - rows[0]["dsc"]) > 4e-3  # no displacement
    assert all(0.3 < row["dsc"] <= 1 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_sweep_prints_a_table_and_nothing_else(scans, network, capsys):
    assert cli.main(swept(scans, network)) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(table) == 9
    assert tuple(table[0]) == sweep_verb.COLUMNS
    assert table[0]["region"] == "" and table[3]["task"] == "chest"
    assert all(float(row["ncc_after"]) <= 1 for row in table)


def test_sweep_runs_the_backbone_once(network, monkeypatch):
    model = load_model(network)
    traces = []
    encode = type(model.module).encode

    def counted(self, *args):
        traces.append(1)
        return encode(self, *args)

    monkeypatch.setattr(type(model.module), "encode", counted)
    jax.clear_caches()
    compile_register(model, conditions=len(sweeps.CONDITIONS))
    assert len(traces) == 1


def test_sweep_api_takes_arrays_and_some_conditions(network):
    made = synthetic.phantom("chest", shape=(40, 32, 36), spacing_mm=(9, 9, 9), seed=2)
    common = dict(fixed_vox2world=made.vox2world, moving_vox2world=made.vox2world)
    found = sweeps.sweep(
        made.hu,
        made.hu,
        conditions=[(Region.CHEST, PairType.INTRA)],
        weights=network,
        affine="none",
        **common,
    )
    assert len(found.rows) == 2 and found.disp.shape[0] == 1
    assert found.rows[1]["task"] == "lung"
    assert found.settings["seen"]["moving"]["region"] == "chest"
    with pytest.raises(ValueError, match="which adds a field"):
        sweeps.sweep(made.hu, made.hu, weights=network, affine="coarse", **common)
    with pytest.raises(ValueError, match="at least one"):
        sweeps.sweep(made.hu, made.hu, conditions=[], weights=network, **common)


def test_sweep_takes_a_mask_on_the_axes_of_an_array(network):
    shape = (40, 32, 36)
    fixed, moving = (
        synthetic.phantom("chest", shape=shape, spacing_mm=(9, 9, 9), seed=seed)
        for seed in (2, 3)
    )
    mask = np.zeros(shape, bool)
    mask[6:18, 4:20] = True
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[:2, 3] = shape[0] - 1, shape[1] - 1
    found = [
        sweeps.sweep(
            fixed.hu[::step, ::step],
            moving.hu,
            fixed_mask=mask[::step, ::step],
            conditions=[(Region.CHEST, PairType.INTER)],
            weights=network,
            affine="none",
            fixed_vox2world=fixed.vox2world @ turn,
            moving_vox2world=moving.vox2world,
        )
        for step, turn in ((1, np.eye(4)), (-1, flip))
    ]
    assert found[0].rows == found[1].rows


def test_sweep_refuses_a_picture_before_any_work(
    scans, network, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("unireg_jax.registration.sweep", lambda *_, **__: pytest.fail())
    there = tmp_path / "there.png"
    there.write_bytes(b"mine")
    line = refused(capsys, swept(scans, network, "--plot", str(there)), errors.USAGE)
    assert "--overwrite" in line and there.read_bytes() == b"mine"
    other = str(tmp_path / "sweep.svg")
    assert ".png" in refused(capsys, swept(scans, network, "--plot", other), 2)
    lost = str(tmp_path / "absent" / "x.png")
    line = refused(capsys, swept(scans, network, "--plot", lost), errors.STORAGE)
    assert "a folder that exists" in line
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n: None if n == "matplotlib" else find(n)
    )
    fresh = str(tmp_path / "fresh.png")
    line = refused(capsys, swept(scans, network, "--plot", fresh), errors.USAGE)
    assert "not_installed" in line and "unireg-jax[report]" in line


# --- doctor -------------------------------------------------------------------------


def test_doctor_tells_a_whole_installation_from_a_broken_one(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("UNIREG_CACHE", str(tmp_path / "cache"))
    assert cli.main(["doctor", "--quick", "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["healthy"] and captured.err == ""
    checks = {check["name"]: check for check in found["checks"]}
    assert {"versions", "weights", "embedding", "devices", "memory"} < set(checks)
    assert checks["devices"]["used"]["platform"] == jax.default_backend()
    assert "test registration" not in checks
    # A network on features of an embedding that is nowhere.
    alone = tmp_path / "alone.safetensors"
    save_network(alone)
    card = json.loads(alone.with_suffix(".json").read_text())
    broken = ["doctor", "--quick", "--weights", str(alone)]
    monkeypatch.setenv("UNIREG_SAM", "")
    for named in ({}, {"embedding": {"name": "eyes.safetensors", "sha256": "0" * 64}}):
        sam = card | {"features": "sam"} | named
        alone.with_suffix(".json").write_text(json.dumps(sam))
        assert cli.main(broken) == errors.PARTLY
        assert "broken: features" in capsys.readouterr().err
    # Files that are whole, and of the other kind.
    for variable, value, name in (
        ("UNIREG_SAM", "unireg", "embedding"),
        ("UNIREG_WEIGHTS", "sam_lite", "weights"),
    ):
        monkeypatch.setenv(variable, value)
        assert cli.main(["doctor", "--quick", "--json", "--quiet"]) == errors.PARTLY
        checks = json.loads(capsys.readouterr().out)["checks"]
        (bad,) = (check for check in checks if check["status"] == "broken")
        assert (bad["name"], bad["reason"]) == (name, "checkpoint_other")
        monkeypatch.delenv(variable)
    spoiled = tmp_path / "spoiled.safetensors"
    save_network(spoiled)
    spoiled.write_bytes(spoiled.read_bytes()[:-9])
    broken = ["doctor", "--quick", "--weights", str(spoiled)]
    assert cli.main(broken) == errors.PARTLY
    captured = capsys.readouterr()
    assert "broken: weights" in captured.err
    assert captured.out.count("\nbroken ") + captured.out.startswith("broken ") == 1


@pytest.mark.parametrize("fault", [RuntimeError("no cuda"), AssertionError()])
def test_doctor_tells_where_jax_cannot_start(fault, capsys, monkeypatch):
    def fail(*args):
        raise fault

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", fail)
    assert cli.main(["doctor", "--json", "--quiet"]) == errors.PARTLY
    checks = json.loads(capsys.readouterr().out)["checks"]
    (bad,) = (check for check in checks if check["status"] == "broken")
    assert (bad["name"], bad["reason"]) == ("devices", "device")
    assert "JAX_PLATFORMS is cuda; unset it" in bad["told"]


@pytest.mark.parametrize("named", ["absent", ""])
def test_doctor_tells_of_a_cache_that_is_not_there(tmp_path, named):
    """Of $JAX_COMPILATION_CACHE_DIR; JAX makes it when it first compiles."""
    folder = str(tmp_path / named) if named else ""
    done = subprocess.run(
        [sys.executable, "-m", "unireg_jax", "doctor", "--quick", "--json"],
        env=os.environ
        | {"JAX_COMPILATION_CACHE_DIR": folder, "UNIREG_CACHE": str(tmp_path / "own")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (check,) = (
        check
        for check in json.loads(done.stdout)["checks"]
        if check["name"] == "compilation cache"
    )
    assert ("when JAX first compiles" in check["told"]) == bool(named)


def test_with_stderr_closed_stdout_holds_data_alone(tmp_path):
    shell = 'exec "$0" -m unireg_jax doctor --quick --json 2>&-'
    done = subprocess.run(
        ["sh", "-c", shell, sys.executable], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and json.loads(done.stdout)
    # print(file=None) would write there.
    code = "from unireg_jax.errors import on_terminal, tell; tell('x'); on_terminal()"
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_doctor_names_the_extra_that_is_absent(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n: None if n == "pydicom" else find(n)
    )
    assert cli.main(["doctor", "--quick", "--quiet"]) == 0
    assert "pip install unireg-jax[dicom]" in capsys.readouterr().out


@pytest.mark.slow
def test_self_test_passes_and_would_fail(network, monkeypatch):
    model = load_model(save_calm(network))
    found = selftest.self_test(model)
    assert found["passed"] and found["error_mm"] < 2.5
    # The body moved further than what is compared with.
    monkeypatch.setattr(selftest, "SHIFT_MM", (14.0, -10.0, 60.0))
    still = selftest.torso()
    monkeypatch.setattr(selftest, "torso", lambda shift=None: still)
    assert not selftest.self_test(model)["passed"]


def save_calm(path):
    """The same network with a field near zero."""
    return save_network(path.replace("tiny", "calm"), scale=1.0)


# --- register: region, windows, devices ----------------------------------------------


def test_register_names_the_task_it_found(tmp_path, network, capsys):
    chest, abdomen = (
        synthetic.phantom(task, shape=(48, 36, 40), spacing_mm=(8, 8, 8), seed=1)
        for task in ("chest", "abdomen")
    )
    paths = {
        name: write(tmp_path / f"{name}.nii.gz", made.hu, made.vox2world)
        for name, made in (("fixed", chest), ("moving", chest), ("other", abdomen))
    }
    found = command(paths, tmp_path / "out", network, "--json", "--affine", "none")
    found[found.index("lung")] = "auto"
    assert cli.main([*found, "--fov", "crop"]) == 0
    captured = capsys.readouterr()
    settings = json.loads(captured.out)["settings"]
    assert (settings["task"], settings["task_asked"]) == ("chest", "auto")
    assert (settings["fov"], settings["windows"]) == ("crop", 1)
    assert "task: auto: chest, inter-patient" in captured.err
    found[found.index("auto")] = "headneck"
    assert cli.main([*found, "--overwrite"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["status"] == "warn"
    assert any("headneck expected, looks like chest" in w for w in record["warnings"])
    differ = command(paths | {"moving": paths["other"]}, tmp_path / "d", network)
    differ[differ.index("lung")] = "auto"
    line = refused(capsys, [*differ, "--quiet"], errors.USAGE)
    assert "task_unknown" in line and "--task chest or --task abdomen" in line


def test_register_weighs_smoothness_by_either_name(scans, tmp_path, network, capsys):
    plans = []
    for name, option in (("a", "--reg-weight"), ("b", "--io-smoothness")):
        more = ["--io-iterations", "2", option, "1.5", "--case", name, "--json"]
        assert cli.main(command(scans, tmp_path, network, *more, "--quiet")) == 0
        plans.append(json.loads(capsys.readouterr().out)["settings"]["refine"])
    assert plans[0] == plans[1] and plans[0]["smoothness"] == 1.5
    alone = command(scans, tmp_path, network, "--case", "c", "--reg-weight", "1")
    assert "--io-iterations" in refused(capsys, alone, errors.USAGE)


def test_register_takes_passes_of_the_network(scans, tmp_path, network, capsys):
    found = {}
    for name, more in {
        "one": ("--passes", "1", "--no-symmetric"),
        "two": ("--passes", "2", "--symmetric"),
    }.items():
        line = command(scans, tmp_path, network, *more, "--case", name, "--json")
        assert cli.main(line) == 0
        captured = capsys.readouterr()
        record = json.loads(captured.out)
        settings = record["settings"]
        asked = settings["passes"], settings["symmetric"]
        found[name] = asked, record["qc"]["max_mm_network"], record["settings_sha256"]
        assert ("2 passes, both ways" in captured.err) == (name == "two")
    assert found["one"][0] == (1, False) and found["two"][0] == (2, True)
    assert len({row[1] for row in found.values()}) == 2
    assert len({row[2] for row in found.values()}) == 2
    line = command(scans, tmp_path, network, "--passes", "2", "--case", "c")
    line[line.index("lung")] = "none"
    assert "need a network" in refused(capsys, line, errors.USAGE)
    for wrong in ("0", "9", "x"):
        line = command(scans, tmp_path, network, "--passes", wrong, "--case", "c")
        assert "--passes" in refused(capsys, line, errors.USAGE)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU is there")
def test_register_refuses_a_gpu_that_is_not_there(scans, tmp_path, network, capsys):
    asked = command(scans, tmp_path, network, "--device", "gpu", "--quiet")
    line = refused(capsys, asked, errors.USAGE)
    assert "device: --device gpu" in line and "--allow-cpu" in line
    assert list(tmp_path.iterdir()) == []
    asked += ["--allow-cpu", "--json"]
    try:
        assert cli.main(asked) == 0
    finally:
        jax.config.update("jax_default_device", None)
    assert json.loads(capsys.readouterr().out)["device"]["platform"] == "cpu"


def test_use_device_takes_what_is_asked():
    try:
        assert devices.use_device("auto").endswith(":0")
        assert devices.use_device("cpu") == "cpu:0"
        assert devices.default_device().platform == "cpu"
        with pytest.raises(UserError, match="gpu:7"):
            devices.use_device("gpu:7")
        for name in ("tpu", "gpu:", "gpu:x", "cpu:1"):
            with pytest.raises(ValueError, match="auto, cpu, gpu or gpu:N"):
                devices.use_device(name)
    finally:
        jax.config.update("jax_default_device", None)


@pytest.mark.parametrize("name", ["tpu", "gpu:", "gpu:1x", "cuda"])
def test_device_names_are_checked_before_any_work(scans, tmp_path, capsys, name):
    asked = command(scans, tmp_path, "absent", "--device", name)
    assert "gpu:N expected" in refused(capsys, asked, errors.USAGE)


def test_choices_are_those_of_the_windows():
    assert results.FOVS == tiles.FOVS


# --- register: kinds of scans --------------------------------------------------------


def test_register_reads_every_kind_alike(scans, tmp_path, network, capsys):
    """NIfTI, MetaImage and NRRD of one pair give one field, on the stored grid."""
    kinds = {}
    for ending in (".nii.gz", ".mha", ".nrrd"):
        folder = tmp_path / ending.strip(".")
        folder.mkdir()
        paths = dict(scans)
        for name in ("fixed", "moving", "fixed_label", "moving_label"):
            paths[name] = str(folder / f"{name}{ending}")
            sitk.WriteImage(sitk.ReadImage(scans[name]), paths[name])
        more = ["--fixed-label", paths["fixed_label"], "--affine", "com", "--quiet"]
        more += ["--moving-label", paths["moving_label"], "--json"]
        assert cli.main(command(paths, folder / "out", network, *more)) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["case"] == "fixed__moving"
        assert record["inputs"]["fixed"]["name"] == f"fixed{ending}"
        case = folder / "out" / "fixed__moving"
        warped = sitk.ReadImage(str(case / "fixed__moving_warped.nii.gz"))
        field = sitk.ReadImage(str(case / "fixed__moving_1Warp.nii.gz"))
        kinds[ending] = warped, field, record["scores"]["mean"]["dsc"]
    first = kinds.pop(".nii.gz")
    for warped, field, dsc in kinds.values():
        assert warped.GetSize() == first[0].GetSize()
        np.testing.assert_allclose(warped.GetDirection(), first[0].GetDirection())
        # Geometry in float64 against NIfTI's float32.
        fields = [sitk.GetArrayViewFromImage(f) for f in (field, first[1])]
        np.testing.assert_allclose(*fields, atol=5e-3)
        assert dsc == pytest.approx(first[2], abs=1e-3)


def test_register_reads_dicom_series(tmp_path, network, capsys):
    hu = synthetic.phantom("chest", shape=(36, 30, 32), spacing_mm=(9, 9, 9)).hu
    paths = {}
    for name, shift in (("fixed", 0.0), ("moving", 9.0)):
        paths[name] = str(tmp_path / name)
        dicom_files.write_series(
            tmp_path / name,
            hu,
            first_mm=(shift, 0.0, 0.0),
            spacing_mm=(9.0, 9.0, 9.0),
            series=f"1.{len(name)}",
        )
    more = ["--json", "--quiet", "--affine", "none"]
    assert cli.main(command(paths, tmp_path / "out", network, *more)) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["inputs"]["fixed"]["files"] == 32
    assert record["inputs"]["fixed"]["name"] == "fixed"
    out = tmp_path / "out" / "fixed__moving" / "fixed__moving_warped.nii.gz"
    assert nifti.read_image(out).data.shape == hu.shape


def test_register_without_an_extra_says_which(
    scans, tmp_path, network, capsys, monkeypatch
):
    (tmp_path / "in").mkdir()
    fixed = str(tmp_path / "in" / "fixed.nrrd")
    sitk.WriteImage(sitk.ReadImage(scans["fixed"]), fixed)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n: None if n == "SimpleITK" else find(n)
    )
    asked = command(scans | {"fixed": fixed}, tmp_path / "out", network)
    line = refused(capsys, asked, errors.USAGE)
    assert "not_installed" in line and "unireg-jax[itk]" in line
    assert not (tmp_path / "out").exists()


def test_as_volume_is_what_register_takes(scans):
    volume = nifti.read_image(scans["fixed"])
    assert as_volume(volume, None, "fixed") is volume
    with pytest.raises(ValueError, match="the file has its own"):
        as_volume(volume, np.eye(4), "fixed")


def test_help_of_the_verbs_shows_an_example_and_imports_no_jax():
    code = (
        "import sys\nfrom unireg_jax.__main__ import main\n"
        "for verb in ('register', 'batch', 'sweep', 'doctor'):\n"
        "    try:\n        main([verb, '--help'])\n"
        "    except SystemExit as stop:\n        assert stop.code == 0\n"
        "assert 'jax' not in sys.modules\n"
    )
    run = process("-c", code)
    assert run.returncode == 0, run.stderr
    for verb in ("register", "sweep", "doctor"):
        assert f"\n  unireg {verb}" in run.stdout, verb


def test_register_takes_another_pair_type(scans, tmp_path, network, capsys):
    found = {}
    for name, more in (("own", ()), ("other", ("--type", "inter"))):
        more = (*more, "--affine", "none", "--case", name, "--json", "--quiet")
        assert cli.main(command(scans, tmp_path, network, *more)) == 0
        found[name] = json.loads(capsys.readouterr().out)
    kinds = {name: record["settings"]["pair_type"] for name, record in found.items()}
    assert kinds == {"own": "intra", "other": "inter"}
    assert len({record["settings_sha256"] for record in found.values()}) == 2


@pytest.mark.parametrize("passed", [True, False])
def test_doctor_ends_in_5_where_the_test_registration_is_wrong(
    network, capsys, monkeypatch, passed
):
    found = {"error_mm": 9.0, "expected_mm": 5.0, "passed": passed, "seconds": 1.0}
    monkeypatch.setattr(selftest, "self_test", lambda model: dict(found))
    code = cli.main(["doctor", "--weights", network, "--json", "--quiet"])
    report = json.loads(capsys.readouterr().out)
    (check,) = (c for c in report["checks"] if c["name"] == "test registration")
    assert check["status"] == ("ok" if passed else "broken")
    assert (code, report["healthy"]) == (
        (0, True) if passed else (errors.PARTLY, False)
    )
