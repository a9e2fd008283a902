"""Public SAM checkpoints become our weights: names, axes, description."""

import hashlib
import json
import os
import re

import numpy as np
import pytest

from unireg_jax import errors
from unireg_jax.errors import UserError
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.registration import sam_weights, weights


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def sam_twin(torch):
    from tests import sam_twin

    return sam_twin


@pytest.fixture(scope="module")
def twin(sam_twin):
    return sam_twin.make_twin()


@pytest.fixture(scope="module")
def layouts(sam_twin, twin):
    return sam_twin.state_dict_layouts(twin)


@pytest.fixture(scope="module")
def tensors():
    """Random numbers under PyTorch's names, in its shapes: PyTorch need not be there.

    That they are its own is told by the twin, which converts.
    """
    rng = np.random.default_rng(0)
    widths = {"stem": 4, "stages": (4, 6, 8, 10), "channels": 5}
    return {
        name: rng.uniform(0.5, 1.5, shape).astype(np.float32)
        for name, shape in sam_weights._shapes(widths).items()
    }


def leaves(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf
        for key, branch in tree.items()
        for name, leaf in leaves(branch, f"{prefix}/{key}".strip("/")).items()
    }


def refusal(path, target, *, reason="checkpoint_other", code=errors.CHECKPOINT):
    """The message of the UserError that converting must raise; nothing is written."""
    before = sorted(os.listdir(target.parent))
    with pytest.raises(UserError) as caught:
        sam_weights.convert(path, target)
    assert caught.value.reason == reason, str(caught.value)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(target.parent)) == before
    return str(caught.value)


def test_twin_has_the_names_of_the_public_files(layouts):
    assert len(layouts["SAM"]["state_dict"]) == 138
    assert len(layouts["SAMv2"]["state_dict"]) == 146
    assert "module.embed.backbone.layer2.1.conv2.bn.running_var" in layouts["SAME"]


def test_twin_gives_unit_vectors_at_the_published_strides(torch, twin):
    with torch.no_grad():
        fine, coarse = twin(torch.randn(1, 1, 8, 32, 48))
    assert fine.shape == (1, 5, 4, 16, 24) and coarse.shape == (1, 5, 2, 2, 3)
    for found in (fine, coarse):
        np.testing.assert_allclose(found.norm(dim=1), 1, atol=1e-5)  # float32


@pytest.mark.parametrize("layout", ["SAM", "SAMv2", "SAME"])
def test_convert_every_layout(torch, layout, layouts, twin, tmp_path):
    source, target = tmp_path / "in" / "net.pth", tmp_path / "sam.safetensors"
    source.parent.mkdir()
    torch.save(layouts[layout], source)
    card = sam_weights.convert(source, target, licence="CC BY 4.0")
    variables, spec = weights.load_weights(target)
    assert card == spec == json.loads((tmp_path / "sam.json").read_text())
    assert spec["kind"] == spec["features"] == "sam"
    assert spec["architecture"] == {
        "stem": 4,
        "stages": [4, 6, 8, 10],
        "channels": 5,
        "last_stride": [2, 2, 2],
    }
    grid = PreprocessSpec.from_json(spec["preprocess"])
    assert grid.shape == (192, 192, 160) and grid.spacing_mm == (2.0, 2.0, 2.0)
    assert (grid.codes, grid.hu_low, grid.hu_high) == ("LPS", -1024.0, 3071.0)
    assert spec["source"] == {
        "name": "net.pth",
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "layout": layout,
    }
    assert spec["licence"] == "CC BY 4.0"
    assert spec.get("left_out") == ("semantic_head" if layout == "SAMv2" else None)
    found = leaves(variables)
    # 21 convolutions with four numbers of their norm each, 6 with bias.
    assert len(found) == 21 * 5 + 6 * 2
    total = sum(leaf.size for leaf in found.values())
    net = twin.state_dict().items()
    assert total == sum(t.numel() for n, t in net if not n.endswith("tracked"))
    assert all(leaf.dtype == np.float32 for leaf in found.values())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.conv1.conv.weight", "params/stem/kernel"),
        ("backbone.conv1.bn.weight", "params/stem_norm/scale"),
        ("backbone.conv1.bn.running_var", "batch_stats/stem_norm/var"),
        (
            "backbone.layer1.0.downsample.conv.weight",
            "params/layer1_0/downsample/kernel",
        ),
        (
            "backbone.layer4.0.downsample.bn.running_mean",
            "batch_stats/layer4_0/downsample_norm/mean",
        ),
        ("backbone.layer3.1.conv2.conv.weight", "params/layer3_1/conv2/kernel"),
        ("backbone.layer2.0.conv1.bn.bias", "params/layer2_0/norm1/bias"),
        ("backbone.layer2.1.conv2.bn.running_mean", "batch_stats/layer2_1/norm2/mean"),
        ("neck.lateral_convs.2.conv.weight", "params/fine/lateral_2/kernel"),
        ("neck.fpn_convs.0.conv.bias", "params/fine/output/bias"),
        ("read_out_head.lateral_convs.0.conv.bias", "params/coarse/lateral_0/bias"),
        ("read_out_head.fpn_convs.0.conv.weight", "params/coarse/output/kernel"),
    ],
)
def test_from_torch_names_and_axes(theirs, ours, tensors):
    found = leaves(sam_weights.from_torch(tensors, "net.pth")[0])[ours]
    if tensors[theirs].ndim < 5:
        np.testing.assert_array_equal(found, tensors[theirs])
        return
    out, before, depth, height, width = tensors[theirs].shape
    assert found.shape == (width, height, depth, before, out)
    for o, i, z, y, x in np.ndindex(out, min(before, 2), depth, height, width):
        assert found[x, y, z, i, o] == tensors[theirs][o, i, z, y, x]


