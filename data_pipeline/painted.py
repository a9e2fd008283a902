"""CT-like volumes painted from label maps: real organ shapes without their scans.

Every organ gets HU of its kind, contrast phase and patient, texture, and detail inside
(vessels and lesions of the liver, cortex of the kidney, gas of the bowel); around the
organs lies a body that fits them, with what the map does not label: skin, fat, muscle,
bone, bowel, lung. After SynthMorph (Hoffmann et al., IEEE TMI 2022), which draws its
intensities at random; here they are those of CT.
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from data_pipeline import anatomy, organs
from data_pipeline.phantoms import headneck, torso
from data_pipeline.phantoms.canvas import AIR_HU, Canvas, Noise

PHASES = tuple(torso.PHASES)  # without contrast, arterial, portal venous

# Where organs lie in the phantoms' frame, mm; nan where their centre says nothing.
_NO = float("nan")
_PLACES: dict[str, dict[str, tuple[float, float, float]]] = {
    "torso": {
        "liver": (-52, -16, -55),
        "spleen": (98, 38, -50),
        "left kidney": (62, 54, -108),
        "right kidney": (-62, 54, -120),
        "stomach": (52, -18, -62),
        "pancreas": (18, -12, -90),
        "aorta": (9, 32, _NO),
        "esophagus": (8, 28, _NO),
        "heart": (20, -34, 34),
        "lung left": (72, 0, 62),
        "lung right": (-72, 0, 62),
        "trachea": (0, 8, _NO),
        "gallbladder": (-49, -48, -108),
        "left adrenal gland": (40, 34, -62),
        "right adrenal gland": (-40, 34, -74),
        "urinary bladder": (0, -25, -275),
        "spine": (0, 62, _NO),
    },
    "headneck": {
        "brain": (0, 5, 70),
        "brainstem": (0, 15, 24),
        "left parotid": (49, 12, -12),
        "right parotid": (-49, 12, -12),
        "mandible": (0, -44, -40),
        "larynx": (0, -22, -77),
        "spinal cord": (0, 32, _NO),
        "esophagus": (2, 8, _NO),
    },
}
_HEAD = set(
    "brain brainstem parotid mandible larynx skull eye submandibular cochlea optic "
    "lens pharynx".split()
)
_TORSO = set(
    "liver spleen kidney lung lungs stomach heart pancreas bladder colon rib".split()
)
_UPPER = {"liver", "spleen", "stomach", "kidney", "pancreas", "gallbladder", "adrenal"}
_SURROUNDS = {
    "bowel": {"bowel", "colon"},
    "lungs": {"lung", "lungs"},
    "mediastinum": {"heart"},
    "bones": {"rib", "ribs", "bone", "bones", "hip"},
    "spine": {"vertebrae", "vertebra", "spine", "bone", "bones"},
}


def paint(
    labels: np.ndarray,
    names: Mapping[int, str],
    *,
    spacing_mm: Sequence[float],
    seed: int,
    phase: str | None = None,
    scan: int = 0,
) -> np.ndarray:
    """Paints a CT whose organs are those of a label map.

    Args:
        labels: [X, Y, Z] uint8 or uint16, along LPS axes; 0 is background.
        names: id -> organ; ids that it lacks, and names that `organs.tissue` does not
            know, become soft tissue of a random HU.
        spacing_mm: (x, y, z) voxel edges, mm.
        seed: the patient: HU of every organ, build, detail inside.
        phase: one of PHASES; None: drawn from the seed.
        scan: number of the patient's scan: its noise.

    Returns:
        [X, Y, Z] int16, HU; the same bits for the same arguments.

    Raises:
        ValueError: labels of another dtype or without any structure, bad spacing,
            unknown phase.
    """
    spacing = _checked(labels, spacing_mm, phase)
    draws = _rng("phase", seed)
    phase = PHASES[draws.integers(len(PHASES))] if phase is None else phase
    values = organs.phase_values(phase, draws)
    present = {
        i + 1: box
        for i, box in enumerate(ndimage.find_objects(labels))
        if box is not None
    }
    named = {i: str(names.get(i, f"structure {i}")) for i in present}
    rng = _rng("patient", seed)
    canvas = _surroundings(labels, named, present, spacing, values, rng)
    patient = organs.Patient(canvas.noise, values, float(canvas.edge))
    for i, box in present.items():
        # A stream per organ: what one map lacks does not change the others.
        organs.paint_organ(
            canvas,
            labels[box] == i,
            box,
            named[i],
            spacing=spacing,
            patient=patient,
            rng=_rng(f"organ/{named[i]}", seed),
        )
    # Each voxel shows a mean over itself and its neighbours: partial volume.
    hu = ndimage.gaussian_filter(canvas.hu, 0.55, mode="nearest")
    hu += _scanner_noise(_rng(f"scan/{phase}/{scan}", seed), hu.shape)
    return np.clip(np.rint(hu), AIR_HU - 24, 3071).astype(np.int16)


def _checked(labels, spacing_mm, phase) -> tuple[float, ...]:
    good = labels.ndim == 3 and labels.dtype in (np.uint8, np.uint16)
    if not good or min(labels.shape) < 2:
        raise ValueError(
            "labels must be [X, Y, Z] uint8 or uint16, two or more each way, got "
            f"{labels.shape} {labels.dtype}; use imaging.nifti.read_labels"
        )
    if not labels.any():
        raise ValueError("labels must hold a structure, got 0 everywhere")
    spacing = tuple(float(s) for s in spacing_mm)
    if len(spacing) != 3 or not min(spacing) > 0:
        raise ValueError(f"spacing_mm must be three positive mm, got {spacing_mm}")
    if phase is not None and phase not in PHASES:
        raise ValueError(f"phase must be one of {PHASES} or None, got {phase!r}")
    return spacing


def _rng(purpose: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(f"painted/{purpose}".encode()), seed])


def _scanner_noise(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    white = rng.standard_normal(shape, dtype=np.float32)
    smooth = ndimage.gaussian_filter(
        white, (*(rng.uniform(0.4, 0.8, 1).repeat(2)), 0.2)
    )
    return np.float32(rng.uniform(5, 14)) * smooth / smooth.std()


# --- the body around the organs ---


def _surroundings(labels, named, present, spacing, values, rng) -> Canvas:
    """A canvas with everything that the map does not label."""
    words = {i: set(anatomy.words(name)) for i, name in named.items()}
    heads = sum(bool(w & _HEAD) for w in words.values())
    region = (
        "headneck"
        if heads > sum(bool(w & _TORSO) for w in words.values())
        else ("torso")
    )
    scale, shift = _fit(labels, named, present, spacing, _PLACES[region])
    upper = [i for i, w in words.items() if w & _UPPER]
    if upper and region == "torso":
        _settle(scale, shift, [present[i] for i in upper], spacing)
    axes = [
        np.float32(s) * np.arange(n, dtype=np.float32) * np.float32(mm) + np.float32(t)
        for n, mm, s, t in zip(labels.shape, spacing, scale, shift, strict=True)
    ]
    points = [np.ascontiguousarray(p) for p in np.meshgrid(*axes, indexing="ij")]
    canvas = Canvas(*points, spacing)
    canvas.noise = Noise(rng)
    if region == "headneck":
        _surround_head(canvas, labels, words, rng)
        return canvas
    structures = {
        part
        for part, has in _SURROUNDS.items()
        if not any(w & has for w in words.values())
    }
    kinds = {
        i: organs.tissue(n) or organs.Tissue(0.0, 0.0, 0.0) for i, n in named.items()
    }
    outline = any(kind.detail == "body" for kind in kinds.values())
    soft = np.zeros(int(labels.max()) + 1, bool)
    for i, kind in kinds.items():
        wall = kind.detail in ("bone", "body") or kind.hu == "muscle"
        soft[i] = not wall and "cartilages" not in words[i]
    around_soft = _distance(soft[labels], spacing, hull="bones" not in structures)
    lift = _lift(labels, upper, canvas)
    torso.surround(
        canvas,
        rng,
        phase=values,
        structures=structures,
        around_all=_distance(labels > 0, spacing, hull=True, smooth_mm=16.0),
        around_soft=around_soft,
        lift=lift,
    )
    if outline:
        canvas.hu[labels == 0] = AIR_HU
    return canvas


def _surround_head(canvas, labels, words, rng) -> None:
    """The phantom's head; its own version of the map's organs becomes muscle."""
    headneck.paint(canvas, rng)
    known = set().union(*words.values())
    stale = [
        code
        for name, code in canvas.names.items()
        if set(anatomy.words(name)) - {"left", "right", "spinal"} <= known
    ]
    rest = np.isin(canvas.labels, stale) & (labels == 0)
    at = (canvas.x[rest], canvas.y[rest], canvas.z[rest])
    canvas.hu[rest] = 50 + 8 * canvas.noise(*at, 12.0)
    # The surface must hold the map's organs.
    bare = (labels > 0) & (canvas.hu < -300)
    if bare.any():
        skin = ndimage.binary_dilation(bare, iterations=2) & (canvas.hu < -300)
        canvas.hu[skin] = -60


def _fit(labels, named, present, spacing, places) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift per axis, mm of the map -> mm of the phantoms' frame."""
    found, wanted = [], []
    spines = [i for i, n in named.items() if set(anatomy.words(n)) & {"vertebrae"}]
    centers = {i: _center(labels, i, present[i], spacing) for i in present}
    lookup = {frozenset(key.split()): place for key, place in places.items()}
    for i, name in named.items():
        place = lookup.get(frozenset(anatomy.words(name)))
        if place is None and {"lung"} <= set(anatomy.words(name)):
            which, _ = anatomy.side(name)
            up = 85 if "upper" in name else 40
            place = (
                None if which is None else (72 * (1 if which == "left" else -1), 0, up)
            )
        if place is None and i in spines:
            place = (0, 62, _NO)
        if place is not None:
            found.append(centers[i])
            wanted.append(place)
    whole = np.array([[s.start, s.stop - 1] for b in present.values() for s in b])
    whole = whole.reshape(-1, 3, 2)
    middle = (whole[..., 0].min(0) + whole[..., 1].max(0)) / 2 * spacing
    typical = np.array(next(iter(places.values())), float) * (0, 1, 1)
    if not found:
        return np.ones(3), typical - middle
    scale, shift = np.ones(3), np.zeros(3)
    for axis in range(3):
        m, a = (np.array(v, float)[:, axis] for v in (found, wanted))
        m, a = m[~np.isnan(a)], a[~np.isnan(a)]
        if not len(m):
            shift[axis] = typical[axis] - middle[axis]
            continue
        dm, da = m - m.mean(), a - a.mean()
        # A map that is mirrored in its header gets a body that is.
        sign = -1.0 if axis == 0 and dm @ da < 0 else 1.0
        slope = (dm @ da + 3000 * sign) / (dm @ dm + 3000)
        scale[axis] = sign * np.clip(sign * slope, 0.78, 1.25)
        shift[axis] = a.mean() - scale[axis] * m.mean()
    return scale, shift


