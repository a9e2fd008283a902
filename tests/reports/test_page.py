"""The page of a case: nothing from outside, nothing unescaped, sliders that work."""

import json
import re

import numpy as np
import pytest

from tests import browser
from unireg_jax.evaluation import quality
from unireg_jax.imaging.colors import label_colors
from unireg_jax.imaging.nifti import Volume
from unireg_jax.reports import case, index, page, pictures

SHAPE, SPACING = (36, 28, 24), (4.0, 5.0, 6.0)
HOSTILE = '</script><script>alert(1)</script><img src="http://evil.example/x">\x1b[2J'
needs_browser = pytest.mark.skipif(
    browser.PATH is None, reason="needs Chromium (Debian: chromium)"
)


def scans(lung):
    """A body, with a lung or without, and the same 6 mm to the left."""
    vox2world = np.diag([*SPACING, 1.0])
    index = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    x = np.stack(index, -1) - (np.array(SHAPE) - 1) / 2
    radius = np.sqrt(np.square(x / (np.array(SHAPE) / 2.3)).sum(-1))
    body = radius < 1
    hu = np.where(body, 40, -1000) + np.where(body, 90 * np.sin(x.sum(-1) / 2), 0)
    if lung:
        hu[radius < 0.6] = -800 + 60 * np.sin(x.sum(-1) / 2)[radius < 0.6]
    fixed = Volume(np.rint(hu).astype(np.int16), vox2world)
    moved = vox2world.copy()
    moved[0, 3] = 6.0
    return fixed, Volume(fixed.data, moved)


def draw(lung, labels=None):
    fixed, moving = scans(lung)
    disp = np.zeros((*SHAPE, 3), np.float32)
    disp[..., 0] = 6.0
    args = fixed, moving, fixed.data, disp, np.eye(4)
    return pictures.draw(pictures.scene(*args, labels=labels), slices=9)


def organs(x):
    """Two boxes that touch, 12 voxels further right or left; a third is far away."""
    labels = np.zeros(SHAPE, np.uint16)
    labels[x : x + 6, 8:20, 6:18], labels[x + 6 : x + 9, 8:20, 6:18] = 3, 700
    labels[30:32, 12:16, 10:14] = 4
    return labels


@pytest.fixture(scope="module")
def drawn():
    return draw(lung=False)


@pytest.fixture(scope="module")
def chest():
    return draw(lung=True)


@pytest.fixture(scope="module")
def labelled():
    return draw(lung=True, labels={"warped": organs(15), "fixed": organs(14)})


def record(name="a__b", **more):
    return {
        "case": name,
        "status": "warn",
        "warnings": ["folding: 3 % folds"],
        "settings": {"task": "liver", "pair_type": "intra", "affine_used": "none"},
        "inputs": {
            "fixed": {"name": "a.nii.gz", "shape": [3, 4, 5], "spacing_mm": [1, 2, 3]}
        },
        "quality": {"coverage": 0.9, "local_ncc": 0.8, "fold_percent_body": 3.0},
        "versions": {"unireg": "1"},
        "device": "cpu",
        **more,
    }


def html(slices, found=None):
    found = found or record()
    kind, values = case.pair_type(found), case.numbers(found)
    return page.case_page(
        found["case"],
        status=case.status(found),
        findings=case.warnings(found),
        rows=case.rows(values, kind),
        slices=slices,
        labels=case.labels(found),
        facts=case.facts(found),
    )


def test_page_asks_for_nothing(drawn):
    text = html(drawn)
    assert "default-src 'none'" in text and "unsafe" not in text
    plain = re.sub(r"[A-Za-z0-9+/=]{60,}", "", text)  # without the pictures
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|<iframe", plain)
    sources = re.findall(r'src="([^"]{0,22})', text)
    assert sources and all(s.startswith("data:image/png;base64,") for s in sources)


def test_page_says_what_before_shows_of_a_coarse_start():
    told = {
        used: case.facts(record(settings={"affine_used": used}))["pre-alignment"]
        for used in ("affine", "coarse")
    }
    assert told["affine"] == "affine pre-alignment"
    assert told["coarse"] == 'coarse pre-alignment ("before" shows its affine part)'


def test_page_is_the_same_twice(drawn):
    assert html(drawn) == html(drawn)


