"""The log of a run: what a disk does to it, what TensorBoard finds, and pictures."""

import errno
import io
import json
import os
import resource
import struct
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from unireg_jax.errors import STORAGE, UserError
from unireg_jax.training import images, log


def _lines(folder):
    return [json.loads(x) for x in (folder / log.NAME).read_text().splitlines()]


def _events(folder):
    """Every event of TensorBoard's files, in order of their names."""
    found = []
    for path in sorted((folder / "tb").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return found


@pytest.fixture
def writer(tmp_path):
    opened = log.Log(tmp_path)
    yield opened
    opened.close()


@pytest.mark.parametrize("how", ["deleted", "rotated"])
def test_log_file_that_goes_away_is_opened_anew(writer, tmp_path, how):
    writer.write(1, {"x": 1.0})
    path = tmp_path / log.NAME
    if how == "deleted":
        path.unlink()
    else:
        path.rename(tmp_path / "metrics.jsonl.1")
    writer.write(2, {"x": 2.0})
    assert _lines(tmp_path) == [{"step": 2, "x": 2.0}]
    if how == "rotated":
        old = (tmp_path / "metrics.jsonl.1").read_text()
        assert json.loads(old) == {"step": 1, "x": 1.0}


def test_lines_wait_while_the_disk_is_full(writer, tmp_path, capsys):
    """A limit of the file's size stands for the disk: a short write, then an error."""
    writer.write(1, {"x": 1.0})
    size = (tmp_path / log.NAME).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        writer.write(2, {"x": 2.0})
        writer.write(3, {"x": 3.0})
        writer.sync()
        text = (tmp_path / log.NAME).read_text()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert text == '{"step": 1, "x": 1.0}\n'  # whole lines alone
    writer.write(4, {"x": 4.0})
    assert [x["step"] for x in _lines(tmp_path)] == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl cannot be written") == 1
    assert "can be written again; nothing of it was lost" in said
    assert said.count("tb cannot be written") == 1
    assert [e.step for e in _events(tmp_path)] == [0, 1, 4]  # nothing torn


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that is full")
def test_warning_that_cannot_be_written_either_ends_nothing(
    writer, tmp_path, monkeypatch
):
    """stderr is a file of the same disk."""
    writer.write(1, {"x": 1.0})
    real = log._append
    monkeypatch.setattr(log, "_append", _refuse)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        writer.write(2, {"x": 2.0})
        monkeypatch.setattr(log, "_append", real)
        writer.write(3, {"x": 3.0})
    assert [x["step"] for x in _lines(tmp_path)] == [1, 2, 3]


def _refuse(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_log_that_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / log.NAME).mkdir()
    with pytest.raises(UserError, match="the log of the run cannot be") as caught:
        log.Log(tmp_path)
    assert (caught.value.reason, caught.value.exit_code) == ("storage", STORAGE)


def test_resumed_log_is_rewritten_whole_or_not_at_all(tmp_path, monkeypatch):
    writer = log.Log(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"x": 0.5, "time/total_s": 10.0 * step})
    writer.close()
    before = (tmp_path / log.NAME).read_text()

    def full(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "write_text", full)
        with pytest.raises(UserError, match="No space left on device"):
            log.Log(tmp_path, resume_step=2)
    assert (tmp_path / log.NAME).read_text() == before
    again = log.Log(tmp_path, resume_step=2)
    again.close()
    assert [x["step"] for x in _lines(tmp_path)] == [1, 2]
    assert again.times == {"time/total_s": 20.0}
    assert not list(tmp_path.glob("*.tmp"))


def test_lines_of_a_step_are_taken_back(writer, tmp_path, monkeypatch):
    for step in (3, 4):
        writer.write(step, {"train/loss": 0.5})
        writer.write(step, {"val/w": 2.0})
    before = _lines(tmp_path)

    def full(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "write_text", full)
        writer.drop(5, "val/")  # nothing to do
        with pytest.raises(UserError, match="No space left on device") as caught:
            writer.drop(4, "val/")
    assert caught.value.exit_code == STORAGE and _lines(tmp_path) == before
    writer.drop(4, "val/")
    assert _lines(tmp_path) == before[:3]
    writer.write(4, {"val/w": 3.0})
    assert _lines(tmp_path) == [*before[:3], {"step": 4, "val/w": 3.0}]
    (tmp_path / log.NAME).unlink()
    writer.drop(4, "val/")
    assert not (tmp_path / log.NAME).exists()


def test_silent_log_writes_nothing(tmp_path):
    writer = log.Log(tmp_path, silent=True)
    writer.write(1, {"x": 1.0})
    writer.drop(1, "x")
    writer.warn(1, "bad")
    writer.draw(1, {"pair": np.zeros((2, 3, 3), np.uint8)})
    writer.sync()
    writer.close()
    assert not list(tmp_path.iterdir())


