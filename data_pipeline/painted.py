"""CT-like volumes painted from label maps: real organ shapes without their scans.

Every organ gets HU of its kind, contrast phase and patient, texture, and detail inside
(vessels and lesions of the liver, cortex of the kidney, gas of the bowel); around the
organs lies a body that fits them, with what the map does not label: skin, fat, muscle,
bone, bowel, lung. After SynthMorph (Hoffmann et al., IEEE TMI 2022), which draws its
intensities at random; here they are those of CT.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from data_pipeline import anatomy
from data_pipeline.phantoms import headneck, torso
from data_pipeline.phantoms.canvas import AIR_HU, Canvas, Noise

PHASES = tuple(torso.PHASES)  # without contrast, arterial, portal venous

_MORE = {
    "pre": dict(adrenal=24, thyroid=95, gland=40, heart=42),
    "art": dict(adrenal=62, thyroid=150, gland=75, heart=190),
    "pvp": dict(adrenal=75, thyroid=130, gland=80, heart=140),
}


class Tissue(NamedTuple):
    """How a kind of organ looks.

    Attributes:
        hu: mean, or the name of a value that depends on the contrast phase.
        spread_hu: standard deviation of the mean between patients.
        texture_hu: standard deviation inside.
        detail: what is drawn inside, a key of `_DETAILS`, or "plain".
    """

    hu: float | str
    spread_hu: float
    texture_hu: float
    detail: str = "plain"


# Means of clinical CT. The first row with a word of the organ's name counts.
TISSUES: tuple[tuple[str, Tissue], ...] = (
    ("body skin outline external", Tissue(45.0, 0.0, 0.0, "body")),
    ("cyst cysts", Tissue(8.0, 5.0, 3.0)),
    ("tumour tumor lesion lesions metastasis cancer", Tissue("tumour", 12.0, 9.0)),
    ("nodule nodules", Tissue(30.0, 15.0, 9.0)),
    ("cartilage cartilages", Tissue(115.0, 20.0, 30.0)),
    ("tooth teeth", Tissue(1900.0, 150.0, 200.0)),
    ("canal", Tissue(15.0, 4.0, 3.0)),
    ("cord", Tissue(38.0, 4.0, 3.0)),
    ("brain brainstem cerebellum cerebrum", Tissue(34.0, 2.0, 4.0)),
    ("trachea bronchus bronchi airway sinus sinuses", Tissue(-965.0, 8.0, 4.0)),
    ("lung lungs", Tissue(-840.0, 25.0, 16.0, "lung")),
    (
        "rib ribs vertebra vertebrae spine sacrum hip hips pelvis femur humerus "
        "scapula clavicula clavicle sternum skull mandible maxilla hyoid bone bones",
        Tissue(260.0, 50.0, 45.0, "bone"),
    ),
    ("portal", Tissue("portal", 10.0, 4.0)),
    ("aorta artery arteries carotid trunk", Tissue("artery", 14.0, 4.0)),
    ("vein veins vena cava jugular", Tissue("vein", 12.0, 5.0)),
    ("heart atrium atrial ventricle myocardium", Tissue("heart", 10.0, 6.0, "heart")),
    ("liver", Tissue("liver", 9.0, 5.0, "liver")),
    ("spleen", Tissue("spleen", 8.0, 4.0)),
    ("kidney kidneys", Tissue("cortex", 14.0, 6.0, "kidney")),
    ("pancreas", Tissue("pancreas", 10.0, 13.0)),
    ("adrenal adrenals", Tissue("adrenal", 8.0, 6.0)),
    ("gallbladder", Tissue(10.0, 5.0, 2.0)),
    ("bladder", Tissue(6.0, 4.0, 2.0)),
    ("stomach", Tissue("bowel", 10.0, 6.0, "stomach")),
    (
        "duodenum bowel colon rectum intestine jejunum ileum",
        Tissue("bowel", 10.0, 6.0, "bowel"),
    ),
    ("esophagus oesophagus", Tissue(42.0, 6.0, 8.0)),
    ("parotid parotids", Tissue(-8.0, 14.0, 16.0)),
    ("thyroid", Tissue("thyroid", 15.0, 8.0)),
    ("submandibular salivary gland", Tissue("gland", 8.0, 8.0)),
    ("larynx pharynx tongue", Tissue(55.0, 6.0, 9.0)),
    ("eye eyes globe", Tissue(11.0, 3.0, 3.0)),
    ("lens", Tissue(85.0, 8.0, 4.0)),
    ("prostate uterus ovary", Tissue(50.0, 8.0, 7.0)),
    (
        "muscle muscles autochthon iliopsoas psoas gluteus quadriceps diaphragm",
        Tissue("muscle", 5.0, 8.0),
    ),
    ("fat", Tissue(-102.0, 6.0, 7.0)),
)

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


class _Patient(NamedTuple):
    """What all scans of a patient share, and the phase's values."""

    rng: np.random.Generator
    noise: Noise
    phase: dict[str, float]
    edge_mm: float


