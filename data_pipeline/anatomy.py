"""Where named organs must lie: left of, above or in front of one another.

A scan whose left and right are exchanged trains a network as well as any other, and
nothing but the organs themselves can tell.
"""

import re
from collections.abc import Mapping

import numpy as np

from data_pipeline.findings import Finding

_LEFT, _RIGHT = {"left", "l", "lt"}, {"right", "r", "rt"}
_PAIR_MM = 5.0  # a pair that is closer says nothing
_ORDER_MM = 20.0  # centres that are closer say nothing
# From head to feet, and from front to back; a name belongs to a step by one word.
_DOWN = (
    {"brain", "brainstem"},
    {"larynx"},
    {"heart", "lung", "lungs"},
    {"kidney"},
    {"bladder", "prostate", "sacrum"},
)
_OTHER = {"gall"}  # a bladder of another place
_BACK = (
    {"larynx", "heart", "stomach", "liver"},
    {"spinal", "spinalcord", "vertebrae", "vertebra", "kidney"},
)


def words(name: str) -> list[str]:
    """Splits a structure's name: LeftParotid, Parotid_L, parotid-left -> its words.

    Args:
        name: from a label map.

    Returns:
        Lower-case words; `vertebrae_L1` gives "vertebrae" and "l1".
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return [word for word in re.split(r"[\W_]+", spaced.lower()) if word]


def side(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Tells which side a name claims, and the name without it.

    Args:
        name: from a label map.

    Returns:
        "left", "right" or None, and the other words, sorted.
    """
    found = words(name)
    rest = tuple(sorted(word for word in found if word not in _LEFT | _RIGHT))
    left, right = _LEFT & set(found), _RIGHT & set(found)
    if bool(left) == bool(right) or not rest:
        return None, tuple(sorted(found))
    return ("left" if left else "right"), rest


def check_places(name: str, centers: Mapping[str, np.ndarray]) -> list[Finding]:
    """Finds organs on the wrong side of one another.

    Args:
        name: id of the scan.
        centers: structure -> [3] float, LPS mm.

    Returns:
        `mirrored` for left and right, `orientation_conflict` for the other axes.
    """
    found = _sides(name, centers)
    for axis, sign, ends, steps in (
        (2, -1, "head and feet", _DOWN),
        (1, 1, "front and back", _BACK),
    ):
        found += _order(name, centers, axis, sign, ends, steps)
    return found


def _sides(name: str, centers: Mapping[str, np.ndarray]) -> list[Finding]:
    pairs: dict[tuple[str, ...], dict[str, str]] = {}
    for structure in centers:
        which, rest = side(structure)
        if which:
            pairs.setdefault(rest, {})[which] = structure
    right, wrong = [], []
    for pair in pairs.values():
        if len(pair) == 2:
            # x runs to the patient's left.
            gap = float(centers[pair["left"]][0] - centers[pair["right"]][0])
            if abs(gap) > _PAIR_MM:
                (right if gap > 0 else wrong).append((abs(gap), pair))
    liver = _liver_is_right(centers)
    if not wrong:
        if liver is False:
            return [
                Finding(
                    "warning",
                    name,
                    "mirrored",
                    "liver and spleen",
                    "the liver on the patient's right",
                    "on the left",
                    "look at the scan: mirrored in its header, names exchanged, or a "
                    "rare situs inversus",
                )
            ]
        return []
    gap, pair = max(wrong, key=lambda item: item[0])
    got = f"{pair['left']} {gap:.0f} mm to the right of {pair['right']}"
    got += f" ({len(wrong)} of {len(wrong) + len(right)} pairs)"
    if liver is False:
        got += ", and the liver on the left"
        remedy = (
            "image and labels are mirrored: turn the sign of the left-right axis in "
            "the headers of both"
        )
        if right:  # on the right side of a mirrored scan: wrong names
            remedy += f", and exchange the names {' and '.join(right[0][1].values())}"
    elif right:
        remedy = "exchange the two names of each such pair in the label map"
    elif liver:
        got += ", yet the liver on the right"
        remedy = "the scan is right: exchange left and right names in the label map"
    else:
        remedy = (
            "look at the scan: exchange left and right names in the label map, or mend "
            "the left-right axis in both headers"
        )
    expected = "what is called left on the patient's left of its partner"
    return [Finding("error", name, "mirrored", "left and right", expected, got, remedy)]


def _liver_is_right(centers: Mapping[str, np.ndarray]) -> bool | None:
    """Whether the liver lies right of the spleen; None where that cannot be told."""
    if "liver" not in centers or "spleen" not in centers:
        return None
    gap = float(centers["spleen"][0] - centers["liver"][0])
    return None if abs(gap) < _ORDER_MM else gap > 0


def _order(name, centers, axis: int, sign: int, ends: str, steps) -> list[Finding]:
    """One finding when structures of two steps lie the wrong way round."""
    placed: list[tuple[int, float, str]] = []
    for structure, center in centers.items():
        for rank, step in enumerate(steps):
            if step & set(words(structure)) and not _OTHER & set(words(structure)):
                placed.append((rank, sign * float(center[axis]), structure))
    wrong = [
        (a[1] - b[1], a[2], b[2])
        for a in placed
        for b in placed
        if a[0] < b[0] and a[1] - b[1] > _ORDER_MM
    ]
    if not wrong:
        return []
    gap, first, second = max(wrong)
    where = "below" if axis == 2 else "behind"
    other = "above" if axis == 2 else "in front of"
    return [
        Finding(
            "error",
            name,
            "orientation_conflict",
            ends,
            f"{first} {other} {second}",
            f"{gap:.0f} mm {where} it",
            "look at the scan: the axis is turned in the header, or names are wrong",
        )
    ]
