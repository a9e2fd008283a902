"""Chest and abdomen: neck to pelvis."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from data_pipeline.phantoms import parts, shapes
from data_pipeline.phantoms.canvas import Canvas

# Blood and organ HU by contrast phase: textbook values of clinical CT.
PHASES = {
    "pre": dict(artery=42, portal=40, vein=40, liver=56, spleen=48, cortex=34),
    "art": dict(artery=290, portal=95, vein=75, liver=72, spleen=135, cortex=185),
    "pvp": dict(artery=150, portal=175, vein=145, liver=112, spleen=120, cortex=185),
}
PHASES["pre"] |= dict(medulla=32, pancreas=38, bowel=38, tumour=42, muscle=52)
PHASES["art"] |= dict(medulla=70, pancreas=108, bowel=80, tumour=130, muscle=56)
PHASES["pvp"] |= dict(medulla=165, pancreas=95, bowel=85, tumour=78, muscle=60)


_BODY_Z = (-300, -230, -150, -50, 50, 130, 175, 205, 235, 260, 300)
_BODY_X = (168, 165, 152, 150, 156, 164, 176, 168, 100, 64, 60)
_BODY_Y = (104, 106, 106, 110, 112, 108, 94, 80, 66, 58, 58)
_RIB_Z = (-140, -100, -60, 0, 60, 110, 150, 180, 205, 216)
_RIB_X = (124, 128, 131, 131, 125, 113, 93, 66, 34, 18)
_RIB_Y = (84, 87, 92, 95, 92, 83, 69, 52, 30, 18)


class _Trunk(NamedTuple):
    """The torso's walls: signed distances [X, Y, Z] in mm, negative inside."""

    fat_mm: float
    skin: np.ndarray
    cage: np.ndarray  # outer surface of the ribs
    roof: np.ndarray  # negative below the diaphragm
    belly: np.ndarray  # the abdominal cavity


def _trunk(canvas: Canvas, rng: np.random.Generator) -> _Trunk:
    x, y, z = canvas.x, canvas.y, canvas.z
    fat_mm = float(np.clip(14 + 5 * shapes.normal(rng), 6, 25))
    rib_x, rib_y = 1 + 0.03 * shapes.normal(rng, 2)
    right, left = np.array([6.0, -6.0]) + 5 * shapes.normal(rng, 2)
    rx, ry = (shapes.profile(z, _BODY_Z, v) + fat_mm - 12 for v in (_BODY_X, _BODY_Y))
    skin = shapes.radial(x, y - 4, rx, ry, 2.35)
    skin -= np.float32(1.5) * canvas.noise(x, y, z, 70.0, 2.0)
    rx, ry = (
        rib_x * shapes.profile(z, _RIB_Z, _RIB_X),
        rib_y * shapes.profile(z, _RIB_Z, _RIB_Y),
    )
    cage = shapes.radial(x, y - 2, rx.astype(np.float32), ry.astype(np.float32), 2.2)
    # Two domes, lower at the back and the sides.
    one = 0.0062 * ((x + 58) ** 2 + 1.15 * (y + 8) ** 2) - np.float32(right)
    two = 0.0072 * ((x - 58) ** 2 + 1.15 * (y + 6) ** 2) - np.float32(left)
    roof = z + shapes.smooth_min(one, two, 14.0)
    return _Trunk(fat_mm, skin, cage, roof, _belly(fat_mm, skin, cage, roof, z))


def _belly(fat_mm, skin, cage, roof, z) -> np.ndarray:
    """Below the diaphragm, inside muscles and ribs."""
    belly = np.maximum(skin + np.float32(fat_mm + 13), np.float32(0.7) * roof)
    return np.maximum(belly, np.where(z > -110, cage + 10, np.float32(-50)))