def test_page_escapes_whatever_a_record_holds(drawn):
    found = record(
        HOSTILE,
        warnings=[HOSTILE],
        settings={"task": HOSTILE, "affine_used": HOSTILE, "refine": {HOSTILE: 1}},
        inputs={HOSTILE: {"name": f"/secret/place/{HOSTILE}", "shape": [HOSTILE]}},
        versions={HOSTILE: HOSTILE},
        scores={"labels": {HOSTILE: {"dsc": 0.5, HOSTILE: 1}}},
        device={HOSTILE: HOSTILE},
    )
    text = html(drawn, found)
    assert "<script>alert" not in text and '<img src="http' not in text
    assert "\x1b" not in text and "/secret" not in text
    assert text.count("<script") == 2


@pytest.mark.parametrize(
    "broken",
    [
        {"settings": None, "inputs": [1], "quality": "x", "versions": 3},
        {"warnings": "none", "status": 7, "scores": [], "timings": {"total": "x"}},
        {"quality": {"local_ncc": None, "coverage": "0.9"}, "device": None},
    ],
)
def test_page_of_a_damaged_record_is_a_page(drawn, broken):
    assert html(drawn, record(**broken)).endswith("</html>\n")


def test_numbers_out_of_bounds_are_marked(drawn):
    rows = {row.name: row for row in case.rows(record()["quality"], "intra")}
    assert rows["fold_percent_body"].over and not rows["coverage"].over
    assert rows["fold_percent_body"].limit == "at most 1 %"
    assert set(rows) == {"coverage", "local_ncc", "fold_percent_body"}
    assert html(drawn).count("class=over") == 1
    assert "fold_percent_body" in quality.CHECKS