def test_tensorboard_finds_scalars_warnings_and_pictures(tmp_path):
    writer = log.Log(tmp_path)
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    writer.write(3, {"train/loss": 0.25, "train/dice": float("nan")})
    writer.warn(4, "loss of lung")
    writer.draw(4, {"pair/lung": rgb})
    writer.close()
    writer = log.Log(tmp_path, resume_step=3)
    writer.write(4, {"train/loss": 0.125})
    writer.close()
    first, *later = _events(tmp_path)
    assert first.file_version == "brain.Event:2"
    values = {(e.step, v.tag): v for e in later for v in e.summary.value}
    assert list(values) == [
        (3, "train/loss"),
        (4, "warning"),
        (4, "pair/lung"),
        (4, "train/loss"),
    ]
    assert values[3, "train/loss"].simple_value == 0.25
    assert values[4, "warning"].tensor.string_val == [b"loss of lung"]
    image = values[4, "pair/lung"].image
    assert (image.height, image.width, image.colorspace) == (5, 7, 3)
    decoded = matplotlib.image.imread(io.BytesIO(image.encoded_image_string))
    np.testing.assert_array_equal((decoded * 255).round().astype(np.uint8), rgb)
    # The run goes on from step 3: what there is from step 4 on is hidden.
    assert later[-2].session_log.status == 1 and later[-2].step == 4
    assert _lines(tmp_path) == [
        {"step": 3, "train/loss": 0.25, "train/dice": None},
        {"step": 4, "train/loss": 0.125},
    ]


def test_tensorboard_is_imported_with_the_first_event(tmp_path):
    """A start does not wait for it, nor for the PyTorch that it looks for."""
    code = (
        "import sys; from unireg_jax.training import log; log.Log(sys.argv[1]).sync(); "
        "assert not {'tensorboardX', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_png_rejects_other_arrays():
    with pytest.raises(ValueError, match=r"rgb must be \[H, W, 3\] uint8"):
        images.encode_png(np.zeros((4, 5), np.uint8))


_SHAPE = (96, 48, 64)  # twice, four and three times: no panel is square


def _planes(disp=None):
    """A dark scan with a bright cube at the patient's left, back and top."""
    image = np.full(_SHAPE, -1.0, np.float32)
    image[60:90, 30:44, 40:60] = 1
    labels = (image > 0).astype(np.uint8)
    disp = np.zeros((*_SHAPE, 3), np.float32) if disp is None else disp
    volumes = {
        "fixed": image,
        "moving": image,
        "warped": image,
        "fixed_labels": labels,
        "moving_labels": labels,
        "warped_labels": labels,
        "disp": disp,
    }
    middle = (75, 37, 50)  # through the cube
    return {
        name: [volume.take(middle[axis], axis) for axis in range(3)]
        for name, volume in volumes.items()
    }


def _panels(rgb):
    """Rows of five panels, by the heights and widths that `_SHAPE` gives."""
    gap, (x, y, z) = 2, _SHAPE
    rows, top = [], 0
    for width, height in ((x, y), (x, z), (y, z)):
        times = -(-192 // max(width, height))
        row = rgb[top : top + height * times]
        step = width * times + gap
        rows.append([row[:, i * step : i * step + width * times] for i in range(5)])
        top += height * times + gap
    assert top == rgb.shape[0] + gap
    return rows


def test_picture_shows_left_right_back_down_and_top_up():
    axial, coronal, sagittal = _panels(images.draw_pair(_planes()))
    for panel, right, down in (
        (axial[0], (60, 90), (30, 44)),
        (coronal[0], (60, 90), (4, 24)),  # z from 40 to 60 of 64, upside down
        (sagittal[0], (30, 44), (4, 24)),
    ):
        times = panel.shape[0] // (48 if panel is axial[0] else 64)
        bright = np.zeros(panel.shape[:2], bool)
        rows, columns = (slice(*(n * times for n in x)) for x in (down, right))
        bright[rows, columns] = True
        grey = (panel.max(-1) == panel.min(-1)) & (panel[..., 0] == 255)
        assert not grey[~bright].any()
        assert grey[bright].mean() > 0.9  # the contour runs on its rim
    for row in (axial, coronal, sagittal):
        np.testing.assert_array_equal(row[3], 0)  # no difference


def test_picture_of_the_grid_follows_the_field():
    """A shift by three voxels along x moves the lines across x by as much, back."""
    shift = np.zeros((*_SHAPE, 3), np.float32)
    shift[..., 0] = 3
    still = _panels(images.draw_pair(_planes()))[0][4]
    moved = _panels(images.draw_pair(_planes(shift)))[0][4]
    white = [(panel == 235).all(-1) for panel in (still, moved)]
    times = still.shape[0] // _SHAPE[1]
    before, after = white[0][:, 3 * times : -1], white[1][:, : -3 * times - 1]
    np.testing.assert_array_equal(before, after)
    assert white[0].any() and (white[0] != white[1]).any()
    # The ground says how far: nothing, and 3 of 10 voxels.
    assert still[2, 2].tolist() == [0, 0, 0] and moved[2, 2].tolist() == [69, 36, 9]


def test_picture_of_a_broken_network_is_drawn():
    planes = _planes(np.full((*_SHAPE, 3), np.nan, np.float32))
    planes["warped"] = [p * np.nan for p in planes["warped"]]
    assert images.draw_pair(planes).dtype == np.uint8