def paint(canvas: Canvas, rng: np.random.Generator, variant: str) -> None:
    """Neck to pelvis; z = 0 is the top of the diaphragm."""
    draw, trunk = shapes.Draw(rng), _trunk(canvas, rng)
    phase = PHASES[variant if variant in PHASES else "pvp"]
    parts.paint_layers(canvas, trunk.skin, np.float32(trunk.fat_mm), phase["muscle"])
    _paint_bowel(canvas, draw, trunk, phase)
    _paint_belly_organs(canvas, draw, trunk, phase)
    _paint_lungs(canvas, draw, trunk, variant)
    _paint_mediastinum(canvas, draw, phase)
    _paint_lung_vessels(canvas, draw)
    _paint_torso_bones(canvas, draw, trunk)


def surround(
    canvas: Canvas,
    rng: np.random.Generator,
    *,
    phase: dict[str, float],
    structures: Collection[str],
    around_all: np.ndarray,
    around_soft: np.ndarray,
    lift: np.ndarray,
) -> None:
    """A torso that holds organs which will be painted over it.

    Args:
        canvas: at the points of the organs' map.
        rng: of the subject.
        phase: from PHASES.
        structures: which of "bowel", "lungs", "mediastinum", "bones", "spine" to
            paint; the spine only with bones.
        around_all: [X, Y, Z] mm from the nearest structure of the map.
        around_soft: [X, Y, Z] mm from the nearest one inside the ribs.
        lift: [X, Y, 1] mm by which the diaphragm lies higher than usual.
    """
    draw, trunk = shapes.Draw(rng), _trunk(canvas, rng)
    fat_mm = np.float32(trunk.fat_mm)
    skin = shapes.smooth_min(trunk.skin, around_all - (fat_mm + 9), 12.0)
    cage = around_soft - 12  # where the map's own ribs are
    if "bones" in structures:
        cage = shapes.smooth_min(trunk.cage, cage, 8.0)
    skin = shapes.smooth_min(skin, cage - fat_mm, 30.0)
    roof = trunk.roof - lift
    belly = _belly(trunk.fat_mm, skin, cage, roof, canvas.z)
    belly = np.maximum(belly, cage - 8)  # then 12 mm of muscle, then fat
    trunk = _Trunk(trunk.fat_mm, skin, cage, roof, belly)
    # Far from ribs and organs lies fat, but for the shoulders.
    far = np.maximum(cage - 20 - np.maximum(canvas.z - 100, 0), 0)
    parts.paint_layers(canvas, skin, fat_mm + 20 * far, phase["muscle"])
    if "bowel" in structures:
        _paint_bowel(canvas, draw, trunk, phase)
    else:
        box = shapes.box((-170, -125, -450), (170, 110, 30))
        canvas.paint(box, -102, texture=7, limit=belly)
    if "lungs" in structures:
        _paint_lungs(canvas, draw, trunk, "scan")
    else:
        chest = np.maximum(cage + 9, -roof)
        box = shapes.box((-140, -105, -110), (140, 105, 215))
        canvas.paint(box, -92, texture=14, limit=chest)
    if "mediastinum" in structures:
        _paint_mediastinum(canvas, draw, phase)
    if "lungs" in structures:
        _paint_lung_vessels(canvas, draw)
    if "bones" in structures:
        _paint_torso_bones(canvas, draw, trunk, spine="spine" in structures)


