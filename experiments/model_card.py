"""Writes what the package's weights are into docs/weights.md, from their own cards.

    python -m experiments.model_card

To be run when weights were released (experiments/release.py): digests, sizes, licences
and training scans between the two marks of the page come from the files, the text
around them from people. tests/test_model_card.py fails where they differ.
"""

from pathlib import Path
from typing import Any

from absl import app

from unireg_jax.registration import weights

PAGE = Path(__file__).resolve().parents[1] / "docs" / "weights.md"
FIRST, LAST = "<!-- facts: python -m experiments.model_card -->", "<!-- end -->"


def facts() -> str:
    """Markdown: a table of the files, then what each is and was trained on."""
    lines = ["| file | kind | parameters | bytes | SHA-256 |", "|---|---|---|---|---|"]
    about = []
    for path in sorted(weights.PACKAGE.glob("*.safetensors"), reverse=True):
        tensors, card = weights.load_weights(path)
        count = _spaced(_count(tensors.get("params", tensors)))
        size = _spaced(path.stat().st_size)
        kind = card.get("kind", "unireg")
        lines.append(
            f"| `{path.name}` | {kind} | {count} | {size} | `{card['sha256']}` |"
        )
        about += ["", *_about(path.stem, card)]
    return "\n".join([*lines, *about])


def _about(name: str, card: dict[str, Any]) -> list[str]:
    grid = card["preprocess"]
    shape = "×".join(map(str, grid["shape"]))
    spacing = "×".join(f"{s:g}" for s in grid["spacing_mm"])
    architecture = ", ".join(f"{k} {v}" for k, v in card["architecture"].items())
    training = dict(card.get("training", {}))
    start = training.pop("init_from", None)
    training = ", ".join(f"{k} {v}" for k, v in training.items())
    if start:
        training += f", from {start['name']} (SHA-256 {start['sha256'][:16]}…)"
    features = card["features"]
    if embedding := card.get("embedding"):
        features += f" of `{embedding['name']}`"
    held_out = card.get("held_out", "nothing")
    lines = [
        f"### `{name}`",
        "",
        card.get("description", ""),
        "",
        f"- Licence: {card.get('licence', 'not stated')}.",
        f"- Architecture: {architecture}; features {features}.",
        f"- Sees: {shape} voxels of {spacing} mm, {grid['hu_low']:g} … "
        f"{grid['hu_high']:g} HU.",
        f"- Training: {training}. Held out of it: {held_out}.",
    ]
    lines += [f"- Data: {s['scans']}: {s['licence']}." for s in card.get("sources", [])]
    return lines


def _count(tree: Any) -> int:
    return sum(map(_count, tree.values())) if isinstance(tree, dict) else tree.size


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def block(page: str) -> tuple[str, str, str]:
    """Text before the facts, the facts, and text after them; ValueError without."""
    before, mark, rest = page.partition(FIRST)
    inside, end, after = rest.partition(LAST)
    if not mark or not end:
        raise ValueError(f"{PAGE.name} must hold {FIRST} and {LAST}; put them back")
    return before, inside.strip("\n"), after


def main(argv) -> None:
    del argv
    before, _, after = block(PAGE.read_text(encoding="utf-8"))
    text = f"{before}{FIRST}\n{facts()}\n{LAST}{after}"
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    app.run(main)
