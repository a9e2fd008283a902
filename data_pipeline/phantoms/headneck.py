"""Head, neck and shoulders."""

from collections.abc import Callable

import numpy as np

from data_pipeline.phantoms import parts, shapes
from data_pipeline.phantoms.canvas import Canvas


def paint(canvas: Canvas, rng: np.random.Generator) -> None:
    """Head, neck and shoulders; z = 0 is the level of the ears' lower end."""

    draw = shapes.Draw(rng)
    skull = draw.size(75, 94, 86, rel=0.03)
    cavity = _cranial_cavity(skull)
    canal_y = _neck_curve(rng)
    _paint_head_surface(canvas, rng, skull, canal_y)
    _paint_neck(canvas, draw, canal_y)
    _paint_face(canvas, draw)
    _paint_skull(canvas, draw, cavity)
    column = parts.Column(
        lambda z: canal_y(z) - 18, (12.5, 9), 18.5, 18, 8.5, 22, -200, 4
    )
    parts.paint_spine(canvas, column, None, "SpinalCord")
    stem = shapes.tube(
        [draw.place(0, 10, 40, sd=1), (0, 18, 18), (0, canal_y(0), 2)],
        draw.size(14, 11, 6.5),
    )
    canvas.paint(stem, 33, "Brainstem", texture=3)
    _paint_airway(canvas, draw, canal_y)


def _neck_curve(rng: np.random.Generator) -> Callable:
    """y of the spinal canal against z: lordosis, different in everyone."""
    bend, lean = 9 + 5 * shapes.normal(rng), 12 + 5 * shapes.normal(rng)

    def canal_y(z):
        t = np.clip(-z / np.float32(160), -0.1, 1.3)
        return np.float32(25) - bend * np.sin(np.pi * t) + lean * t

    return canal_y


def _cranial_cavity(skull: np.ndarray) -> shapes.Sdf:
    """Inside of the skull: an ellipsoid above the sloping base."""
    dome = shapes.ellipsoid((0, 5, 66), skull - 13).sdf

    def sdf(x, y, z):
        floor = np.float32(27) - np.float32(0.26) * y - z
        floor = floor + np.float32(5) * np.cos(y / np.float32(22))
        return -shapes.smooth_min(-dome(x, y, z), -floor * np.float32(0.95), 14.0)

    return sdf


def _paint_head_surface(canvas, rng, skull, canal_y) -> None:
    x, y, z = canvas.x, canvas.y, canvas.z
    build = shapes.normal(rng)
    head = shapes.ellipsoid((0, 5, 66), skull + (1, 2, 1)).sdf(x, y, z)
    face = shapes.ellipsoid((0, -36, 2), (65, 58, 78)).sdf(x, y, z)
    chin = shapes.ellipsoid((0, -70, -54), (30, 24, 20)).sdf(x, y, z)
    nose = shapes.ellipsoid((0, -94, 14), (13, 18, 20)).sdf(x, y, z)
    width = (
        shapes.profile(z, (-190, -130, -70, 0, 40), (80, 64, 58, 62, 60)) + 4 * build
    )
    depth = (
        shapes.profile(z, (-190, -130, -70, 0, 40), (72, 66, 60, 64, 60)) + 3 * build
    )
    neck = np.maximum(shapes.radial(x, y - canal_y(z) + 20, width, depth), z - 40)
    shoulder = shapes.ellipsoid((0, 38, -192), (205 + 8 * build, 84, 78)).sdf(x, y, z)
    d = shapes.smooth_min(shapes.smooth_min(head, face, 30), chin, 20)
    d = shapes.smooth_min(shapes.smooth_min(d, nose, 10), neck, 26)
    d = shapes.smooth_min(d, shoulder, 45)
    for side in (-1, 1):  # ears
        ear = shapes.ellipsoid((side * 80, 14, 22), (5, 15, 28), side * 0.5).sdf(
            x, y, z
        )
        d = shapes.smooth_min(d, ear, 6)
    d = d + np.float32(1.5) * canvas.noise(x, y, z, 60.0, 2.0)
    fat = np.float32(5) + (8 + 3 * build) * shapes.profile(
        z, (-190, -80, 0, 30), (1, 0.7, 0.3, 0)
    )
    parts.paint_layers(canvas, d, np.maximum(fat, 2), 56)


