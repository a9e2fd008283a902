"""Strict dtypes for the operators: a float never widens an integer or a half unseen."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield
