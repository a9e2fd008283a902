"""One case as one HTML file: findings, pictures with sliders, numbers, settings.

Nothing outside the file is asked for: a policy in it forbids that, and allows only the
script and the style that are in the file. Whatever comes from a record or a file's name
is escaped. Without scripts the middle slices of every mode are there to see.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unireg_jax.errors import shown
from unireg_jax.imaging.colors import label_colors
from unireg_jax.reports.outlines import LAYERS, UNITS
from unireg_jax.reports.pictures import MODES, PLANES, WINDOWS, Slices

_HERE = Path(__file__).parent
_LIMIT = 12_000_000  # bytes of pictures and outlines, as text
_IN_LEGEND, _IN_NOTE = 200, 20  # labels that are listed
_SIDES = {  # left, right, top, bottom of a picture
    "axial": "RLAP",
    "coronal": "RLSI",
    "sagittal": "APSI",
}
_STATUS = {"ok": "ok", "warn": "look at it", "failed": "failed"}


class Row(NamedTuple):
    """One number of the table.

    Attributes:
        name: of the metric.
        value: None where undefined.
        limit: what was expected, in words; empty where there is none.
        over: whether the limit is passed.
        meaning: one line.
    """

    name: str
    value: float | None
    limit: str
    over: bool
    meaning: str


def case_page(
    case: str,
    *,
    status: str,
    findings: Sequence[str],
    rows: Sequence[Row],
    slices: Slices,
    labels: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, str],
) -> str:
    """Writes the page of one case.

    Args:
        case: its name.
        status: "ok", "warn" or "failed".
        findings: one line each.
        rows: numbers, in the order of the table.
        slices: from `pictures.draw`.
        labels: label -> metric -> number or None; empty without labels.
        facts: name -> value: settings, inputs, versions.

    Returns:
        HTML. Every second slice is left out as often as pictures and outlines need more
        than 12 MB.
    """
    slices = _thinned(slices)
    script, style = part("page.js"), part("page.css")
    colors = _colors(slices)
    if slices.outlines:
        style += part("outlines.css")
    if colors:
        script += part("outlines.js")
    body = [
        _header(case, status, facts),
        "<main>",
        _findings(findings),
        "<h2>Pictures</h2>",
        *_legend(slices, colors),
        *(_mode(name, window, slices, colors) for window, name in _shown_modes(slices)),
        "<h2>Numbers</h2>",
        _numbers(rows),
        _labels(labels),
        "<h2>Settings</h2>",
        _facts(facts),
        "<footer>Green and magenta, blue and orange were chosen to be told apart with "
        "colour-blind eyes. Sides: R, L of the patient; A, P front and back; S, I "
        "towards head and feet. Not a medical device.</footer>",
        "</main>",
        f'<script type="application/json" id="slices">{_data(slices)}</script>',
        *_outlines_data(slices, colors),
        f"<script>{script}</script>",
    ]
    return document(f"{case}: registration", "\n".join(body), style, script)


def document(title: str, body: str, style: str, script: str) -> str:
    """Wraps a body into a page that may run one script and ask for nothing.

    Args:
        title: plain text.
        body: HTML, escaped already, with `script` in it.
        style: CSS.
        script: the JavaScript that may run; nothing else does.

    Returns:
        HTML.
    """
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src {_hash(style)}; script-src {_hash(script)}"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(title)}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """Escapes anything for HTML, control characters spelled out.

    Args:
        value: any value.

    Returns:
        One line.
    """
    return html.escape(shown(str(value)), quote=True)


def number(value: Any) -> str:
    """Four digits of a number, a dash for none.

    Args:
        value: number or None.

    Returns:
        Plain text.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    return f"{value:.4g}" if value == value else "–"


def chip(status: str) -> str:
    """The status as a coloured word.

    Args:
        status: "ok", "warn" or "failed".

    Returns:
        HTML.
    """
    kind = status if status in _STATUS else "failed"
    return f'<span class="chip {kind}">{_STATUS[kind]}</span>'


def part(name: str) -> str:
    """Reads a script or style of this folder.

    Args:
        name: of the file.

    Returns:
        Its text.
    """
    return (_HERE / name).read_text(encoding="utf-8")


