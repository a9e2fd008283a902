"""The benchmark of the training stream: every stream gives the same pairs, and runs."""

import numpy as np

from data_pipeline import loader
from experiments import benchmark_loader

SHAPE = (24, 20, 18)


def test_benchmark_loader_times_equal_pairs(tmp_path, capsys):
    benchmark_loader.make_folder(tmp_path, 3, SHAPE)
    dataset = loader.Dataset(tmp_path)
    batch = next(benchmark_loader.stream(dataset, 1, 0))
    theirs = next(benchmark_loader.nifti_stream(tmp_path, dataset))
    ours = (batch.fixed, batch.fixed_labels, batch.moving, batch.moving_labels)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.reshape(SHAPE), other)
    assert batch.fixed_labels.max() > 40
    candidates = {
        "ours": lambda: benchmark_loader.rate(
            benchmark_loader.stream(dataset, 2, 1), 2, 4
        ),
        "augmented": lambda: benchmark_loader.rate(
            benchmark_loader.stream(dataset, 1, 2, benchmark_loader.AUGMENTS["all"]),
            1,
            2,
        ),
        "nifti": lambda: benchmark_loader.rate(
            benchmark_loader.nifti_stream(tmp_path, dataset), 1, 2
        ),
    }
    benchmark_loader.compare(candidates, 2)
    benchmark_loader.memory("ours", benchmark_loader.stream(dataset, 1, 2), 20)
    printed = capsys.readouterr().out
    assert all(f"\n| {name} | " in printed for name in candidates)
    assert "slope over the second half" in printed