def tissue(name: str) -> Tissue | None:
    """Looks up how an organ looks.

    Args:
        name: from a label map, in any of the usual spellings.

    Returns:
        Tissue; None for a name that no row of TISSUES knows.
    """
    words = set(anatomy.words(name))
    for row, found in TISSUES:
        if words & set(row.split()):
            return found
    return None


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
        names: id -> organ; ids that it lacks, and names that `tissue` does not know,
            become soft tissue of a random HU.
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
    values = _values(phase, draws)
    present = {
        i + 1: box
        for i, box in enumerate(ndimage.find_objects(labels))
        if box is not None
    }
    named = {i: str(names.get(i, f"structure {i}")) for i in present}
    rng = _rng("patient", seed)
    canvas = _surroundings(labels, named, present, spacing, values, rng)
    patient = _Patient(rng, canvas.noise, values, float(canvas.edge))
    for i, box in present.items():
        # A stream per organ: what one map lacks does not change the others.
        _paint_organ(canvas, labels, i, box, named[i], spacing, patient, seed)
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


def _values(phase: str, rng: np.random.Generator) -> dict[str, float]:
    """HU of the phase in this patient: more or less contrast medium than usual."""
    native = torso.PHASES["pre"] | _MORE["pre"]
    usual = torso.PHASES[phase] | _MORE[phase]
    strength = rng.uniform(0.75, 1.2)
    return {k: native[k] + strength * (v - native[k]) for k, v in usual.items()}


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
    kinds = {i: tissue(n) or Tissue(0.0, 0.0, 0.0) for i, n in named.items()}
    outline = any(kind.detail == "body" for kind in kinds.values())
    soft = np.zeros(int(labels.max()) + 1, bool)
    for i, kind in kinds.items():
        wall = kind.detail in ("bone", "body") or kind.hu == "muscle"
        soft[i] = not wall and "cartilages" not in words[i]
    around_soft = _distance(soft[labels], spacing, hull="bones" not in structures)
    lift = _lift(labels, upper, canvas, scale[2] * spacing[2])
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


def _lift(labels, upper, canvas, step_mm: float) -> np.ndarray:
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


# --- inside the organs ---


class _Inside(NamedTuple):
    """The voxels of one organ.

    Attributes:
        at: x, y and z of each, mm.
        depth: mm below the organ's surface, of each.
        height: share of the organ's voxels that lie further in front, of each.
        mean: HU of the organ in this patient.
        texture: HU.
    """

    at: tuple[np.ndarray, ...]
    depth: np.ndarray
    mean: float
    texture: np.ndarray
    rng: np.random.Generator


def _paint_organ(canvas, labels, i, box, name, spacing, patient, seed) -> None:
    rng = _rng(f"organ/{name}", seed)
    kind = tissue(name) or Tissue(rng.uniform(15, 110), 0.0, rng.uniform(3, 12))
    if kind.detail == "body":
        return
    mean = patient.phase[kind.hu] if isinstance(kind.hu, str) else kind.hu
    mean = float(mean + kind.spread_hu * np.clip(rng.standard_normal(), -2, 2))
    mask = labels[box] == i
    at = tuple(c[box][mask] for c in (canvas.x, canvas.y, canvas.z))
    if kind.detail == "plain":
        depth = np.zeros(0, np.float32)
    else:
        padded = np.pad(mask, 1)
        depth = ndimage.distance_transform_edt(padded, sampling=spacing)
        depth = depth[1:-1, 1:-1, 1:-1][mask].astype(np.float32)
    scale = 7.0 if kind.texture_hu > 10 else 9.0
    grain = patient.noise(*at, scale, rng.uniform(0, 40))
    texture = np.float32(kind.texture_hu) * grain
    inside = _Inside(at, depth, mean, texture, rng)
    draw = _DETAILS.get(kind.detail, _plain)
    canvas.hu[box][mask] = draw(inside, patient)


def _plain(organ: _Inside, patient: _Patient) -> np.ndarray:
    return organ.mean + organ.texture


def _curves(organ, patient, scale_mm: float, width: float) -> np.ndarray:
    """1 on a web of curved lines, 0 elsewhere: where two noises cross zero at once."""
    shift = organ.rng.uniform(0, 40, 3)
    one, two = (patient.noise(*organ.at, scale_mm, s) for s in shift[:2])
    thick = width * (1 + 0.5 * patient.noise(*organ.at, 2 * scale_mm, shift[2]))
    # What is thinner than a voxel pales, as partial volume does.
    soft = max(0.06, 1.5 * patient.edge_mm / scale_mm)
    return np.clip((thick - np.sqrt(one * one + two * two)) / soft + 0.5, 0, 1)