def _paint_bowel(canvas, draw, trunk, phase) -> None:
    """Fat of the belly, muscles behind it, colon and small bowel."""
    cavity = shapes.box((-170, -125, -450), (170, 110, 30))
    canvas.paint(cavity, -102, texture=7, limit=trunk.belly)
    for side in (-1, 1):
        psoas = [(28, 52, -80), (40, 56, -150), (66, 34, -240), (80, 0, -300)]
        radii = draw.size(9, 19, 23, 20)
        canvas.paint(
            shapes.tube(shapes.mirror(psoas, side), radii), phase["muscle"], texture=6
        )
    loops = []
    for _ in range(46):
        start = np.array([0, -38, -185]) + draw.rng.uniform(-1, 1, 3) * (82, 34, 78)
        step = draw.rng.standard_normal(3) * (26, 14, 16)
        loops.append((start, start + step, draw.rng.uniform(9, 14), draw.rng.random()))
    for start, end, radius, gas in loops:
        wall, inner = (shapes.tube([start, end], r) for r in (radius, 0.68 * radius))
        rough = dict(bump=1.5, bump_scale=20, limit=trunk.belly)
        canvas.paint(wall, phase["bowel"], **rough)
        canvas.paint(inner, -850 if gas > 0.85 else 18, texture=12, **rough)
    colon = [
        [draw.place(104, 12, -245), (106, 8, -190), draw.place(100, -2, -132)],
        [draw.place(98, -30, -122), (0, -78, -140), draw.place(-95, -38, -118)],
        [draw.place(-106, 18, -100), (-108, 26, -180), (-92, 20, -250)],
    ]

    def stool(x, y, z, d):
        speckle = canvas.noise(x, y, z, 8.0, 9.0)
        gas = (canvas.noise(x, y, z, 34.0, 6.0) - y / 60 > 1.3) & (d < 0)
        return np.where(gas, -880, -20 + 85 * speckle - 60 * (speckle < -1))

    for line in colon:
        rough = dict(bump=3, bump_scale=26, limit=trunk.belly)
        canvas.paint(shapes.tube(line, 23), phase["bowel"], **rough)
        canvas.paint(shapes.tube(line, 19.5), stool, **rough)


def _paint_belly_organs(canvas, draw, trunk, phase) -> None:
    """The thirteen organs of the abdominal vocabulary."""
    below = trunk.belly + 3
    _paint_belly_vessels(canvas, draw, phase)
    pancreas = [
        draw.place(-30, -18, -112),
        (-16, -34, -92),
        (26, -16, -82),
        draw.place(72, 20, -62),
    ]
    canvas.paint(
        shapes.tube(pancreas, draw.size(15, 12, 10, 10), (1, 0.9, 1.1)),
        phase["pancreas"],
        "pancreas",
        bump=2.5,
        bump_scale=16,
        texture=14,
        texture_scale=6,
        limit=trunk.belly,
    )
    for side, name in ((1, "left"), (-1, "right")):
        center = draw.place(side * 62, 54, -108 if side > 0 else -120)
        _paint_kidney(canvas, center, draw.size(28, 27, 55), side, name, phase)
        top = center + (-side * 22, -20, 46)
        limbs = [top + (-side * 3, -14, 4), top, top + (side * 9, 12, -10)]
        canvas.paint(
            shapes.tube(limbs, 4.2, (1, 1, 2.4)), 75, f"{name}_adrenal_gland", bump=0.8
        )
    spleen = shapes.ellipsoid(draw.place(98, 38, -50, sd=3), draw.size(34, 44, 56), 0.5)
    mottle = 30 if phase is PHASES["art"] else 6
    canvas.paint(
        spleen,
        phase["spleen"],
        "spleen",
        bump=3,
        texture=mottle,
        texture_scale=16,
        limit=below,
    )
    _paint_stomach(canvas, draw, below)
    _paint_liver(canvas, draw, below, phase)


def _paint_belly_vessels(canvas, draw, phase) -> None:
    trunk_line = [(16, 40, 40), (10, 34, -40), (4, 30, -130), (2, 26, -205)]
    aorta = shapes.tube(trunk_line, draw.size(12.5, 11.5, 10, 9))
    legs = [
        shapes.tube([(2, 26, -203), (side * 34, 30, -265), (side * 50, 10, -310)], 6.5)
        for side in (-1, 1)
    ]
    canvas.paint(shapes.union(aorta, *legs, blend=4), phase["artery"], "aorta")
    cava = [(-20, -2, 12), (-24, 14, -60), (-26, 24, -140), (-20, 30, -215)]
    canvas.paint(
        shapes.tube(cava, draw.size(12, 11, 11, 10), (1.15, 0.9, 1)),
        phase["vein"],
        "inferior_vena_cava",
    )
    for side in (-1, 1):
        canvas.paint(
            shapes.tube([(side * 4, 28, -100), (side * 44, 46, -112)], 3),
            phase["artery"],
        )
    canvas.paint(
        shapes.tube([(4, 24, -90), (4, 4, -104), (0, -22, -190)], 4), phase["artery"]
    )
    canvas.paint(shapes.tube([(-6, -6, -98), (-10, -26, -190)], 5.5), phase["portal"])
    confluence = draw.place(-8, -8, -92, sd=2)
    vein = shapes.tube(
        [(-42, -10, -56), confluence, (30, 4, -76), (80, 30, -58)], (7.5, 7.5, 5.5, 5)
    )
    canvas.paint(vein, phase["portal"], "portal_and_splenic_vein")


def _paint_kidney(canvas, center, radii, side, name, phase) -> None:
    kidney = shapes.ellipsoid(center, radii, side * 0.45)
    hilum = shapes.ellipsoid(center + (-side * 19, -9, 0), (14, 11, 19))

    def tissue(x, y, z, d):
        """Cortex outside, pyramids inside."""
        cortex = np.clip((d + 8) / 2, 0, 1)
        pyramid = np.clip(canvas.noise(x, y, z, 16.0, 8.0) + 0.8, 0, 1) * (1 - cortex)
        return phase["cortex"] + pyramid * (phase["medulla"] - phase["cortex"])

    canvas.paint(kidney, tissue, f"{name}_kidney", bump=1.2)
    canvas.paint(hilum, -75, bump=3, bump_scale=14, texture=30)


def _paint_stomach(canvas, draw, limit) -> None:
    line = [
        draw.place(52, 16, -20),
        draw.place(66, -22, -56),
        (36, -62, -98),
        (-16, -50, -100),
    ]
    radii = draw.size(30, 31, 22, 13)
    gullet = shapes.tube([(20, 26, 20), (26, 22, -8), (40, 14, -20)], 7.5)
    canvas.paint(gullet, 42, "esophagus", texture=6)
    canvas.paint(shapes.tube(line, radii), 72, "stomach", bump=3, limit=limit)

    def food(x, y, z, d):
        """Gas rises to the front of a patient who lies on the back."""
        level = np.clip((y + 42) / canvas.edge + 0.5, 0, 1)
        return -930 + level * (960 + 14 * canvas.noise(x, y, z, 12.0))

    canvas.paint(shapes.tube(line, radii - 5), food, bump=3, keep=True, limit=limit + 5)


def _paint_liver(canvas, draw, limit, phase) -> None:
    right = shapes.ellipsoid(draw.place(-66, -6, -52), draw.size(74, 84, 84, rel=0.07))
    left = shapes.ellipsoid(draw.place(8, -52, -34), draw.size(66, 38, 34, rel=0.14))

    # The hollow under the liver, where kidney and bowel lie.
    hollow = shapes.ellipsoid((-30, 24, -128), (62, 60, 62)).sdf
    limit = np.maximum(limit, -hollow(canvas.x, canvas.y, canvas.z))
    liver = shapes.union(right, left, blend=24)
    canvas.paint(
        liver, phase["liver"], "liver", bump=3.5, bump_scale=55, texture=5, limit=limit
    )
    inside = np.where(canvas.labels == canvas.code("liver"), np.float32(-9), 9)
    detail = dict(keep=True, limit=inside)
    vein_hu = 0.5 * (phase["vein"] + phase["portal"])
    hub = np.array([-44, -10, -56.0])
    for _ in range(9):
        end = np.array([-70, -8, -48]) + draw.rng.uniform(-1, 1, 3) * (58, 62, 46)
        middle = 0.5 * (hub + end) + 8 * draw.rng.standard_normal(3)
        tree = shapes.tube([hub, middle, end], (5, 3.4, 1.6))
        canvas.paint(tree, phase["portal"], **detail)
    for x_end, y_end in ((-118, 20), (-82, -62), (-10, -46)):
        end = draw.place(x_end, y_end, -50, sd=8)
        middle = 0.5 * (end + (-22, 2, -8)) + draw.place(0, 0, 6)
        tree = shapes.tube([(-22, 2, -4), middle, end], (5.5, 4, 2))
        canvas.paint(tree, vein_hu, **detail)
    for _ in range(2):
        spot = np.array([-76, -6, -56]) + draw.rng.uniform(-1, 1, 3) * (48, 48, 34)
        size = draw.rng.uniform(7, 15)
        tumour = shapes.ellipsoid(spot, draw.size(size, size, size))
        canvas.paint(tumour, phase["tumour"], bump=1.2, texture=9, **detail)
    sac = [draw.place(-44, -40, -94), draw.place(-54, -56, -122)]
    canvas.paint(shapes.tube(sac, draw.size(10, 15)), 9, "gallbladder")


