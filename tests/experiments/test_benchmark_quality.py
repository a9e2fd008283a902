"""Seeded failures are flagged and good pairs are not, on phantoms; the table."""

import numpy as np
import pytest

from data_pipeline import synthetic
from experiments import benchmark_quality as bench
from unireg_jax import registration
from unireg_jax.evaluation import quality
from unireg_jax.imaging.nifti import Volume

LIVER = ("liver_pvp", "liver_art")  # names only: phantoms stand for them


@pytest.fixture(scope="module")
def session():
    return registration.Session(registration.load_model(None))


def phantom(task, **more):
    found = synthetic.phantom(task, **more)
    return Volume(found.hu, found.vox2world)


def found(session, fixed, moving, affine="auto"):
    result = session.run(
        fixed,
        moving,
        registration.check_settings("liver", None, affine),
        affine=affine,
        clock=registration.Clock(),
    )
    numbers = quality.measure(fixed, moving, result.disp_mm, result.affine)
    return {finding.reason for finding in quality.judge(numbers, "intra")}


@pytest.mark.slow
def test_seeded_failures_of_a_phantom_are_flagged(session):
    pair = synthetic.pair("liver", seed=1)
    fixed, moving = (Volume(p.hu, p.vox2world) for p in pair[:2])
    assert found(session, fixed, moving) == set()
    for axis in range(3):
        job = bench.Job("flip", *LIVER, axis)
        assert "mirrored" in found(session, *bench._broken(job, fixed, moving))
    job = bench.Job("shift", *LIVER, 2)
    assert found(session, *bench._broken(job, fixed, moving), affine="none")
    job = bench.Job("constant", *LIVER, 1)
    assert found(session, *bench._broken(job, fixed, moving)) == {"constant"}
    assert found(session, fixed, phantom("headneck", seed=1))


def test_every_failure_is_seeded_on_the_pair_it_names():
    data = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    scan = Volume(data, np.eye(4))
    _, flipped = bench._broken(bench.Job("flip", *LIVER, 1), scan, scan)
    assert (flipped.data == data[:, ::-1]).all()
    _, moved = bench._broken(bench.Job("shift", *LIVER, 2), scan, scan)
    assert (moved.vox2world[:3, 3] == (0, 0, 80)).all()
    flat, same = bench._broken(bench.Job("constant", *LIVER, 0), scan, scan)
    assert np.ptp(flat.data) == 0 and same.data is data
    kinds = {job.kind for job in bench.jobs()}
    assert kinds == {"good", "phantom", "wrong", "flip", "shift", "constant"}
    first, others = bench.jobs(), bench.jobs(others=True)
    assert len({*first, *others}) == len(first) + len(others)
    for job in others:
        assert job.kind == "phantom" or {job.fixed, job.moving} <= set(bench.SCANS)


def test_table_names_every_surprise():
    good = {"local_ncc": 0.9, "coverage": 1.0, "type": "intra", "axis": None}
    near = {"tre": 2.0, "folds": 0.1}
    first = "liver_pvp"
    rows = [
        {**good, "kind": "good", "fixed": first, "moving": "b", "truth": near},
        {**good, "kind": "good", "fixed": "c", "moving": "d", "coverage": 0.1}
        | {"truth": {"folds": 0.0}},
        {**good, "kind": "good", "fixed": "i", "moving": "j", "coverage": 0.1}
        | {"truth": near | {"folds": 2.1}},
        *(
            {**good, "kind": "phantom", "fixed": "lung", "moving": str(i)}
            | {"truth": {"network": dsc, "folds": 0.0}}
            for i, dsc in enumerate((0.9, 0.1))
        ),
        {"kind": "phantom", "fixed": "lung", "moving": "2", "refused": "x"},
        {**good, "kind": "wrong", "fixed": "e", "moving": "f"},
        {"kind": "constant", "fixed": "g", "moving": "h", "axis": 0, "refused": "x"},
    ]
    lines = bench.table(rows).splitlines()
    assert "| real, succeeded | 1 | 0 |  |" in lines
    assert "| fit, truth agrees but the map folds | 1 | 1 | coverage 1 |" in lines
    assert "| phantoms, succeeded | 1 | 0 |  |" in lines
    assert "| fit, yet failed | 2 | 1 | refused: x 1 |" in lines
    assert "| a scan of one value | 1 | 1 | refused: x 1 |" in lines
    assert "| first half | 0 of 1 | 0 of 0 |" in lines
    assert "| second half | 0 of 0 | 2 of 3 |" in lines
    assert "| phantoms | 0 of 1 | 1 of 2 |" in lines
    surprises = lines[len(lines) - lines[::-1].index("") :]
    assert [line.split(":")[0] for line in surprises] == [
        "another part of the body, e <- f",
        "fit, yet failed, lung <- 1",
    ]
