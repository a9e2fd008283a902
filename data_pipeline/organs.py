"""How organs look in CT: HU by name, contrast phase and patient, and their inside."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from data_pipeline import anatomy
from data_pipeline.phantoms import torso
from data_pipeline.phantoms.canvas import Canvas, Noise

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


class Patient(NamedTuple):
    """What the organs of a scan share.

    Attributes:
        noise: the patient's, a function of position.
        phase: from `phase_values`.
        edge_mm: of a voxel.
    """

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


def phase_values(phase: str, rng: np.random.Generator) -> dict[str, float]:
    """Draws a patient's HU by what depends on the contrast phase.

    Args:
        phase: of torso.PHASES.
        rng: of the patient: more or less contrast medium than usual.

    Returns:
        Name, as `Tissue.hu` may be -> HU.
    """
    native = torso.PHASES["pre"] | _MORE["pre"]
    usual = torso.PHASES[phase] | _MORE[phase]
    strength = rng.uniform(0.75, 1.2)
    return {k: native[k] + strength * (v - native[k]) for k, v in usual.items()}


class _Inside(NamedTuple):
    """The voxels of one organ.

    Attributes:
        at: x, y and z of each, mm.
        depth: mm below the organ's surface, of each.
        mean: HU of the organ in this patient.
        texture: HU to be added, of each.
        rng: of the organ.
    """

    at: tuple[np.ndarray, ...]
    depth: np.ndarray
    mean: float
    texture: np.ndarray
    rng: np.random.Generator


def paint_organ(
    canvas: Canvas,
    mask: np.ndarray,
    box: tuple[slice, ...],
    name: str,
    *,
    spacing: tuple[float, ...],
    patient: Patient,
    rng: np.random.Generator,
) -> None:
    """Covers the canvas where an organ lies.

    Args:
        canvas: to be painted.
        mask: [x, y, z] bool, the organ within `box`.
        box: where mask lies on the canvas.
        name: of the organ.
        spacing: (x, y, z) voxel edges, mm.
        patient: see Patient.
        rng: of this organ in this patient.
    """
    kind = tissue(name) or Tissue(rng.uniform(15, 110), 0.0, rng.uniform(3, 12))
    if kind.detail == "body":
        return
    mean = patient.phase[kind.hu] if isinstance(kind.hu, str) else kind.hu
    mean = float(mean + kind.spread_hu * np.clip(rng.standard_normal(), -2, 2))
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


def _plain(organ: _Inside, patient: Patient) -> np.ndarray:
    return organ.mean + organ.texture


def _curves(organ, patient, scale_mm: float, width: float) -> np.ndarray:
    """1 on a web of curved lines, 0 elsewhere: where two noises cross zero at once."""
    shift = organ.rng.uniform(0, 40, 3)
    one, two = (patient.noise(*organ.at, scale_mm, s) for s in shift[:2])
    thick = width * (1 + 0.5 * patient.noise(*organ.at, 2 * scale_mm, shift[2]))
    # What is thinner than a voxel pales, as partial volume does.
    soft = max(0.06, 1.5 * patient.edge_mm / scale_mm)
    return np.clip((thick - np.sqrt(one * one + two * two)) / soft + 0.5, 0, 1)


def _liver(organ: _Inside, patient: Patient) -> np.ndarray:
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


def _kidney(organ: _Inside, patient: Patient) -> np.ndarray:
    """Cortex outside and between the pyramids."""
    inner = np.clip((organ.depth - 7) / 3, 0, 1)
    pyramid = np.clip(patient.noise(*organ.at, 15.0, 8.0) + 0.8, 0, 1)
    change = patient.phase["medulla"] - patient.phase["cortex"]
    return organ.mean + organ.texture + inner * pyramid * change


def _lung(organ: _Inside, patient: Patient) -> np.ndarray:
    """Denser at the back; vessels that thin out towards the surface."""
    hu = organ.mean + 0.3 * organ.at[1] + organ.texture
    hu += 9 * patient.noise(*organ.at, 40.0, 2.0)
    for scale, width in ((34.0, 0.12), (20.0, 0.09)):
        central = np.clip(organ.depth / 30, 0.25, 1)
        web = _curves(organ, patient, scale, width) * np.clip(organ.depth / 5, 0, 1)
        hu += web * central * (40 - hu)
    return hu


def _bone(organ: _Inside, patient: Patient) -> np.ndarray:
    """A dense rim, spongy inside."""
    rim_mm = max(2.2, 0.8 * patient.edge_mm)
    rim = np.clip((rim_mm - organ.depth) / rim_mm + 0.7, 0, 1)
    dense = organ.mean + organ.rng.uniform(330, 520)
    return organ.mean + organ.texture + rim * (dense - organ.mean - organ.texture)


def _heart(organ: _Inside, patient: Patient) -> np.ndarray:
    """Chambers, full of blood of two kinds, in muscle."""
    wall = 0.5 * (patient.phase["muscle"] + organ.mean)
    hu = wall + organ.texture
    noise = patient.noise(*organ.at, 55.0, organ.rng.uniform(0, 40))
    inner = np.clip((organ.depth - 7) / 4, 0, 1) * np.clip(3 * np.abs(noise), 0, 1)
    blood = np.where(noise > 0, patient.phase["artery"], patient.phase["vein"])
    return hu + inner * (blood - hu)


def _stomach(organ: _Inside, patient: Patient) -> np.ndarray:
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


def _bowel(organ: _Inside, patient: Patient) -> np.ndarray:
    """A wall, and fluid, stool or gas."""
    inner = np.clip((organ.depth - 3) / patient.edge_mm + 0.5, 0, 1)
    what = patient.noise(*organ.at, 32.0, organ.rng.uniform(0, 40))
    stool = -10 + 60 * patient.noise(*organ.at, 8.0, 9.0)
    content = np.where(what > 0.2, stool, 15.0)
    gas = np.clip((what - 0.5 - organ.at[1] / 150) * 8, 0, 1)
    content = content + gas * (-900 - content)
    hu = organ.mean + organ.texture
    return hu + inner * (content - hu)


_DETAILS: dict[str, Callable[[_Inside, Patient], np.ndarray]] = {
    "liver": _liver,
    "kidney": _kidney,
    "lung": _lung,
    "bone": _bone,
    "heart": _heart,
    "stomach": _stomach,
    "bowel": _bowel,
}