def _paint_lungs(canvas, draw, trunk, variant) -> None:
    """Diaphragm, and both lungs beside a mediastinum of fat."""
    x, y, z = canvas.x, canvas.y, canvas.z
    box = shapes.box((-140, -105, -110), (140, 105, 215))
    chest = np.maximum(trunk.cage + 9, -trunk.roof)
    canvas.paint(box, -92, texture=14, limit=chest)
    muscle = np.maximum(np.abs(trunk.roof + 1.5) - 2.5, trunk.cage + 8)
    canvas.paint(box, 52, keep=True, limit=muscle)  # the diaphragm
    # Breathing out leaves the same tissue in less air.
    base = {"exp": -790, "insp": -872}.get(
        variant, -845 + 15 * float(shapes.normal(draw.rng))
    )
    middle = 4 + 3 * float(shapes.normal(draw.rng))
    outer = np.maximum(trunk.cage + np.float32(10.5), 2 - trunk.roof)
    front, rear = np.clip(-y / 80 - 0.35, 0, 1), np.clip(y / 80, 0, 1)
    waves = draw.rng.uniform(0, 2 * np.pi, 4)

    def tissue(x, y, z, d):
        """Denser at the back, where the blood sinks."""
        grain = 15 * canvas.noise(x, y, z, 7.0, 1.0)
        return base + 32 * (y / 90) + grain + 10 * canvas.noise(x, y, z, 40.0)

    for side, name in ((1, "lung_left"), (-1, "lung_right")):
        gap = 20 - 13 * front * (z > 0) + 8 * rear
        gap = gap + _medial_side(side, y, z, waves[side + 1 :][:2])
        lung = -shapes.smooth_min(-outer, side * (x - middle) - gap, 12.0)
        canvas.paint(box, tissue, name, limit=lung.astype(np.float32))


def _medial_side(side: int, y, z, phases) -> np.ndarray:
    """[1, Y, Z] mm by which heart, vessels and hilum press into a lung."""

    def press(depth, y_mm, y_width, z_mm, z_width):
        place = ((y - y_mm) / y_width) ** 2 + ((z - z_mm) / z_width) ** 2
        return depth * np.exp(-place)

    hilum = press(6, 12, 35, 80, 16)
    if side > 0:  # the heart, and the arch of the aorta
        own = 12 * np.exp(-(((z - 62) / 45) ** 2)) + press(8, 15, 35, 128, 18)
    else:  # the right atrium, and the vena cava above it
        own = press(24, -22, 55, 18, 28) + press(12, -6, 32, 122, 30)
    wavy = np.sin(z / 17 + phases[0] + y / 60) + np.sin(y / 15 + phases[1] - z / 50)
    return hilum + own + 2.5 * wavy


