"""Checks of a config that every training shares: all faults in one message."""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from unireg_jax.errors import USAGE, UserError


def flat(config: ml_collections.ConfigDict, sections: Sequence[str]) -> dict[str, Any]:
    """Gives the fields of some sections, and the seed, by their dotted names."""
    return {
        f"{section}.{name}": value
        for section in sections
        for name, value in config[section].items()
    } | {"seed": config.seed}


def refuse_faults(
    fields: Mapping[str, Any], rules: Mapping[str, tuple[bool, str]]
) -> None:
    """Refuses values that no run can have.

    Args:
        fields: value by dotted name.
        rules: dotted name -> whether its value is right, and what is expected.

    Raises:
        UserError: `schema`, exit code 2, naming every fault.
    """
    faults = [
        f"{field}: {expected} expected, got {fields[field]!r}"
        for field, (right, expected) in rules.items()
        if not right
    ]
    if faults:
        raise UserError(
            "schema",
            f"config: {'; '.join(faults)}; correct the file, or pass "
            "--config.FIELD=VALUE",
            USAGE,
        )
