"""ConfigDict -> data: what two runs share."""

from types import SimpleNamespace

import pytest
from jax.sharding import AbstractMesh

from data_pipeline import store
from experiments import build, unireg
from unireg_jax.errors import USAGE, UserError


def test_phantoms_are_made_by_one_run_at_a_time(tmp_path):
    """Two first runs of one work folder: the second leaves before it writes."""
    config = unireg.get_config("demo")
    with config.unlocked():
        config.data.shape, config.data.phantoms = (32, 16, 16), 4
    phantoms = store.make_folders(tmp_path / "phantoms")
    with (
        store.lock(phantoms),
        pytest.raises(UserError, match="phantoms: another run is writing") as error,
    ):
        build.build(config, tmp_path)
    assert error.value.exit_code == USAGE
    assert not (phantoms / store.INDEX_NAME).exists()


def test_more_devices_than_pairs_are_refused(monkeypatch):
    eight = AbstractMesh((8, 1), ("data", "space"))
    monkeypatch.setattr(build.mesh, "make_mesh", lambda *, space: eight)
    config = unireg.get_config("demo")
    config.data.batch_size = 8
    pairs = [SimpleNamespace(task=task) for task in ("lung",) * 7 + ("chest",)]
    dataset = SimpleNamespace(root="folder", pairs=lambda split: pairs)
    experiment = SimpleNamespace(dataset=dataset, weights={"lung": 1.0})
    with pytest.raises(UserError, match=r"as devices.*\(8\) expected, got 7") as error:
        build.devices(config, experiment)
    assert error.value.exit_code == USAGE
    experiment.weights["chest"] = 1.0
    assert build.devices(config, experiment) == (eight, 8)


def test_volumes_that_devices_cannot_share_are_refused(monkeypatch):
    three = AbstractMesh((1, 3), ("data", "space"))
    monkeypatch.setattr(build.mesh, "make_mesh", lambda *, space: three)
    config = unireg.get_config("demo")
    config.data.shape = (128, 128, 112)
    config.train.space_devices = 3
    with pytest.raises(UserError, match=r"shape\[0\] = 128.*expected, got 3") as error:
        build.devices(config, None)
    assert error.value.exit_code == USAGE