# --- parts of the page --------------------------------------------------------------


def _header(case, status, facts) -> str:
    line = " · ".join(text(facts[k]) for k in ("task", "pre-alignment") if k in facts)
    return (
        f"<header><div><h1>{text(case)}{chip(status)}</h1><p>{line}</p></div></header>"
    )


def _findings(findings) -> str:
    if not findings:
        return ""
    items = "".join(f"<li>{text(line)}</li>" for line in findings)
    return f'<ul class="findings">{items}</ul>'


def _shown_modes(slices: Slices) -> list[tuple[str, str]]:
    """Window and mode, in the order of a page without scripts."""
    return [(window, mode) for window, modes in slices.png.items() for mode in modes]


def _mode(name: str, window: str, slices: Slices, colors) -> str:
    """Three planes of one mode, their middle slices; outlines on the fixed scan."""
    title, legend = MODES[name]
    if len(slices.png) > 1 and window != next(iter(slices.png)):
        title = f"{title}, {WINDOWS[window][0].lower()} window"
    figures = []
    for plane in PLANES:
        i = slices.middle[plane]
        picture = base64.b64encode(slices.png[window][name][plane][i]).decode("ascii")
        sides = "".join(
            f'<i class="{where}">{side}</i>'
            for where, side in zip("lrtb", _SIDES[plane], strict=True)
        )
        figures.append(
            f'<figure data-plane="{plane}"><div class="frame">'
            f'<img src="data:image/png;base64,{picture}" alt="{title}, {plane}">{sides}'
            f"{_outlines(slices, plane, colors) if name == 'fixed' else ''}"
            f"</div><figcaption><span>{plane}</span><output>"
            f"{slices.index[plane][i] + 1} of {slices.count[plane]}</output>"
            "</figcaption></figure>"
        )
    return (
        f'<section class="viewer mode" data-mode="{name}"><h3>{title}</h3>'
        f'<p>{text(legend)}</p><div class="planes">{"".join(figures)}</div></section>'
    )


def _data(slices: Slices) -> str:
    """What the script reads: ASCII that cannot end its element."""

    def spelled(planes):
        return {
            plane: [base64.b64encode(p).decode("ascii") for p in pictures]
            for plane, pictures in planes.items()
        }

    modes = [
        {
            "title": title,
            "legend": legend,
            # One per window, as far as the mode has it.
            "png": [spelled(m[name]) for m in slices.png.values() if name in m],
        }
        for name, (title, legend) in MODES.items()
    ]
    data = {
        "windows": [WINDOWS[window][0] for window in slices.png],
        "modes": modes,
        "index": slices.index,
        "count": slices.count,
        "middle": slices.middle,
    }
    return json.dumps(data).replace("<", "\\u003c")


def _colors(slices: Slices) -> dict[int, str]:
    """Label -> its colour, of all that are outlined."""
    found = {label for paths in _outlined(slices) for label in paths or ()}
    rgb = label_colors(max(found, default=0))
    return {
        label: "#{:02x}{:02x}{:02x}".format(*rgb[label - 1]) for label in sorted(found)
    }


def _outlined(slices: Slices) -> list[dict[int, str] | None]:
    """Paths of every slice in every layer and plane."""
    return [
        paths
        for planes in slices.outlines.values()
        for pictures in planes.values()
        for paths in pictures
    ]


def _layers(slices: Slices) -> list[str]:
    """Layers of outlines that there are, the lowest first."""
    return [name for name in LAYERS if name in slices.outlines]


def _legend(slices: Slices, colors: Mapping[int, str]) -> list[str]:
    """How outlines are read, and the colour of each label."""
    if not slices.outlines:
        return []
    lines = "; ".join(LAYERS[name][2] for name in _layers(slices))
    note = "" if slices.ids else " There are none."
    if None in _outlined(slices):
        note += " Slices where labels are too fine to be outlined have none."
    if missing := [str(label) for label in slices.ids if label not in colors]:
        note += f" Not outlined in any slice: {', '.join(_first(missing, _IN_NOTE))}."
    items = [
        '<svg class="line" viewBox="0 0 20 8" aria-hidden="true">'
        f'<path d="M0 4h20" stroke="{color}"/></svg>{label}'
        for label, color in colors.items()
    ]
    items = "".join(f"<li>{item}</li>" for item in _first(items, _IN_LEGEND))
    return [
        f'<div class="labels"><p>Outlines, {lines}. One colour per label.{note}</p>'
        f'<ul aria-label="Labels">{items}</ul></div>'
    ]