def _liver(organ: _Inside, patient: _Patient) -> np.ndarray:
    """Parenchyma, portal and hepatic veins, and often lesions."""
    hu = organ.mean + organ.texture + 4 * patient.noise(*organ.at, 45.0, 3.0)
    inner = np.clip((organ.depth - 5) / 4, 0, 1)
    for vessel in ("portal", "vein"):
        web = inner * _curves(organ, patient, 42.0, 0.24)
        hu += web * (patient.phase[vessel] - hu)
    for _ in range(int(organ.rng.poisson(1.6))):
        middle = organ.rng.integers(len(organ.depth))
        radius = organ.rng.uniform(5, 20)
        squares = [(c - c[middle]) ** 2 for c in organ.at]
        distance = np.sqrt(sum(squares)) + 1.5 * patient.noise(*organ.at, 14.0, 7.0)
        cover = np.clip((radius - distance) / patient.edge_mm + 0.5, 0, 1)
        full = patient.phase["tumour"]
        kind = organ.rng.random()
        if kind < 0.25:
            value = 8.0  # a cyst
        elif kind < 0.6:
            value = full
        else:  # little blood: darker than the liver in every phase
            value = 0.5 * (organ.mean + 30.0)
        grain = 7 * patient.noise(*organ.at, 6.0, 11.0) * (kind > 0.25)
        hu += cover * (value + grain - hu)
    return hu


def _kidney(organ: _Inside, patient: _Patient) -> np.ndarray:
    """Cortex outside and between the pyramids."""
    inner = np.clip((organ.depth - 7) / 3, 0, 1)
    pyramid = np.clip(patient.noise(*organ.at, 15.0, 8.0) + 0.8, 0, 1)
    change = patient.phase["medulla"] - patient.phase["cortex"]
    return organ.mean + organ.texture + inner * pyramid * change


def _lung(organ: _Inside, patient: _Patient) -> np.ndarray:
    """Denser at the back; vessels that thin out towards the surface."""
    hu = organ.mean + 0.3 * organ.at[1] + organ.texture
    hu += 9 * patient.noise(*organ.at, 40.0, 2.0)
    for scale, width in ((34.0, 0.12), (20.0, 0.09)):
        central = np.clip(organ.depth / 30, 0.25, 1)
        web = _curves(organ, patient, scale, width) * np.clip(organ.depth / 5, 0, 1)
        hu += web * central * (40 - hu)
    return hu


def _bone(organ: _Inside, patient: _Patient) -> np.ndarray:
    """A dense rim, spongy inside."""
    rim_mm = max(2.2, 0.8 * patient.edge_mm)
    rim = np.clip((rim_mm - organ.depth) / rim_mm + 0.7, 0, 1)
    dense = organ.mean + organ.rng.uniform(330, 520)
    return organ.mean + organ.texture + rim * (dense - organ.mean - organ.texture)


def _heart(organ: _Inside, patient: _Patient) -> np.ndarray:
    """Chambers, full of blood of two kinds, in muscle."""
    wall = 0.5 * (patient.phase["muscle"] + organ.mean)
    hu = wall + organ.texture
    noise = patient.noise(*organ.at, 55.0, organ.rng.uniform(0, 40))
    inner = np.clip((organ.depth - 7) / 4, 0, 1) * np.clip(3 * np.abs(noise), 0, 1)
    blood = np.where(noise > 0, patient.phase["artery"], patient.phase["vein"])
    return hu + inner * (blood - hu)


def _stomach(organ: _Inside, patient: _Patient) -> np.ndarray:
    """A wall, and gas over fluid or food: the patient lies on the back."""
    inner = np.clip((organ.depth - 4) / patient.edge_mm + 0.5, 0, 1)
    food = organ.rng.uniform(5, 70) + organ.rng.uniform(3, 16) * patient.noise(
        *organ.at, 12.0, 5.0
    )
    y = organ.at[1]
    level = np.quantile(y, organ.rng.uniform(0.02, 0.4))
    gas = np.clip((level - y) / patient.edge_mm + 0.5, 0, 1)
    content = food + gas * (-940 - food)
    hu = organ.mean + organ.texture
    return hu + inner * (content - hu)


def _bowel(organ: _Inside, patient: _Patient) -> np.ndarray:
    """A wall, and fluid, stool or gas."""
    inner = np.clip((organ.depth - 3) / patient.edge_mm + 0.5, 0, 1)
    what = patient.noise(*organ.at, 32.0, organ.rng.uniform(0, 40))
    stool = -10 + 60 * patient.noise(*organ.at, 8.0, 9.0)
    content = np.where(what > 0.2, stool, 15.0)
    gas = np.clip((what - 0.5 - organ.at[1] / 150) * 8, 0, 1)
    content = content + gas * (-900 - content)
    hu = organ.mean + organ.texture
    return hu + inner * (content - hu)


_DETAILS: dict[str, Callable[[_Inside, _Patient], np.ndarray]] = {
    "liver": _liver,
    "kidney": _kidney,
    "lung": _lung,
    "bone": _bone,
    "heart": _heart,
    "stomach": _stomach,
    "bowel": _bowel,
}