def _paint_skull(canvas, draw, cavity) -> None:
    big = np.array([100.0, 120.0, 160.0])
    everywhere = shapes.Shape(cavity, -big, big)
    thick = 6.0

    def shell(x, y, z):
        return cavity(x, y, z) - np.float32(thick)

    def tables(x, y, z, d):
        """Two dense tables, spongy diploe between them."""
        middle = np.abs(d + thick / 2) / (thick / 2)
        return 520 + 700 * np.clip(middle, 0, 1) ** 2 + 90 * canvas.noise(x, y, z, 10.0)

    canvas.paint(shapes.Shape(shell, -big, big), tables, bump=0.7)
    for side in (-1, 1):
        petrous = shapes.tube(
            shapes.mirror([(18, 8, 18), (58, 30, 10)], side), draw.size(9, 14)
        )
        canvas.paint(petrous, 900, texture=170, texture_scale=6)
        mastoid = shapes.ellipsoid((side * 60, 34, 2), draw.size(11, 14, 17))
        canvas.paint(mastoid, 120, texture=480, texture_scale=6)
    canvas.paint(everywhere, 9)  # fluid

    def brain(x, y, z):
        folds = np.clip(1.5 - 5 * np.abs(canvas.noise(x, y, z, 19.0, 3.0)), 0, 1)
        d = cavity(x, y, z) + 2.5
        return d + 5 * folds * np.clip(1 + d / 14, 0, 1)

    def tissue(x, y, z, d):
        grey = np.clip(1 + (d + 4) / 6, 0, 1)
        return 29 + 8 * grey + 1.5 * canvas.noise(x, y, z, 10.0)

    canvas.paint(shapes.Shape(brain, -big, big), tissue)
    size = draw.size(7, 30, 9, rel=0.2)
    for side in (-1, 1):
        horn = shapes.ellipsoid(draw.place(side * 11, -2, 82), size, side * 0.18)
        back = shapes.tube(
            shapes.mirror([(13, 22, 80), (22, 34, 64), (27, 10, 54)], side), 4.5
        )
        canvas.paint(shapes.union(horn, back, blend=4), 7, bump=0.8)
        canvas.paint(
            shapes.ellipsoid((side * 17, 3, 68), draw.size(8, 15, 9)), 40
        )  # thalamus
    falx = shapes.ellipsoid((0, 5, 88), (1.4, 78, 50))
    canvas.paint(shapes.within(falx, cavity), 58)
    cerebellum = shapes.tube([(-24, 48, 26), (24, 48, 26)], 23)
    canvas.paint(shapes.within(cerebellum, cavity), 38, texture=4, texture_scale=6)
    tent = shapes.tube([(-45, 52, 47), (0, 44, 56), (45, 52, 47)], 1.6, (1, 6, 1))
    canvas.paint(shapes.within(tent, cavity), 55)