def _settle(scale, shift, boxes, spacing) -> None:
    """Changes scale and shift so that the organs' boxes lie within the ribs, mm."""
    for axis, (low, high) in enumerate(((-112, 112), (-80, 76))):
        ends = np.array([(b[axis].start, b[axis].stop) for b in boxes]) * spacing[axis]
        ends = np.array([ends.min(), ends.max()])
        width = abs(scale[axis]) * (ends[1] - ends[0])
        middle = scale[axis] * ends.mean() + shift[axis]
        scale[axis] *= np.clip((high - low) / width, 0.8, 1)
        half = min((high - low) / 2, abs(scale[axis]) * (ends[1] - ends[0]) / 2)
        middle = np.clip(middle, low + half, high - half)
        shift[axis] = middle - scale[axis] * ends.mean()


def _center(labels, i, box, spacing) -> np.ndarray:
    inside = np.argwhere(labels[box] == i).mean(0)
    return (inside + [s.start for s in box]) * spacing


def _distance(
    mask: np.ndarray,
    spacing: Sequence[float],
    *,
    hull: bool = False,
    smooth_mm: float = 9.0,
) -> np.ndarray:
    """mm to the mask, smoothed; on a grid of about 5 mm, then refined.

    `hull` first fills each axial slice between its outermost parts along x and y.
    """
    steps = [max(1, round(5 / s)) for s in spacing]
    few = ndimage.maximum_filter(mask, steps)[
        tuple(slice(None, None, k) for k in steps)
    ]
    if not few.any():
        return np.full(mask.shape, 1e3, np.float32)
    if hull:
        for axis in (0, 1):
            ahead = np.logical_or.accumulate(few, axis)
            behind = np.flip(np.logical_or.accumulate(np.flip(few, axis), axis), axis)
            few = few | (ahead & behind)
    mm = np.multiply(steps, spacing)
    out = ndimage.distance_transform_edt(~few, sampling=mm)
    out = ndimage.gaussian_filter(out.astype(np.float32), smooth_mm / mm)
    for axis, (n, k) in enumerate(zip(mask.shape, steps, strict=True)):
        at = np.minimum(np.arange(n) / k, out.shape[axis] - 1)
        low = np.minimum(at.astype(int), max(0, out.shape[axis] - 2))
        part = (
            (at - low)
            .astype(np.float32)
            .reshape([-1 if a == axis else 1 for a in range(3)])
        )
        high = np.minimum(low + 1, out.shape[axis] - 1)
        out = (1 - part) * out.take(low, axis) + part * out.take(high, axis)
    return out


