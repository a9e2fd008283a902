"""The paper's tables: figures of validation, a row per task and weights, refusals."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from data_pipeline import loader, store, synthetic
from experiments import build, tables, train, unireg
from unireg_jax import registration
from unireg_jax.errors import CHECKPOINT, NOTHING, USAGE, UserError
from unireg_jax.models.conditioning import dynamic
from unireg_jax.registration import weights as released
from unireg_jax.registration.network import initializer
from unireg_jax.tasks import PairType, Region
from unireg_jax.training import evaluate, step
from unireg_jax.training import mesh as train_mesh

SHAPE = (32, 16, 32)
TASKS = ("headneck", "lung")


@pytest.fixture(scope="module", autouse=True)
def _one_form():
    """XLA's own convolution compiles in a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "conv_impl", lambda: "direct")
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepared folder: `val` has 2 pairs of headneck and 4 of lung, without labels."""
    root = synthetic.write_dataset(
        tmp_path_factory.mktemp("prepared"),
        shape=SHAPE,
        spacing_mm=12.0,
        subjects_per_task=4,
        tasks=TASKS,
    )
    index = store.read_index(root)
    for volume in index["volumes"]:
        if volume["task"] == "lung":
            volume["labels"] = None
    store.write_index(root, index)
    return root


def _config(root, conditioner):
    config = unireg.get_config("demo")
    with config.unlocked():
        config.data.root, config.data.shape = str(root), SHAPE
        config.data.spacing_mm = 12.0
        config.model.conditioner = conditioner
        config.model.update(
            {"encoder": (4, 4, 4, 4), "decoder": (4, 4, 4, 4), "remaining": (4,)}
        )
        config.data.weights.headneck = 1.0
        config.train.update({"eval_pairs": 9, "init_from": ""})
    return config.lock()


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """Conditioner -> file of weights whose field is some voxels, and its experiment."""
    folder, found = tmp_path_factory.mktemp("weights"), {}
    for name in ("dynamic", "static"):
        config = _config(prepared, name)
        experiment = build.build(config, folder)
        params = jax.jit(initializer(experiment.model))(jax.random.key(0))
        last = slice(dynamic.NUM_WEIGHTS - 3 * dynamic.HIDDEN, dynamic.NUM_WEIGHTS)
        if name == "dynamic":
            controller = params["head"]["controller"]
            controller["bias"] = controller["bias"].at[last].multiply(3e4)
            kernel = controller["kernel"]  # zero, so that nothing is conditioned yet
            controller["kernel"] = jax.random.normal(jax.random.key(1), kernel.shape)
        else:
            omega = params["head"]["kernels"]
            params["head"]["kernels"] = omega.at[last].multiply(3e4)
        path = folder / f"{name}.safetensors"
        training = {"training": {"steps": 7}}
        released.save_weights(path, params, experiment.spec | training)
        found[name] = (path, config, experiment)
    return found


@pytest.fixture(scope="module")
def results(prepared, trained):
    names = [str(path) for path, *_ in trained.values()]
    found = tables.measure(prepared, names, split="val", conditions=True)
    assert [*found] == names
    return dict(zip(trained, found.values(), strict=True))


def test_figures_are_those_of_validation(trained, results):
    path, config, experiment = trained["dynamic"]
    mesh = train_mesh.make_mesh(jax.devices()[:1])
    judge = train._judge(config, experiment, mesh)
    params = registration.load_model(path).params
    scalars = judge(params, lambda: None, brief=False).scalars
    found = results["dynamic"]["tasks"]
    assert [*found] == [*TASKS] and [t["pairs"] for t in found.values()] == [2, 4]
    for task in TASKS:
        for key in ("mean_dsc", "mean_dsc_before", *evaluate.PER_PAIR):
            told, wanted = found[task][key], scalars[f"val/{key}/{task}"]
            if math.isnan(wanted):
                assert told is None and task == "lung", key
            else:
                # One program for one device, one for a mesh: float32.
                assert told == pytest.approx(wanted, rel=1e-4), (task, key)
        for label, told in found[task]["dsc"].items():
            wanted = scalars[f"val/dsc/{task}/{label}"]
            assert told == (None if math.isnan(wanted) else pytest.approx(wanted))
    here = found["headneck"]
    assert abs(here["mean_dsc"] - here["mean_dsc_before"]) > 0.01  # there is a field
    assert here["sdlogj"] > 0.01 and 0 <= here["better"] <= 2


def test_pairs_without_overlap_are_not_counted_as_no_better():
    rows = [
        {"mean_dsc": after, "mean_dsc_before": before}
        for after, before in ((0.6, 0.5), (0.4, 0.5), (math.nan, math.nan))
    ]
    assert tables._better(rows) == {"judged": 2, "better": 1}
    lost = dict.fromkeys(("mean_dsc", "sdlogj", "folding_fraction"))
    assert tables._told(lost) == ("–", "–", "–")


def test_condition_is_that_which_the_pairs_are_asked_under(prepared, trained, results):
    path, *_ = trained["dynamic"]
    model = registration.load_model(path)
    dataset = loader.Dataset(prepared)
    batches = (
        (
            pair,
            batch._replace(
                region=np.array([Region.LIVER], np.int32),
                pair_type=np.array([PairType.INTRA], np.int32),
            ),
        )
        for pair, batch in loader.make_eval_batches(dataset, "val", tasks=["headneck"])
    )
    eval_step = step.make_eval_step(
        lambda params, *args: build.apply(model.module, params, *args), num_labels=8
    )
    rows = evaluate.evaluate(eval_step, model.params, model.extractor, batches)
    wanted = evaluate.summarize(rows)["headneck"]
    here = results["dynamic"]["tasks"]["headneck"]
    asked = here["conditions"]["liver, intra"]
    assert asked["ncc"] == pytest.approx(wanted["ncc"], rel=1e-4)
    assert asked["mean_dsc"] == pytest.approx(wanted["mean_dsc"], rel=1e-4)
    assert abs(asked["ncc"] - here["ncc"]) > 1e-4
    # The right one is the plain row; lung is chest within one patient.
    for task, right in (("headneck", "headneck, inter"), ("lung", "chest, intra")):
        own = results["dynamic"]["tasks"][task]
        assert len(own["conditions"]) == 8
        assert own["conditions"][right].items() <= own.items()
    static = results["static"]["tasks"]["headneck"]["conditions"].values()
    assert len({row["ncc"] for row in static}) == 1  # it heeds no condition


def test_tables_have_a_row_per_task_and_weights(results):
    head, rule, *rows = tables.table(results).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (head, *rows)]
    assert {len(row) for row in cells} == {9} and rule.count("---") == 9
    assert [row[:4] for row in cells[1:]] == [
        ["headneck", "2", "7", "dynamic"],
        ["headneck", "2", "7", "static"],
        ["lung", "4", "0", "dynamic"],
        ["lung", "4", "0", "static"],
    ]
    here = results["static"]["tasks"]["headneck"]
    assert cells[2][4:] == [
        f"{100 * here['mean_dsc_before']:.2f}",
        f"{100 * here['mean_dsc']:.2f}",
        f"{here['better']} of 2",
        f"{here['sdlogj']:.2f}",
        f"{100 * here['folding_fraction']:.2f}",
    ]
    assert cells[3][4:7] == ["–", "–", "–"]  # no labels, no overlap
    _, _, *networks = tables.table_of_networks(results).splitlines()
    assert networks[0].startswith("| dynamic | mind | dynamic | 7 | 0.0")
    assert networks[1].endswith("at 32×16×32 |")


def test_table_of_conditions_has_the_right_one_in_bold(results):
    tasks = results["dynamic"]["tasks"]
    head, _, *rows = tables.table_of_conditions(tasks).splitlines()
    assert [task in head for task in TASKS] == [True, True] and len(rows) == 8
    bold = [row for row in rows if "**" in row]
    assert [row.split(" |")[0] for row in bold] == [
        "| headneck, inter",
        "| chest, intra",
    ]
    own = tasks["headneck"]
    assert f"| **{100 * own['mean_dsc']:.2f}, {own['sdlogj']:.2f}, " in bold[0]
    assert "| **–, " in bold[1] and all(row.count("**") == 2 for row in bold)


def test_size_is_that_of_the_network(trained, results):
    for name, (path, *_) in trained.items():
        params, _ = released.load_weights(path)
        count = sum(p.size for p in jax.tree.leaves(params))
        assert results[name]["parameters"] == count
    # The first two convolutions of the decoder's end alone, 3 x 3 x 3 at half the grid.
    assert results["dynamic"]["macs"] > 2 * 27 * 4 * 4 * math.prod(SHAPE) / 8
    packaged = tables.describe(registration.load_model("unireg_heldout"))
    assert packaged["parameters"] == 306_973 and packaged["head"] == "dynamic"
    assert round(packaged["macs"] / 1e9, 1) == 11.8


def test_report_is_strict_json_of_the_pairs_asked_for(
    prepared, trained, monkeypatch, capsys
):
    path, *_ = trained["static"]
    options = {"data": str(prepared), "weights": [str(path)], "split": "val"}
    options |= {"pairs": 1, "conditions": False, "json": True}
    monkeypatch.setattr(tables.cli, "setup", lambda: None)
    monkeypatch.setattr(tables.flags, "FLAGS", SimpleNamespace(**options))
    tables.main([])
    out, err = capsys.readouterr()
    report = json.loads(out, parse_constant=pytest.fail)
    assert report["split"] == "val"
    found = report["weights"][str(path)]["tasks"]
    assert [found[task]["pairs"] for task in TASKS] == [1, 1]
    assert found["lung"]["mean_dsc"] is None and "conditions" not in found["lung"]
    # Nobody aligned these pairs: the first column is not of an affine.
    assert "no align.json" in err and "experiments.prealign --data=" in err


def test_what_does_not_fit_is_refused(prepared, trained, tmp_path):
    path, *_ = trained["static"]
    for options, match, code in (
        ({"split": "test"}, "split test: no pairs", NOTHING),
        ({"split": "all"}, "split: one of train, val, test", USAGE),
        ({"names": [path, "no_such_name"]}, "no such file", CHECKPOINT),
        ({"names": [path, "unireg_heldout"]}, r"weights unireg_heldout, \(32,", USAGE),
        ({"root": tmp_path}, "no prepared data", NOTHING),
    ):
        given = {"root": prepared, "names": [path], "split": "val"} | options
        with pytest.raises(UserError, match=match) as error:
            tables.measure(given.pop("root"), given.pop("names"), **given)
        assert error.value.exit_code == code, options
    # As many voxels, of another size.
    spec = trained["static"][2].spec
    preprocess = spec["preprocess"] | {"spacing_mm": [12.0, 12.0, 10.0]}
    params = registration.load_model(path).params
    other = tmp_path / "other.safetensors"
    released.save_weights(other, params, spec | {"preprocess": preprocess})
    with pytest.raises(
        UserError, match=r"\(12.0, 12.0, 10.0\) mm expected by"
    ) as error:
        tables.measure(prepared, [other], split="val")
    assert error.value.reason == "grid_mismatch"


def test_command_tells_a_mistake_in_one_line(prepared):
    root = Path(__file__).resolve().parents[2]
    words = [f"--data={prepared}", "--weights=unireg_heldout", "--split=all"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.tables", *words],
        cwd=root,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == USAGE and done.stdout == ""
    assert done.stderr.startswith("error: schema: flags: ")
    assert "train|val|test" in done.stderr and done.stderr.count("\n") == 1