def _paint_face(canvas, draw) -> None:
    """Mandible, teeth, maxilla, sinuses, orbits, cheek bones, glands."""
    chin, angle = draw.place(0, -84, -58, sd=2.5), draw.place(45, -14, -44, sd=2.5)
    joint = (49, 3, 14)
    canvas.paint(
        shapes.ellipsoid((0, -46, -2), draw.size(36, 42, 26)), 330, texture=120
    )  # maxilla
    parotid = draw.size(12, 17, 25, rel=0.12)
    for side in (-1, 1):
        line = [(0, *chin[1:]), (24, -70, -56), angle * (1, 1, 1.0)]
        body = shapes.tube(
            shapes.mirror(line, side), draw.size(6.5, 6, 6.5, rel=0.05), (1, 1, 1.9)
        )
        ramus = shapes.tube(
            shapes.mirror([angle, (50, -8, -14), joint], side),
            (8, 6.5, 5),
            (0.8, 1.6, 1),
        )
        jaw = shapes.union(body, ramus, blend=6)
        canvas.paint(jaw, parts.bone(canvas, 1350, 380, 2.8), "Mandible")
        arch = [(side * 49, -62, 16), (side * 64, -38, 18), (side * 62, -4, 16)]
        canvas.paint(
            shapes.tube(arch, draw.size(7, 4, 4)), parts.bone(canvas, 900, 450)
        )
        masseter = shapes.tube(
            shapes.mirror([(58, -30, 10), (54, -22, -34)], side), 9, (0.8, 1.6, 1)
        )
        canvas.paint(masseter, 62, texture=6)
        name = "LeftParotid" if side > 0 else "RightParotid"
        gland = shapes.ellipsoid(
            draw.place(side * 49, 12, -12, sd=1.5),
            parotid * draw.size(1, 1, 1, rel=0.04),
            side * 0.4,
        )
        canvas.paint(
            gland, -8, name, bump=1.8, bump_scale=22, texture=18, texture_scale=7
        )
        canvas.paint(
            shapes.ellipsoid(draw.place(side * 28, -40, -60), draw.size(9, 14, 11)),
            42,
            texture=6,
        )
        orbit = shapes.ellipsoid((side * 32, -68, 36), (21, 24, 20))
        canvas.paint(orbit, 620, texture=80)
        canvas.paint(
            shapes.ellipsoid((side * 32, -71, 36), (18, 23, 17.5)), -75, texture=12
        )
        canvas.paint(shapes.tube([(side * 31, -68, 36), (side * 14, -26, 34)], 2.4), 38)
        globe = draw.place(side * 32, -77, 36, sd=1)
        canvas.paint(shapes.ellipsoid(globe, (12.3, 12.3, 12.3)), 12)
        canvas.paint(shapes.ellipsoid(globe + (0, -9, 0), (5, 2.2, 5)), 85)
        sinus = shapes.ellipsoid(
            draw.place(side * 27, -52, 12), draw.size(13, 16, 16, rel=0.15)
        )
        canvas.paint(sinus, -985, bump=1)
    _paint_teeth(canvas)
    canvas.paint(
        shapes.ellipsoid(draw.place(0, -74, 54), draw.size(15, 7, 10, rel=0.25)),
        -980,
        bump=1,
    )
    canvas.paint(
        shapes.ellipsoid((0, -30, 24), draw.size(13, 11, 10)), -970
    )  # sphenoid sinus
    ethmoid = shapes.ellipsoid((0, -58, 34), (12, 20, 11))
    canvas.paint(ethmoid, -620, texture=420, texture_scale=8)
    nose = shapes.ellipsoid((0, -56, 10), (14, 38, 15))

    def turbinates(x, y, z, d):
        folds = canvas.noise(x, y / 3, z, 10.0, 4.0) > 0.25
        return np.where((np.abs(x) < 1.8) | folds, 30, -960).astype(np.float32)

    canvas.paint(nose, turbinates)
    canvas.paint(shapes.ellipsoid((0, -50, -8), (22, 30, 3)), 560)  # hard palate
    tongue = shapes.ellipsoid(draw.place(0, -46, -32), draw.size(23, 30, 20))
    canvas.paint(tongue, 60, texture=12, bump=1.5)
    canvas.paint(shapes.ellipsoid((0, -50, -13), (20, 27, 2.6)), -700)


def _paint_teeth(canvas) -> None:
    """Two rows along the jaw's arch."""

    def row(middle_z, height):
        def sdf(x, y, z):
            arch = np.sqrt((x / 26) ** 2 + ((y + 46) / 36) ** 2)
            across = np.abs(arch - 1) * 28 - 4.5
            angle = np.arctan2(x, -(y + 46))
            gap = np.float32(3.6) - np.abs((angle / 0.17) % 1 - 0.5) * 8
            d = np.maximum(across, np.abs(z - middle_z) - height)
            return np.maximum(np.maximum(d, -gap - 0.6), y + 40)

        return shapes.Shape(sdf, np.array([-40, -90, -60]), np.array([40, -38, 5]))

    canvas.paint(row(-36, 7), 1900, texture=250)
    canvas.paint(row(-19, 7), 1900, texture=250)


