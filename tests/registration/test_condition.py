"""What the network is asked: region, pair type, and which scan is the fixed one.

It is replaced by a function, so that nothing depends on what its numbers make of them.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.registration import test_pipeline
from unireg_jax.imaging import preprocess
from unireg_jax.ops import warp
from unireg_jax.registration import pipeline
from unireg_jax.registration.network import load_model
from unireg_jax.tasks import TASKS, PairType

SPEC = test_pipeline.SPEC


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(test_pipeline.saved(tmp_path_factory.mktemp("weights")))


@pytest.fixture(scope="module")
def volumes():
    """A fixed and a moving scan."""
    return [
        pipeline.as_volume(image, place, "scan")
        for image, place in zip(*test_pipeline.pair(), strict=True)
    ]


def asking(model, answer, **options):
    """A session that asks `answer(fixed_hu, moving_hu)`, and the codes of each call."""
    # Without the network: its program is not needed.
    session = pipeline.Session(model, network=False, **options)
    programs, calls = session.programs, []

    class Programs:
        def __getattr__(self, name):
            return getattr(programs, name)

        def __call__(self, fixed, moving, *codes):
            calls.append(tuple(map(int, codes)))
            images = (np.asarray(scan.hu)[0, ..., 0] for scan in (fixed, moving))
            return jnp.asarray(answer(*images))

    session.programs = Programs()
    return session, calls


def registered(session, volumes, task, pair_type=None):
    settings = pipeline.check_settings(task, pair_type, "none")
    return session.run(*volumes, settings, affine="none", clock=pipeline.Clock())


def test_network_is_asked_for_region_and_pair_type(model, volumes):
    still = np.zeros((1, *SPEC.shape, 3), np.float32)
    session, calls = asking(model, lambda *_: still)
    expected = []
    for name, task in TASKS.items():
        kinds = {None: task.pair_type, "inter": PairType.INTER, "intra": PairType.INTRA}
        for asked, kind in kinds.items():
            registered(session, volumes, name, asked)
            expected.append((int(task.region), int(kind)))
    assert calls == expected


def test_symmetric_is_the_mean_of_there_and_of_the_inverse_of_back(model, volumes):
    """Of two scans: of equal ones there and back are one field."""
    target, _ = volumes
    grid = preprocess.network_grid(target, SPEC)
    fixed_hu = preprocess.prepare_image(target, grid, SPEC)
    x, y, z = np.meshgrid(*map(np.arange, SPEC.shape), indexing="ij")
    there, back = (
        np.stack(field, axis=-1)[None].astype(np.float32)
        for field in (
            (2 * np.sin(y / 9), np.cos(z / 7), 1 + x / 60),
            (np.cos(z / 8), -1.5 * np.sin(x / 9), -0.5 + 0 * x),
        )
    )
    session, calls = asking(
        model,
        lambda fixed, _: there if np.array_equal(fixed, fixed_hu) else back,
        symmetric=True,
    )
    found = registered(session, volumes, "lung")
    assert calls == [calls[0]] * 2  # one condition both ways
    expected = (there + np.asarray(warp.invert(jnp.asarray(back)))) / 2
    np.testing.assert_allclose(found.network_disp, expected[0], atol=1e-4)  # float32