def _lift(labels, upper, canvas) -> np.ndarray:
    """How much higher than the phantoms' the diaphragm lies, [X, Y, 1] mm."""
    flat = np.zeros((*labels.shape[:2], 1), np.float32)
    if not upper:
        return flat
    mask = np.isin(labels, upper)
    any_there = mask.any(2)
    top = labels.shape[2] - 1 - np.argmax(mask[:, :, ::-1], axis=2)
    x, y = canvas.x[..., 0], canvas.y[..., 0]
    one = 0.0062 * ((x + 58) ** 2 + 1.15 * (y + 8) ** 2) - 6
    two = 0.0072 * ((x - 58) ** 2 + 1.15 * (y + 6) ** 2) + 6
    usual = -np.minimum(one, two)
    # Low tops, such as a kidney's, are not near the diaphragm.
    excess = canvas.z[0, 0, top] - usual
    weight = (any_there & (excess > -25)).astype(np.float32)
    if not weight.any():
        return flat
    sigma = 14 / np.abs(
        [canvas.x[1, 0, 0] - canvas.x[0, 0, 0], canvas.y[0, 1, 0] - canvas.y[0, 0, 0]]
    )
    blurred = ndimage.gaussian_filter(weight * excess, sigma)
    mean = float((weight * excess).sum() / weight.sum())
    known = ndimage.gaussian_filter(weight, sigma)
    out = (blurred + 0.02 * mean) / (known + 0.02)
    return (out[..., None] + 3).astype(np.float32)
