"""What a record says of a case, in the order in which a person asks for it."""

from collections.abc import Mapping
from typing import Any

from unireg_jax.evaluation import quality
from unireg_jax.reports.page import Row

_CONTEXT = {  # numbers without a limit: name -> meaning
    "local_ncc_before": "local_ncc as the scans lie",
    "local_ncc_affine": "local_ncc after the pre-alignment alone",
    "mirror_gain": "by how much the pre-aligned moving scan, mirrored, has a higher "
    "local_ncc",
    "inverse_p95_mm": "95th percentile of the same distance as inverse_mm",
}
_PLACE = {
    "local_ncc_before": "local_ncc",
    "local_ncc_affine": "local_ncc",
    "mirror_gain": "mirror_sure",
}
_DSC = ("dsc_before", "dsc_affine", "dsc")


def numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the numbers that are judged.

    Args:
        record: CASE_run.json; anything may be absent.

    Returns:
        Name -> number; None where undefined.
    """
    found = _dict(record.get("quality"))
    return {k: v for k, v in found.items() if v is None or isinstance(v, int | float)}


def pair_type(record: Mapping[str, Any]) -> str:
    """The pair type that was used, "inter" where the record has none.

    Args:
        record: CASE_run.json.

    Returns:
        "inter" or "intra".
    """
    return kind(record).split()[0]


def kind(record: Mapping[str, Any]) -> str:
    """By which limits a case is judged.

    Args:
        record: CASE_run.json.

    Returns:
        Of quality.KINDS.
    """
    return quality.kind_of(_dict(record.get("settings")))


def rows(values: Mapping[str, Any], kind: str) -> list[Row]:
    """Makes the table of numbers.

    Args:
        values: of `numbers`; absent ones have no row.
        kind: of quality.KINDS.

    Returns:
        Rows; those without a limit stand before or after the one they belong to.
    """
    over = {finding.name for finding in quality.judge(values, kind)}
    out = []
    for name, check in quality.CHECKS.items():
        if name not in values:
            continue
        for other, meaning in _CONTEXT.items():
            if _PLACE.get(other) == name and other in values:
                out.append(Row(other, values[other], "", False, meaning))
        limit = quality.expected(check, kind)
        out.append(Row(name, values[name], limit, name in over, check.meaning))
        if name == "inverse_mm" and "inverse_p95_mm" in values:
            value, meaning = values["inverse_p95_mm"], _CONTEXT["inverse_p95_mm"]
            out.append(Row("inverse_p95_mm", value, "", False, meaning))
    return out


def labels(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Makes the table of labels.

    Args:
        record: CASE_run.json.

    Returns:
        Label -> metric -> number or None; empty without labels.
    """
    scores = _dict(_dict(record.get("scores")).get("labels"))
    changes = _dict(_dict(record.get("quality")).get("volume_change"))
    out = {}
    for label in dict.fromkeys((*scores, *changes)):
        row = _dict(scores.get(label))
        out[str(label)] = {name: row[name] for name in _DSC if name in row}
        if label in changes:
            out[str(label)]["volume change"] = changes[label]
    return out


def facts(record: Mapping[str, Any]) -> dict[str, str]:
    """Says how the case came about: settings, inputs, versions.

    Args:
        record: CASE_run.json.

    Returns:
        Name -> text; no folder of the machine.
    """
    settings = _dict(record.get("settings"))
    out = {}
    if "task" in settings:
        out["task"] = f"{settings['task']}, {pair_type(record)}-patient"
    if "affine_used" in settings:
        used = str(settings["affine_used"]).replace("none", "no")
        out["pre-alignment"] = f"{used} pre-alignment"
        if used == "coarse":  # a displacement, which no record holds apart
            out["pre-alignment"] += ' ("before" shows its affine part)'
    for name, entry in _dict(record.get("inputs")).items():
        entry = _dict(entry)
        parts = [str(entry.get("name", "")).replace("\\", "/").rpartition("/")[2]]
        if isinstance(shape := entry.get("shape"), list):
            parts.append("×".join(map(str, shape)))
        if isinstance(spacing := entry.get("spacing_mm"), list):
            parts.append("×".join(f"{s:.4g}" for s in spacing if _plain(s)) + " mm")
        out[str(name).replace("_", " ")] = ", ".join(parts)
    if digest := _dict(record.get("weights")).get("sha256"):
        out["weights"] = f"sha256 {str(digest)[:16]}…"
    if refined := settings.get("refine"):
        out["instance optimisation"] = ", ".join(
            f"{k} {v}" for k, v in _dict(refined).items()
        )
    found = _dict(record.get("versions"))
    out["versions"] = ", ".join(f"{k} {v}" for k, v in found.items())
    device = record.get("device")
    out["device"] = (
        " ".join(map(str, device.values()))
        if isinstance(device, dict)
        else str(device or "unknown")
    )
    return out


def status(record: Mapping[str, Any]) -> str:
    """The record's own status, "failed" where it has none that is known.

    Args:
        record: CASE_run.json.

    Returns:
        "ok", "warn" or "failed".
    """
    found = record.get("status")
    return found if found in ("ok", "warn") else "failed"


def warnings(record: Mapping[str, Any]) -> list[str]:
    """The record's warnings.

    Args:
        record: CASE_run.json.

    Returns:
        One line each.
    """
    found = record.get("warnings")
    return [str(line) for line in found] if isinstance(found, list) else []


def _dict(value: Any) -> dict:
    """The value, or nothing: a record on disk may hold anything."""
    return value if isinstance(value, dict) else {}


def _plain(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
