"""Which part of the body a scan shows: answers, doubts, alarms."""

import functools

import numpy as np
import pytest

from data_pipeline import synthetic
from unireg_jax import errors
from unireg_jax.errors import UserError
from unireg_jax.imaging import nifti
from unireg_jax.imaging.nifti import Volume
from unireg_jax.registration import region
from unireg_jax.tasks import Region

TASKS = {"headneck": "headneck", "chest": "chest", "abdomen": "abdomen"}


@functools.cache  # painting one takes seconds
def phantom(task, *, seed=3, shape=(88, 72, 72)):
    made = synthetic.phantom(task, shape=shape, spacing_mm=(4.4, 4.2, 4.0), seed=seed)
    return Volume(made.hu, made.vox2world)


@pytest.fixture(scope="module")
def seen():
    return {task: region.estimate_region(phantom(task)) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_phantom_of_a_task_shows_its_region(seen, task):
    assert seen[task].place == task
    assert sum(seen[task].shares.values()) == pytest.approx(1.0)
    assert task in seen[task].why


@pytest.mark.parametrize("task", TASKS)
def test_only_the_wrong_tasks_are_flagged(seen, task):
    flagged = {r for r in Region if region.mismatch(seen[task], r)}
    right = {"abdomen": {Region.ABDOMEN, Region.LIVER}}.get(task)
    right = right or {Region[task.upper()]}
    assert not flagged & right
    # The neighbour along the patient may hold a third of the scan.
    far = Region.ABDOMEN if task == "headneck" else Region.HEADNECK
    assert far in flagged
    line = region.mismatch(seen[task], far)
    assert line.startswith(f"{far.name.lower()} expected, looks like {task}")


def test_estimate_does_not_depend_on_the_grid_of_the_scan(seen):
    fine = synthetic.phantom("chest", shape=(76, 62, 64), spacing_mm=5.0, seed=3)
    again = region.estimate_region(Volume(fine.hu, fine.vox2world))
    for place, share in seen["chest"].shares.items():
        # Another grid, another extent of 320 instead of 288 mm.
        assert again.shares[place] == pytest.approx(share, abs=0.2)
    assert again.place == "chest"


def test_region_of_a_scan_put_together_is_told_by_length():
    # Half the abdomen's phantom below half the head's: neither has the most.
    low, high = phantom("abdomen").data, phantom("headneck").data
    both = np.concatenate([low[..., :40], high[..., -40:]], axis=2)
    found = region.estimate_region(Volume(both, phantom("chest").vox2world))
    assert found.shares["abdomen"] == pytest.approx(0.5, abs=0.2)
    assert found.shares["headneck"] == pytest.approx(0.5, abs=0.2)
    assert region.mismatch(found, "headneck") is None
    assert region.mismatch(found, "abdomen") is None


def test_what_is_no_ct_of_a_person_is_not_told():
    shape = (60, 50, 40)
    x = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    ball = np.where((x**2).sum(0) < 0.6, 40, -1000).astype(np.int16)
    found = region.estimate_region(Volume(ball, np.diag([5.0, 4.5, 4.0, 1.0])))
    assert found.place is None and "bone" in found.why
    assert region.mismatch(found, Region.CHEST) is None
    thin = phantom("chest")
    thin = thin._replace(data=thin.data[..., 30:33])
    assert region.estimate_region(thin).place is None
    dim = phantom("chest")._replace(warnings=("hu_range: not Hounsfield units?",))
    assert "Hounsfield" in region.estimate_region(dim).why


def test_values_that_are_no_hu_are_told_to_who_asks_for_the_network():
    # As an array of an MR comes: no reader has warned of it.
    mr = np.clip(phantom("headneck").data / 8 + 125, 0, 255).astype(np.uint8)
    found = region.estimate_region(Volume(mr, phantom("headneck").vox2world))
    line = region.mismatch(found, "headneck")
    assert line.startswith("a CT in Hounsfield units expected")
    assert "--task none" in line
    assert region.mismatch(found, None) is None


def test_mismatch_takes_the_names_of_tasks(seen):
    assert region.mismatch(seen["chest"], "lung") is None
    line = region.mismatch(seen["headneck"], "lung")
    assert line.startswith("chest expected, looks like headneck")
    for found in (seen["chest"], region.Seen(None, {}, "no body")):
        with pytest.raises(ValueError, match="region must be one of .*'lung'"):
            region.mismatch(found, "knee")


def test_choose_task_needs_two_scans_that_agree(seen):
    chest, abdomen = seen["chest"], seen["abdomen"]
    assert region.choose_task([chest, chest]) == "chest"
    assert region.choose_task([abdomen, abdomen]) == "abdomen"
    assert region.choose_task([abdomen, abdomen], "intra") == "liver"
    assert region.choose_task([chest, chest], "intra") == "chest"
    with pytest.raises(UserError, match="--task chest or --task abdomen") as raised:
        region.choose_task([chest, abdomen])
    assert raised.value.exit_code == errors.USAGE
    assert raised.value.reason == "task_unknown"
    unsure = region.Seen(None, {}, "a body of 20 mm is too short")
    with pytest.raises(UserError, match="moving: a body of 20 mm"):
        region.choose_task([chest, unsure])


def test_shares_follow_the_order_of_the_body():
    # Slices that look like a head below an abdomen cannot be one.
    likely = np.log(np.array([[0.05, 0.05, 0.9]] * 3 + [[0.9, 0.05, 0.05]] * 27))
    shares = region._shares(likely, 5.0)
    assert shares["abdomen"] > 0.85
    # Certain slices give their own shares.
    sure = np.full((30, 3), -40.0)
    sure[:12, 0] = sure[12:21, 1] = sure[21:, 2] = 0.0
    shares = region._shares(sure, 20.0)
    assert shares == pytest.approx({"abdomen": 0.4, "chest": 0.3, "headneck": 0.3})


@pytest.mark.parametrize(
    ("image", "place"),
    [
        ("headneck_openkbp/images/case_0112.nii.gz", "headneck"),
        ("chest_nsclc_r01_001/ct.nii.gz", "chest"),
        ("lung_elastix/followup.nii.gz", "chest"),
        ("liver_multiphase/liver_hcc007_t1/art.nii.gz", "abdomen"),
        ("abdomen_totalseg_example/ct.nii.gz", "abdomen"),
    ],
)
def test_real_scans_show_their_region(data_root, image, place):
    found = region.estimate_region(nifti.read_image(data_root / image))
    assert found.place == place
    assert region.mismatch(found, place) is None


def test_estimate_rejects_a_batch():
    with pytest.raises(ValueError, match="drop other axes"):
        region.estimate_region(Volume(np.zeros((1, 4, 5, 6)), np.eye(4)))