def test_from_torch_takes_other_widths_and_half_precision(sam_twin):
    twin = sam_twin.make_twin(stem=3, stages=(5, 4, 7, 6), channels=2, seed=1)
    tensors = {
        f"module.{name}": t.half().numpy() for name, t in twin.state_dict().items()
    }
    variables, architecture, layout = sam_weights.from_torch(tensors, "net.pth")
    assert layout == "SAM" and architecture["stages"] == [5, 4, 7, 6]
    assert architecture["stem"] == 3 and architecture["channels"] == 2
    assert variables["params"]["fine"]["lateral_2"]["kernel"].dtype == np.float32
    assert variables["params"]["layer1_0"]["conv1"]["kernel"].shape == (3, 3, 1, 3, 5)


def test_convert_names_three_tensors_that_do_not_fit(torch, twin, tmp_path):
    state = dict(twin.state_dict())
    del state["backbone.layer2.0.conv1.conv.weight"]
    del state["neck.fpn_convs.0.conv.bias"]
    state["neck.lateral_convs.3.conv.bias"] = torch.zeros(5)
    state["read_out_head.fpn_convs.0.conv.bias"] = torch.zeros(6)
    torch.save({"state_dict": state}, tmp_path / "net.pth")
    message = refusal(tmp_path / "net.pth", tmp_path / "sam.safetensors")
    assert "backbone.layer2.0.conv1.conv.weight: (6, 4, 1, 3, 3) expected" in message
    assert "got nothing" in message and " and 1 more" in message
    assert len(re.findall("expected, got", message)) == 3


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("backbone.conv1.conv.weight", None, "got 0 among 137 tensors"),
        ("backbone.layer4.1.conv2.bn.running_var", None, "running_var: (10,)"),
        ("extra.weight", np.ones(2), "extra.weight: nothing"),
        ("other.backbone.conv1.conv.weight", np.ones(2), "got 2 among"),
        ("backbone.conv1.conv.weight", np.ones((4, 3, 7, 7)), "got (4, 3, 7, 7)"),
        ("backbone.conv1.bn.bias", np.ones(4, np.int64), "int64"),
    ],
)
def test_convert_refuses_another_network(torch, name, value, match, twin, tmp_path):
    state = dict(twin.state_dict())
    if value is None:
        del state[name]
    else:
        state[name] = torch.from_numpy(value)
    torch.save({"state_dict": state}, tmp_path / "net.pth")
    assert match in refusal(tmp_path / "net.pth", tmp_path / "sam.safetensors")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backbone.conv1.bn.weight", float("nan")),
        ("backbone.conv1.bn.running_var", -1.0),
        ("backbone.conv1.bn.bias", 1e300),
    ],
)
def test_convert_refuses_numbers_that_cannot_be(torch, name, value, twin, tmp_path):
    state = dict(twin.state_dict())
    state[name] = torch.full((4,), value, dtype=torch.float64)
    torch.save({"state_dict": state}, tmp_path / "net.pth")
    message = refusal(
        *(tmp_path / "net.pth", tmp_path / "sam.safetensors"),
        reason="checkpoint_nonfinite",
    )
    assert name in message


def test_convert_checks_the_target_first(torch, layouts, tmp_path):
    source = tmp_path / "absent.pth"
    for target, reason, code in (
        (tmp_path / "sam.npz", "name_mismatch", errors.USAGE),
        (tmp_path / "sub" / "sam.safetensors", "storage", errors.STORAGE),
        (tmp_path / "sam.safetensors", "checkpoint_missing", errors.CHECKPOINT),
    ):
        with pytest.raises(UserError) as caught:
            sam_weights.convert(source, target)
        assert (caught.value.reason, caught.value.exit_code) == (reason, code)
    (tmp_path / "sam.json").write_text("mine")
    torch.save(layouts["SAM"], source)
    target = tmp_path / "sam.safetensors"
    message = refusal(source, target, reason="id_duplicate", code=errors.USAGE)
    assert "sam.json" in message and "--overwrite" in message
    assert (tmp_path / "sam.json").read_text() == "mine"
    sam_weights.convert(source, target, overwrite=True)
    assert weights.load_weights(target)[1]["kind"] == "sam"
