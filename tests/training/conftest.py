"""Data that tests of several devices and processes share."""

import pytest

from data_pipeline import synthetic


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """Prepared folder of tiny aligned phantoms, more than eight training pairs."""
    return synthetic.write_dataset(
        tmp_path_factory.mktemp("phantoms"),
        shape=(32, 16, 32),
        spacing_mm=12.0,
        subjects_per_task=6,
        tasks=("headneck", "lung"),
    )