def _paint_lung_vessels(canvas, draw) -> None:
    """Arteries, veins and airways that fan out from each hilum."""
    codes = [canvas.code("lung_left"), canvas.code("lung_right")]
    lungs = np.where(np.isin(canvas.labels, codes), np.float32(-9), 9)
    detail = dict(keep=True, limit=lungs)
    for side in (-1, 1):
        hub = np.array([side * 32, 16, 78.0])
        for _ in range(64):
            end = np.array([side * 76, 0, 62]) + draw.rng.uniform(-1, 1, 3) * (
                48,
                82,
                122,
            )
            bend = (
                hub + (end - hub) * (0.40, 0.45, 0.55) + 8 * draw.rng.standard_normal(3)
            )
            late = bend + 0.55 * (end - bend) + 6 * draw.rng.standard_normal(3)
            twig = late + draw.rng.standard_normal(3) * (14, 18, 18)
            size = draw.rng.uniform(2.6, 4.8)
            line = shapes.tube(
                [hub, bend, late, end], size * np.array([1, 0.65, 0.45, 0.25])
            )
            canvas.paint(line, 50, **detail)
            canvas.paint(
                shapes.tube([bend, twig], size * np.array([0.5, 0.25])), 50, **detail
            )
        for _ in range(5):
            end = np.array([side * 66, 4, 66]) + draw.rng.uniform(-1, 1, 3) * (
                20,
                36,
                60,
            )
            canvas.paint(shapes.tube([hub, end], (5.0, 2.2)), 0, **detail)
            canvas.paint(shapes.tube([hub, end], (3.4, 0.9)), -960, **detail)


def _paint_mediastinum(canvas, draw, phase) -> None:
    """Heart, great vessels, airway, gullet."""
    artery, vein = phase["artery"], phase["vein"]
    gullet = [draw.place(3, 24, 230, sd=2), (2, 30, 150), (6, 34, 60), (20, 26, 12)]
    canvas.paint(shapes.tube(gullet, draw.size(8, 8, 8, 8)), 40, "esophagus", texture=8)
    center = draw.place(20, -34, 34, sd=3)
    heart = shapes.ellipsoid(center, draw.size(58, 44, 45, rel=0.07), 0.55)
    canvas.paint(shapes.ellipsoid(center, (62, 48, 48), 0.55), -70, bump=2)
    canvas.paint(heart, 105, "heart", bump=2.5, texture=5)
    for shift, radii, hu in (
        ((20, 0, -6), (27, 16, 21), artery),
        ((-12, -18, 2), (26, 13, 24), vein),
        ((2, 24, 16), (28, 11, 15), artery),
        ((-34, 6, 10), (15, 18, 22), vein),
    ):
        room = shapes.ellipsoid(center + shift, draw.size(*radii), 0.5)
        canvas.paint(room, hu, keep=True, bump=1.5)
    ascending = [
        (2, -24, 58),
        (-8, -26, 98),
        (0, -14, 124),
        (16, 14, 126),
        (22, 36, 108),
    ]
    arch = shapes.tube(ascending, draw.size(15, 15, 14, 13, 12.5, rel=0.06))
    down = shapes.tube([(22, 36, 108), (22, 44, 50), (14, 40, -10)], (12.5, 12, 11.5))
    canvas.paint(shapes.union(arch, down), artery, "aorta")
    for x_end in (-18, 8, 26):
        canvas.paint(shapes.tube([(x_end / 2, -4, 128), (x_end, -4, 215)], 5), artery)
    canvas.paint(
        shapes.tube([(-26, -14, 165), (-26, -14, 100), (-22, -12, 66)], (8, 9.5, 10)),
        vein,
    )
    canvas.paint(shapes.tube([(-26, -14, 165), (30, -24, 170)], 6.5), vein)
    root = [(14, -36, 66), (12, -18, 88)]
    canvas.paint(shapes.tube(root, 14), vein)
    for side in (-1, 1):
        canvas.paint(
            shapes.tube([(12, -16, 88), (side * 30 + 2, 8, 80)], (12, 9)), vein
        )
        canvas.paint(shapes.tube([(side * 34, 22, 62), (8, 16, 58)], (6, 9)), artery)
    windpipe = [(0, 6, 260), draw.place(0, 8, 180, sd=2), (1, 16, 108)]
    main = [
        shapes.tube([(1, 16, 108), (side * 32, 20, 82)], (8.5, 6)) for side in (-1, 1)
    ]
    canvas.paint(shapes.union(shapes.tube(windpipe, 10.5), *main), 35, "trachea")
    main = [
        shapes.tube([(1, 16, 108), (side * 34, 20, 81)], (6.8, 4.6)) for side in (-1, 1)
    ]
    canvas.paint(shapes.union(shapes.tube(windpipe, 8.6), *main), -975, keep=True)
    for side in (-1, 1):
        lobe = shapes.ellipsoid((side * 18, -4, 236), (9, 11, 20))
        canvas.paint(lobe, 120, texture=9)