def test_large_pages_are_thinned(drawn, monkeypatch):
    small = html(drawn)
    monkeypatch.setattr(page, "_LIMIT", len(small) // 2)
    text = html(drawn)
    assert len(text) < 0.75 * len(small)
    # What the viewer begins with is still the middle.
    assert f"{drawn.index['axial'][drawn.middle['axial']] + 1} of 24" in text


@needs_browser
def test_sliders_change_the_picture_and_nothing_is_asked_for(drawn, tmp_path):
    file = tmp_path / "qc.html"
    file.write_text(html(drawn, record(HOSTILE)), encoding="utf-8")
    with browser.opened(file, tmp_path / "profile") as seen:
        assert seen.evaluate("document.querySelectorAll('.mode').length") == 1
        assert seen.evaluate("document.querySelectorAll('.modes button').length") == 9
        images = "[...document.querySelectorAll('.frame img')]"
        wide = seen.evaluate(
            f"Promise.all({images}.map(i => i.decode().then(() => i.naturalWidth)))"
        )
        assert wide == [drawn.size[plane][0] for plane in pictures.PLANES]
        first = seen.evaluate(f"{images}.map(i => i.src)")
        assert len(set(first)) == 3
        moved = seen.evaluate(
            "(() => { const s = document.querySelectorAll('input[type=range]')[1];"
            "s.value = 0; s.dispatchEvent(new Event('input'));"
            f"return {images}.map(i => i.src); }})()"
        )
        assert [a == b for a, b in zip(first, moved, strict=True)] == [1, 0, 1]
        number = "document.querySelectorAll('output')[1].textContent"
        first_slice = drawn.index["coronal"][0] + 1
        assert seen.evaluate(number) == f"{first_slice} of {SHAPE[1]}"
        for key, (title, _) in enumerate(pictures.MODES.values(), 1):
            seen.press(str(key))
            pressed = "document.querySelector('[aria-pressed=true]').textContent"
            assert seen.evaluate(pressed) == title
            got = seen.evaluate(f"{images}[1].src")
            mode = list(pictures.MODES)[key - 1]
            assert got == pictures.data_uri(drawn.png["soft"][mode]["coronal"][0])
        assert seen.evaluate("document.querySelector('.windows')") is None
        assert seen.requests == [file.as_uri()]
        assert seen.complaints == []


@needs_browser
def test_lungs_have_a_window_of_their_own(chest, tmp_path):
    """By the button or the key w; the Jacobian keeps the one it has."""
    file = tmp_path / "qc.html"
    file.write_text(html(chest), encoding="utf-8")
    with browser.opened(file, tmp_path / "profile") as seen:
        buttons = "[...document.querySelectorAll('.windows button')]"
        pressed = f"{buttons}.map(b => [b.ariaPressed, b.disabled])"
        source = "document.querySelector('figure[data-plane=coronal] img').src"

        def shows(window, mode):
            png = chest.png[window][mode]["coronal"][chest.middle["coronal"]]
            return seen.evaluate(source) == pictures.data_uri(png)

        assert seen.evaluate(f"{buttons}.map(b => b.textContent)") == [
            "Soft tissue window",
            "Lung window",
        ]
        assert shows("soft", "overlay")
        seen.evaluate(f"{buttons}[1].click()")
        assert shows("lung", "overlay")
        seen.press("4")
        assert shows("lung", "warped")
        assert seen.evaluate(pressed) == [["false", False], ["true", False]]
        seen.press("9")
        assert shows("soft", "jacobian")
        assert seen.evaluate(pressed) == [["true", False], ["false", True]]
        seen.press("1")
        assert shows("lung", "overlay")
        seen.press("w")
        assert shows("soft", "overlay")
        assert seen.requests == [file.as_uri()] and seen.complaints == []


def test_outlines_alone_tell_a_page_with_labels_from_one_without(chest, labelled):
    """Legend, lines, data, style and script, and the digests in the policy."""
    plain, lined = html(chest), html(labelled)
    parts = (
        '<div class="labels">.*?</div>\n',
        '<svg class="outlines".*?</svg>',
        '<script type="application/json" id="outlines">.*?</script>\n',
        re.escape(page.part("outlines.css")),
        re.escape(page.part("outlines.js")),
    )
    for part in parts:
        assert not re.search(part, plain)
        lined, count = re.subn(part, "", lined)
        assert count
    digest = "'sha256-[^']*'"
    assert re.sub(digest, "", lined) == re.sub(digest, "", plain)


def test_page_with_labels_asks_for_nothing(labelled):
    text = re.sub(r"[A-Za-z0-9+/=]{60,}", "", html(labelled))
    assert "default-src 'none'" in text and "unsafe" not in text
    # Not even the address that names SVG; no style in an attribute, which is forbidden.
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|style=", text)


def test_page_has_a_colour_for_each_label_and_a_line_for_each_layer(labelled):
    text = html(labelled)
    items = re.findall(r'stroke="(#[0-9a-f]{6})"/></svg>(\d+)</li>', text)
    assert [label for _, label in items] == ["3", "4", "700"]
    assert len(dict(items)) == 3
    assert "dashed: labels of the fixed scan; solid: labels of the moving" in text
    alone = labelled._replace(outlines={"warped": labelled.outlines["warped"]})
    text = html(alone)
    assert "dashed:" not in text and "Outlines, solid:" in text


def test_label_has_one_colour_on_all_pages(labelled):
    def color(text):
        return re.search(r'stroke="(#[0-9a-f]{6})"/></svg>700</li>', text)[1]

    planes = labelled.outlines["warped"].items()
    lone = {
        plane: [{k: d for k, d in paths.items() if k == 700} for paths in pictures]
        for plane, pictures in planes
    }
    other = html(labelled._replace(outlines={"warped": lone}))
    expected = "#{:02x}{:02x}{:02x}".format(*label_colors(700)[-1])
    assert color(html(labelled)) == color(other) == expected
    data = re.search(r'id="outlines">(.*?)</script>', other)[1]
    assert json.loads(data)["colors"] == {"700": expected}


def test_page_says_which_labels_are_not_outlined(labelled):
    def legend(change):
        planes = labelled.outlines["warped"].items()
        lines = {plane: [change(p) for p in paths] for plane, paths in planes}
        text = html(labelled._replace(outlines={"warped": lines}))
        return re.search(r'<div class="labels"><p>(.*?)</p>', text)[1]

    assert legend(lambda paths: paths).endswith("One colour per label.")
    none = legend(lambda paths: {})
    assert none.endswith("One colour per label. Not outlined in any slice: 3, 4, 700.")
    some = legend(lambda paths: {k: d for k, d in paths.items() if k != 4})
    assert some.endswith("Not outlined in any slice: 4.")
    assert "too fine" in legend(lambda paths: None)
    assert "too fine" in legend(lambda paths: paths if len(paths) > 1 else None)


def test_page_says_that_files_hold_no_label():
    text = html(draw(lung=False, labels={"fixed": np.zeros(SHAPE, np.uint8)}))
    assert "One colour per label. There are none.</p>" in text


def test_label_beyond_the_slices_is_named():
    labels = organs(15)
    labels[0, 0, 0] = 9  # slices are drawn within the body
    text = html(draw(lung=False, labels={"fixed": labels}))
    assert "Not outlined in any slice: 9.</p>" in text


def test_ten_thousands_of_labels_keep_the_page_small(labelled):
    """Each in one slice, as one pixel; twice as many lie in none."""
    path, count = "M10 5l1 1-1 1-1-1z", 20_000
    planes = {plane: [{} for _ in ps] for plane, ps in labelled.index.items()}
    for label in range(1, count + 1):
        slices = planes[pictures.PLANES[label % 3]]
        slices[label // 3 % len(slices)][label] = path
    ids = tuple(range(1, 3 * count + 1))
    many = labelled._replace(outlines={"fixed": planes, "warped": planes}, ids=ids)
    text = html(many)
    items = re.findall("<li>(.*?)</li>", text)
    shown = len(
        json.loads(re.search(r'id="outlines">(.*?)</script>', text)[1])["colors"]
    )
    assert items[-1] == f"and {shown - 200} more"
    assert f"and {3 * count - shown - 20} more.</p>" in text
    assert len(text) < page._LIMIT


def test_outlines_and_colours_count_as_they_are_written(labelled, monkeypatch):
    """Thousands of short paths: their numbers and colours are longer than they are."""
    planes = {
        plane: [{label: "M0 0z" for label in range(i, 9000, 9)} for i in range(1, 10)]
        for plane in pictures.PLANES
    }
    many = labelled._replace(outlines={"fixed": planes})
    monkeypatch.setattr(page, "_LIMIT", len(html(labelled)) + 27_000 * len("M0 0z"))
    data = re.search(r'id="outlines">(.*?)</script>', html(many))[1]
    assert len(json.loads(data)["layers"][0]["planes"]["axial"]) < 9


def test_outlines_count_and_are_thinned_with_the_pictures(labelled):
    few = html(labelled)
    found = labelled.outlines["warped"]
    path = {3: "M0 0l" + "1 1-1 1" * 85_000 + "z"}
    large = {plane: [path for _ in paths] for plane, paths in found.items()}
    text = html(labelled._replace(outlines={"warped": large}))
    counts = []
    for page_text in (few, text):
        data = re.search(r'id="outlines">(.*?)</script>', page_text)[1]
        counts.append(len(json.loads(data)["layers"][0]["planes"]["axial"]))
    assert counts == [9, 5]
    assert '"axial": 2' in text  # the middle one of five


@needs_browser
def test_outlines_follow_sliders_and_are_shown_and_hidden(labelled, tmp_path):
    """By buttons, which the keyboard reaches, and by keys of their own."""
    file = tmp_path / "qc.html"
    file.write_text(html(labelled), encoding="utf-8")
    with browser.opened(file, tmp_path / "profile") as seen:
        frames = "[...document.querySelectorAll('svg.outlines')]"
        groups = frames + ".map(s => s.querySelector('.%s'))"
        buttons = "[...document.querySelectorAll('.layers button')]"

        def paths(layer, plane):
            return seen.evaluate(
                f"[...{groups % layer}[{pictures.PLANES.index(plane)}].children]"
                ".map(p => [p.querySelector('title').textContent, p.getAttribute('d')])"
            )

        def expected(layer, plane, i):
            found = labelled.outlines[layer][plane][i].items()
            return [[f"{layer.title()} labels: {label}", d] for label, d in found]

        def shown(layer):
            shapes = f"{groups % layer}.map(g => g.getBoundingClientRect().width > 0)"
            return seen.evaluate(shapes)

        for layer in ("fixed", "warped"):
            for plane in pictures.PLANES:
                middle = labelled.middle[plane]
                assert paths(layer, plane) == expected(layer, plane, middle)
            assert shown(layer) == [True] * 3
        assert paths("fixed", "axial") != paths("warped", "axial")
        seen.evaluate(
            "(() => { const s = document.querySelectorAll('input[type=range]')[1];"
            "s.value = 3; s.dispatchEvent(new Event('input')); })()"
        )
        assert paths("fixed", "coronal") == expected("fixed", "coronal", 3) != []
        dashes = "getComputedStyle(%s[0].firstChild).strokeDasharray"
        assert seen.evaluate(dashes % (groups % "warped")) == "none"
        assert seen.evaluate(dashes % (groups % "fixed")) == "4px, 3px"
        seen.evaluate(f"{buttons}[0].focus()")
        seen.press(" ")
        assert shown("fixed") == [False] * 3 and shown("warped") == [True] * 3
        pressed = f"{buttons}.map(b => b.textContent + b.ariaPressed)"
        assert seen.evaluate(pressed) == ["Fixed labelsfalse", "Warped labelstrue"]
        seen.press("l")
        assert shown("fixed") == shown("warped") == [False] * 3
        seen.press("f")
        seen.evaluate(f"{buttons}[1].click()")
        assert shown("fixed") == shown("warped") == [True] * 3
        assert seen.evaluate("document.querySelectorAll('.viewer .labels').length") == 1
        assert seen.requests == [file.as_uri()] and seen.complaints == []


@needs_browser
def test_outlines_without_scripts_are_on_the_fixed_scan(labelled, tmp_path):
    file = tmp_path / "qc.html"
    file.write_text(html(labelled), encoding="utf-8")
    with browser.opened(file, tmp_path / "profile", scripts=False) as seen:
        where = "[...document.querySelectorAll('svg.outlines')]"
        modes = f"{where}.map(s => s.closest('.mode').dataset.mode)"
        assert seen.evaluate(modes) == ["fixed"] * 6  # two windows, three planes
        drawn = f"{where}.map(s => s.querySelectorAll('path').length > 1)"
        assert seen.evaluate(drawn) == [True] * 6
        assert seen.evaluate("document.querySelectorAll('.labels li').length") == 3


@needs_browser
@pytest.mark.parametrize("name", ["drawn", "chest"])
def test_page_without_scripts_shows_the_middle_of_every_mode(name, request, tmp_path):
    drawn = request.getfixturevalue(name)
    file = tmp_path / "qc.html"
    file.write_text(html(drawn), encoding="utf-8")
    with browser.opened(file, tmp_path / "profile", scripts=False) as seen:
        count = (
            "[...document.querySelectorAll('.mode img')].filter(i => i.naturalWidth)"
        )
        modes = sum(len(modes) for modes in drawn.png.values())
        assert modes == len(pictures.MODES) + (7 if name == "chest" else 0)
        assert seen.evaluate(f"{count}.length") == 3 * modes


def entries(thumb=None):
    thumbs = () if thumb is None else (thumb, thumb)
    return [
        index.Entry("fine", "ok", 0.4, [], {"coverage": 0.9, "dsc": None}, None),
        index.Entry(
            "bad & <b>", "warn", 2.5, ["folding"], {"coverage": 0.5}, "a b/q#.html"
        ),
        index.Entry(HOSTILE, "failed", float("inf"), [HOSTILE], {}, None, thumbs),
        index.Entry("worse", "warn", 3.5, ["similarity"], {"coverage": 0.7}, None),
    ]


def test_index_lists_the_worst_first():
    names = [e.case for e in index.worst_first(entries())]
    assert names == [HOSTILE, "worse", "bad & <b>", "fine"]


def test_index_escapes_and_links_beside_itself():
    text = index.index_page(HOSTILE, entries())
    assert "<script>alert" not in text and "\x1b" not in text and "<b>" not in text
    assert re.findall(r'href="([^"]*)"', text) == ["a%20b/q%23.html"]
    assert "4 cases: 1 ok · 2 to look at · 1 failed" in text
    assert "default-src 'none'" in text and text.count("<script") == 1


@needs_browser
def test_index_sorts_by_the_column_that_is_clicked(drawn, tmp_path):
    file = tmp_path / "index.html"
    thumb = drawn.png["soft"]["overlay"]["axial"][0]
    file.write_text(index.index_page("batch", entries(thumb)), encoding="utf-8")
    with browser.opened(file, tmp_path / "profile") as seen:
        names = (
            "[...document.querySelectorAll('tbody tr')].map(r => r.cells[2].innerText)"
        )
        heads = "[...document.querySelectorAll('thead button')]"
        assert seen.evaluate(names)[1:] == ["worse", "bad & <b>", "fine"]
        click = f"{heads}.find(b => b.textContent === 'coverage').click()"
        seen.evaluate(click)
        assert seen.evaluate(names)[:3] == ["bad & <b>", "worse", "fine"]
        seen.evaluate(click)
        # What has no number stays last.
        assert seen.evaluate(names)[:3] == ["fine", "worse", "bad & <b>"]
        assert seen.requests == [file.as_uri()]
        assert seen.complaints == []
