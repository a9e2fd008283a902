"""Checks of a config that every training shares: all faults in one message."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from unireg_jax.errors import USAGE, UserError


def flat(config: ml_collections.ConfigDict, sections: Sequence[str]) -> dict[str, Any]:
    """Gives the fields of some sections, and the seed, by their dotted names."""
    fields = {"seed": config.seed}
    for section in sections:
        fields |= _flat(section, config[section])
    return fields


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, ml_collections.ConfigDict):
        return {name: value}
    fields = {}
    for key, inner in value.items():
        fields |= _flat(f"{name}.{key}", inner)
    return fields


def shared_rules(fields: Mapping[str, Any]) -> dict[str, tuple[bool, str]]:
    """Rules of what every training has: an optimiser and shares of the tasks.

    Args:
        fields: from `flat`.

    Returns:
        For `refuse_faults`.
    """
    least = ("optim.clip_norm", "optim.warmup_steps")
    rules = {f: (fields[f] >= 0, "0 or more") for f in least}
    decay, warmup = fields["optim.decay_steps"], fields["optim.warmup_steps"]
    rules["optim.decay_steps"] = (
        decay == 0 or decay > max(warmup, 0),
        f"0, or more than optim.warmup_steps, {warmup}",
    )
    momentum = fields["optim.momentum"]
    rules["optim.momentum"] = (0 <= momentum < 1, "from 0 to less than 1")
    for field, value in fields.items():
        if field.startswith("data.weights."):
            rules[field] = (0 <= value < math.inf, "a number from 0")
    return rules


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