def _first(items: list[str], most: int) -> list[str]:
    """At most so many, then how many more there are."""
    more = len(items) - most
    return items if more <= 0 else [*items[:most], f"and {more} more"]


def _outlines(slices: Slices, plane: str, colors: Mapping[int, str]) -> str:
    """The outlines of the middle slice."""
    if not colors:
        return ""
    groups = []
    for name in _layers(slices):
        paths = slices.outlines[name][plane][slices.middle[plane]] or {}
        lines = "".join(
            f'<path d="{d}" stroke="{colors[k]}"/>' for k, d in paths.items()
        )
        groups.append(f'<g class="{name}">{lines}</g>')
    width, height = (n * UNITS for n in slices.size[plane])
    return (
        f'<svg class="outlines" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f"{''.join(groups)}</svg>"
    )


def _outlines_data(slices: Slices, colors: Mapping[int, str]) -> list[str]:
    """What the script of the outlines reads: numbers, and words of this package."""
    if not colors:
        return []
    data = {
        "layers": [
            {
                "name": name,
                "title": LAYERS[name][0],
                "key": LAYERS[name][1],
                "planes": {
                    plane: [paths or {} for paths in pictures]
                    for plane, pictures in slices.outlines[name].items()
                },
            }
            for name in _layers(slices)
        ],
        "colors": colors,
        "size": {
            plane: [n * UNITS for n in size] for plane, size in slices.size.items()
        },
    }
    return [
        f'<script type="application/json" id="outlines">{json.dumps(data)}</script>'
    ]


def _numbers(rows: Sequence[Row]) -> str:
    head = (
        "<thead><tr><th>number</th><th class=n>value</th><th>expected</th>"
        "<th>meaning</th></tr></thead>"
    )
    lines = [
        f"<tr{' class=over' if row.over else ''}><td>{text(row.name)}</td>"
        f"<td class=n>{number(row.value)}</td><td>{text(row.limit)}</td>"
        f"<td class=why>{text(row.meaning)}</td></tr>"
        for row in rows
    ]
    body = "".join(lines)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _labels(labels: Mapping[str, Mapping[str, Any]]) -> str:
    if not labels:
        return ""
    columns = list(dict.fromkeys(name for row in labels.values() for name in row))
    head = "".join(f"<th class=n>{text(name)}</th>" for name in columns)
    lines = []
    for label, row in labels.items():
        cells = "".join(f"<td class=n>{number(row.get(c))}</td>" for c in columns)
        lines.append(f"<tr><td>{text(label)}</td>{cells}</tr>")
    return (
        f'<h2>Labels</h2><div class="scroll"><table><thead><tr><th>label</th>{head}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    lines = "".join(
        f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def _thinned(slices: Slices) -> Slices:
    """Drops every second slice until the page is small enough."""
    while True:
        total = sum(
            len(picture)
            for modes in slices.png.values()
            for planes in modes.values()
            for pictures in planes.values()
            for picture in pictures
        )
        lines = sum(map(len, _outlines_data(slices, _colors(slices))))
        most = max(len(places) for places in slices.index.values())
        if total * 4 / 3 + lines <= _LIMIT or most < 4:
            return slices
        slices = slices._replace(
            png={
                window: {
                    mode: {plane: ps[::2] for plane, ps in planes.items()}
                    for mode, planes in modes.items()
                }
                for window, modes in slices.png.items()
            },
            outlines={
                name: {plane: paths[::2] for plane, paths in planes.items()}
                for name, planes in slices.outlines.items()
            },
            index={plane: places[::2] for plane, places in slices.index.items()},
            middle={plane: i // 2 for plane, i in slices.middle.items()},
        )


def _hash(part: str) -> str:
    """As the policy spells which script or style is allowed."""
    digest = hashlib.sha256(part.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