def _paint_neck(canvas, draw, canal_y) -> None:
    """Muscles, vessels, thyroid, oesophagus, collar bones, lung tips."""

    def back(z):
        return float(canal_y(np.float32(z)))

    for side in (-1, 1):
        strap = [(56, 26, 0), (44, 4, -70), (16, -12, -150)]
        canvas.paint(
            shapes.tube(shapes.mirror(strap, side), draw.size(11, 11, 8), (1, 1.3, 1)),
            62,
            texture=5,
        )
        deep = [
            (24, back(0) + 24, 0),
            (22, back(-80) + 22, -80),
            (26, back(-160) + 20, -160),
        ]
        canvas.paint(
            shapes.tube(shapes.mirror(deep, side), draw.size(14, 15, 17), (1.2, 1, 1)),
            60,
            texture=7,
        )
        outer = [(30, back(0) + 42, -20), (50, back(-90) + 30, -100), (110, 62, -140)]
        canvas.paint(
            shapes.tube(shapes.mirror(outer, side), draw.size(9, 12, 15)), 58, texture=7
        )
        shaft = [(30, 4, 0), (27, 0, -60), (22, 6, -170)]
        canvas.paint(shapes.tube(shapes.mirror(shaft, side), 3.8), 170)
        shaft = [(38, 9, 0), (35, 2, -60), (29, 3, -170)]
        canvas.paint(shapes.tube(shapes.mirror(shaft, side), draw.size(6, 6.5, 7)), 150)
        lobe = shapes.ellipsoid(
            draw.place(side * 19, -6, -108), draw.size(9, 11, 22, rel=0.15)
        )
        canvas.paint(lobe, 125, texture=9, bump=1)
        lung = shapes.ellipsoid((side * 46, 38, -196), (38, 44, 48))
        canvas.paint(lung, -850, texture=22)
        collar = [(16, -22, -150), (70, -6, -142), (140, 26, -134)]
        canvas.paint(
            shapes.tube(shapes.mirror(collar, side), draw.size(8, 6, 8)),
            parts.bone(canvas, 900, 260),
        )
        head = shapes.ellipsoid(
            draw.place(side * 160, 38, -168, sd=4), draw.size(25, 25, 26)
        )
        canvas.paint(head, parts.bone(canvas, 700, 240))
        blade = shapes.tube(
            shapes.mirror([(140, 52, -142), (95, 92, -176), (80, 100, -220)], side), 5
        )
        canvas.paint(blade, parts.bone(canvas, 800, 350))


def _paint_airway(canvas, draw, canal_y) -> None:
    """Pharynx, larynx, trachea with cartilage, hyoid, and the gullet behind."""

    def front(z, ahead):
        """A point `ahead` mm in front of the spine."""
        return (0.0, float(canal_y(np.float32(z))) - 28 - ahead, z)

    box = [draw.place(*front(-62, 22), sd=1.5), front(-90, 17)]
    canvas.paint(
        shapes.tube(box, draw.size(18, 14), (1, 1.05, 1)), 55, "Larynx", texture=8
    )
    center = float(box[0][1])

    def shield(x, y, z):
        wall = np.abs(np.sqrt(x * x + (y - center) ** 2) - 15) - 1.8
        return np.maximum(np.maximum(wall, y - center - 4), np.maximum(-88 - z, z + 60))

    low, high = np.array([-20, center - 20, -88]), np.array([20, center + 8, -60])
    canvas.paint(shapes.Shape(shield, low, high), 280, keep=True, texture=60)
    arc = [(22, -2), (14, -18), (-14, -18), (-22, -2)]
    hyoid = [(x, center + 6 + y, -50) for x, y in arc]
    canvas.paint(shapes.tube(hyoid, 2.8), parts.bone(canvas, 700, 350))
    pipe = [front(-92, 18), front(-130, 18), front(-165, 19), front(-200, 20)]
    canvas.paint(shapes.tube(pipe, 10.8), 90, texture=20)
    gullet = [front(-94, 4), front(-130, 4), front(-165, 5), front(-200, 6)]
    gullet = [(p[0] + 3, *p[1:]) for p in gullet]
    canvas.paint(
        shapes.tube(gullet, draw.size(6, 6, 6.5, 7), (1.4, 0.9, 1)), 40, "Esophagus"
    )
    air = [(0, -14, 10), (0, -6, -22), front(-52, 10), front(-66, 20), front(-80, 20)]
    canvas.paint(
        shapes.tube(air, draw.size(9, 8, 8, 8, 5), (1.4, 0.8, 1)), -985, keep=True
    )
    lumen = shapes.tube([air[-1], *pipe], draw.size(5, 8.2, 8.4, 8.6, 8.6, rel=0.05))
    canvas.paint(lumen, -985, keep=True)