def _paint_torso_bones(canvas, draw, trunk, *, spine: bool = True) -> None:
    """Ribs, spine, breast bone, shoulder, pelvis."""
    drop, pitch = 62 + 8 * shapes.normal(draw.rng), 25.5

    x, y, z = canvas.x, canvas.y, canvas.z
    angle = np.arctan2(np.abs(x), y - 2)  # 0 at the back
    along = z + np.float32(drop) * (1 - np.cos(np.minimum(angle, 2.4))) / 2
    level = (along / pitch - np.floor(along / pitch) - 0.5) * np.float32(pitch)
    deep = (trunk.cage + np.float32(4.5)) / np.float32(4.2)
    ribs = (np.sqrt(deep * deep + (level / np.float32(6.4)) ** 2) - 1) * np.float32(4.5)
    ends = np.maximum(np.maximum(-88 - along, along - 200), (0.25 - angle) * 60)
    ribs = np.maximum(ribs, ends)
    box = shapes.box((-145, -110, -160), (145, 105, 215))
    gristle = np.maximum(ribs, (2.35 - angle) * 60)
    canvas.paint(box, 125, texture=40, limit=gristle)
    bony = np.maximum(ribs, (angle - 2.35) * 60)
    canvas.paint(box, parts.bone(canvas, 820, 260, 1.8), limit=bony)

    def body_y(z):
        return np.float32(52) + np.float32(8) * np.sin((z + 30) / np.float32(76))

    for side in (-1, 1):
        erector = [(30, 92, -300), (32, 92, -100), (28, 92, 60), (22, 84, 180)]
        shape = shapes.tube(
            shapes.mirror(erector, side), draw.size(21, 20, 15, 12), (1.35, 1, 1)
        )
        canvas.paint(shape, 56, texture=9)
    column = parts.Column(body_y, (20, 15.5), 27.0, 25, 9.5, 20, -310, 330)
    if spine:
        parts.paint_spine(canvas, column, "spine", None)
    sternum = shapes.tube(
        [(0, -88, 28), (0, -92, 80), (0, -76, 136), (0, -62, 162)],
        (4, 5, 6, 7),
        (3.4, 1, 1),
    )
    canvas.paint(sternum, parts.bone(canvas, 520, 160))
    for side in (-1, 1):
        collar = shapes.mirror([(14, -52, 168), (70, -46, 190), (138, -6, 204)], side)
        canvas.paint(shapes.tube(collar, (9, 6, 8)), parts.bone(canvas, 900, 260))
        blade = shapes.ellipsoid(
            draw.place(side * 104, 74, 138), (42, 5, 58), side * -0.5
        )
        canvas.paint(blade, parts.bone(canvas, 760, 330))
        canvas.paint(
            shapes.ellipsoid((side * 150, 14, 196), (24, 24, 26)),
            parts.bone(canvas, 720, 240),
        )
        wing = shapes.tube(
            shapes.mirror([(62, 66, -225), (104, 20, -238), (112, -22, -258)], side),
            6,
            (1, 1, 6),
        )
        canvas.paint(wing, parts.bone(canvas, 780, 260))
    sacrum = shapes.ellipsoid((0, 74, -272), (50, 18, 50))
    if spine:
        canvas.paint(sacrum, parts.bone(canvas, 480, 230), "spine")
