"""The anatomical embedding: sizes, folding, slabs, and equality with PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unireg_jax.models import features
from unireg_jax.models.features import Extractor, sam
from unireg_jax.ops import correlation, resample
from unireg_jax.registration import embedding

SMALL = {"stem": 4, "stages": (4, 6, 8, 10), "channels": 5, "conv_impl": "direct"}
SHAPE = (32, 48, 24)


@pytest.fixture(scope="module")
def variables():
    """A trained form whose running statistics are no identity."""
    network = sam.Sam(norm="batch", **SMALL)
    init = jax.jit(embedding.initializer(network))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(init)
    rng = np.random.default_rng(0)
    leaves = [x * (1 + 0.3 * rng.uniform(-1, 1, x.shape)) + 0.02 for x in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(x, jnp.float32) for x in leaves])


@pytest.fixture(scope="module")
def hu():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(-1024, 1500, (2, *SHAPE, 1)), jnp.int16)


def test_full_network_has_the_published_size():
    network = sam.Sam(norm="batch")
    made = jax.eval_shape(embedding.initializer(network), jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(made["params"]))
    assert count == 32_832_960
    # 138 in the public file, of which 21 count batches.
    assert len(jax.tree.leaves(made)) == 138 - 21


def test_maps_have_the_papers_sizes():
    """Table 7: fine at 1/2, coarse at 1/16 in plane and 1/4 along z, 128 channels."""
    network = sam.Sam()
    params = jax.eval_shape(embedding.initializer(network), jax.random.key(0))
    hu = jax.ShapeDtypeStruct((1, 192, 192, 160, 1), jnp.int16)
    fine, coarse = jax.eval_shape(
        lambda h, p: sam.extract(h, p, network), hu, params["params"]
    )
    assert fine.shape == (1, 96, 96, 80, 128)
    assert coarse.shape == (1, 12, 12, 40, 128)


def test_scale_maps_the_published_range():
    hu = jnp.array([-32768, -1024, 0, 3071, 5000], jnp.int32)
    expected = [-50.0, -50.0, 255 * 1024 / 4095 - 50, 205.0, 205.0]
    np.testing.assert_allclose(sam.scale(hu), expected, atol=1e-4)


def test_folded_equals_trained_and_slabs_equal_the_whole(variables, hu):
    trained = sam.Sam(norm="batch", **SMALL)
    folded = sam.Sam(**SMALL)
    expected = jax.jit(trained.apply)(variables, sam.scale(hu))
    params = sam.fold(variables)
    whole = jax.jit(folded.apply)({"params": params}, sam.scale(hu))
    slabs = jax.jit(lambda h, p: sam.extract(h, p, folded))(hu, params)
    for a, b, c in zip(expected, whole, slabs, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5)  # float32, another order
        np.testing.assert_allclose(c, a, atol=2e-5)
        np.testing.assert_allclose(np.linalg.norm(c, axis=-1), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    "last", [(2, 2, 2), pytest.param((1, 1, 2), marks=pytest.mark.slow)]
)
def test_cpu_formulation_equals_the_direct_one(last, hu):
    params = jax.jit(embedding.initializer(sam.Sam(**SMALL, last_stride=last)))(
        jax.random.key(2)
    )["params"]
    fields = {**SMALL, "last_stride": last}
    maps = [
        jax.jit(
            lambda h, p, impl=impl: sam.extract(
                h, p, sam.Sam(**{**fields, "conv_impl": impl})
            )
        )(hu, params)
        for impl in ("direct", "auto")
    ]
    for a, b in zip(*maps, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_bfloat16_stays_near_float32(variables, hu):
    trained = sam.Sam(**SMALL, norm="batch", dtype="bfloat16")
    fine, _ = jax.eval_shape(trained.apply, variables, sam.scale(hu))
    assert fine.dtype == jnp.float32
    params = sam.fold(variables)
    extract = jax.jit(sam.extract, static_argnums=2)
    exact = extract(hu, params, sam.Sam(**SMALL))
    rough = extract(hu, params, sam.Sam(**SMALL, dtype="bfloat16"))
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == jnp.float32
        assert float(jnp.sum(a * b, axis=-1).mean()) > 0.999  # mean cosine


@pytest.mark.parametrize("layout", ["SAM", "SAMv2", "SAME"])
def test_converted_checkpoint_equals_pytorch(layout, tmp_path):
    torch = pytest.importorskip("torch")
    from tests import sam_twin
    from unireg_jax.registration import sam_weights

    twin = sam_twin.make_twin(stem=4, stages=(4, 6, 8, 10), channels=5, seed=0)
    torch.save(sam_twin.state_dict_layouts(twin)[layout], tmp_path / "SAM.pth")
    sam_weights.convert(tmp_path / "SAM.pth", tmp_path / "sam.safetensors")
    extractor = embedding.load_extractor(
        tmp_path / "sam.safetensors", conv_impl="direct"
    )
    rng = np.random.default_rng(3)
    hu = rng.integers(-1024, 1500, (1, *SHAPE, 1)).astype(np.int16)
    maps = sam.extract(jnp.asarray(hu), extractor.params, extractor.network)
    image = np.array(sam.scale(hu)).transpose(0, 4, 3, 2, 1)  # [B, 1, Z, Y, X]
    with torch.no_grad():
        expected = twin(torch.from_numpy(image))
    for a, b in zip(maps, expected, strict=True):
        b = b.numpy().transpose(0, 4, 3, 2, 1)
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_correlations_are_those_of_joined_and_of_summed_maps(
    variables, hu, monkeypatch
):
    extractor = Extractor("sam", network=sam.Sam(**SMALL), params=sam.fold(variables))
    fixed, moving = (features.describe(h, extractor) for h in (hu[:1], hu[1:]))
    both = features.correlate(fixed, moving)
    # The paper: fine and resized coarse features side by side.
    wide = [
        resample.resize_volume(m.coarse, m.fine.shape[1:4]) for m in (fixed, moving)
    ]
    wide = [w / jnp.linalg.norm(w, axis=-1, keepdims=True) for w in wide]
    fine = correlation.correlation(fixed.fine, moving.fine)
    expected = (fine + correlation.correlation(*wide)) / 2
    np.testing.assert_allclose(both, expected, atol=1e-5)
    monkeypatch.setattr(features, "_WIDE", 1)
    np.testing.assert_allclose(features.correlate(fixed, moving), expected, atol=1e-5)
    # SAME: each on its own grid, then added.
    coarse = correlation.correlation(fixed.coarse, moving.coarse)
    expected = fine + resample.resize_volume(coarse, fine.shape[1:4])
    got = features.correlate(fixed, moving, combine="sum")
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda hu: features.describe(hu, Extractor("sift")), "backend must be one of"),
        (lambda hu: features.describe(hu, Extractor("sam")), "needs a network"),
        (
            lambda hu: features.describe(hu, Extractor("mind", network=sam.Sam())),
            "and no other",
        ),
        (
            lambda hu: sam.extract(hu[:, :30], {}, sam.Sam(**SMALL)),
            "multiples of",
        ),
        (
            lambda hu: features.correlate(
                *[features.describe(hu, Extractor("none"))] * 2, combine="mean"
            ),
            "combine must be one of",
        ),
    ],
)
def test_features_reject_what_does_not_fit(make, match, hu):
    with pytest.raises(ValueError, match=match):
        make(hu)
