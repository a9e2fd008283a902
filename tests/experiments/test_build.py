"""ConfigDict -> data: what two runs share."""

import pytest

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
