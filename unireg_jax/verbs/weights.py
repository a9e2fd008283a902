"""`unireg weights`: convert, list and verify weights."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from unireg_jax.errors import CHECKPOINT, UserError, shown
from unireg_jax.registration import sam_weights, weights
from unireg_jax.verbs import options
from unireg_jax.verbs.messages import complain, one_line, progress, with_reason

HELP = "convert, list and verify weights"
# Variables that name weights, and those of the package that are used without them.
VARIABLES = {
    weights.VARIABLE: weights.DEFAULT,
    weights.EMBEDDING_VARIABLE: weights.EMBEDDING,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.epilog = "example: unireg weights list"
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    verb = actions.add_parser(
        "convert",
        help="public SAM checkpoint (.pth) -> .safetensors",
        description="Reads the anatomical embedding network from a public SAM, SAMv2 "
        "or SAME checkpoint, without PyTorch and without running anything that is in "
        "the file, and writes it with its description (.json) beside it.",
        epilog="example: unireg weights convert --from SAM.pth --to sam.safetensors "
        '--licence "as its publisher says"',
    )
    add = verb.add_argument
    add("--from", dest="source", required=True, metavar="FILE", help=".pth to read")
    add(
        "--to",
        dest="file",
        required=True,
        metavar="FILE",
        help="name ending in .safetensors",
    )
    add("--licence", metavar="TEXT", help="of the checkpoint, for the description")
    options.add_overwrite(verb, "FILE and its .json")
    options.add_messages(verb)
    verb.set_defaults(act=_convert)

    verb = actions.add_parser(
        "list",
        help="weights of the package, of the variables, and FILEs",
        description="Lists the package's weights, those that $UNIREG_WEIGHTS and "
        "$UNIREG_SAM name, and FILEs, each verified; says which are used where "
        "no others are named.",
        epilog="example: unireg weights list sam.safetensors --json",
    )
    verb.add_argument("files", nargs="*", metavar="FILE", help="more .safetensors")
    options.add_messages(verb, quiet=False)
    verb.set_defaults(act=_list)

    verb = actions.add_parser(
        "verify",
        help="digest, description and numbers of one file",
        description="Says ok when the tensors have the digest that the description "
        "beside them names and all numbers are finite; else what is wrong, and exit "
        "code 9.",
        epilog="example: unireg weights verify sam.safetensors",
    )
    verb.add_argument("file", metavar="FILE", help=".safetensors")
    options.add_messages(verb, quiet=False)
    verb.set_defaults(act=_verify)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    return args.act(args)


def _convert(args: argparse.Namespace) -> int:
    say = progress(args.quiet)
    say("reading")
    licence = sam_weights.UNKNOWN_LICENCE if args.licence is None else args.licence
    card = sam_weights.convert(
        args.source, args.file, licence=licence, overwrite=args.overwrite
    )
    say(f"{shown(args.file)}: {card['source']['layout']}, licence {card['licence']}")
    if args.json:
        print(json.dumps(card, indent=2))
    return 0


def _list(args: argparse.Namespace) -> int:
    places = [
        ("package", file) for file in sorted(weights.PACKAGE.glob("*.safetensors"))
    ]
    places += [
        (f"${name}", weights.named_file(os.environ[name]))
        for name in VARIABLES
        if os.getenv(name)
    ]
    places += [("argument", weights.named_file(file)) for file in args.files]
    packaged = {file for name, file in VARIABLES.items() if not os.getenv(name)}
    rows = []
    for source, path in places:
        used = path.name in packaged if source == "package" else source[0] == "$"
        row = {"name": path.name, "source": source, "used": used}
        try:
            row |= _row(path)
        except UserError as error:
            named = f"{source}: " if source[0] == "$" else ""
            row["fault"] = one_line(named + with_reason(error))
        rows.append(row)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            if "fault" not in row:
                print(_line(row))
    faults = [row["fault"] for row in rows if "fault" in row]
    for fault in faults:
        complain(fault, CHECKPOINT)
    return CHECKPOINT if faults else 0


def _verify(args: argparse.Namespace) -> int:
    path = weights.named_file(args.file)
    row = {"name": path.name, **_row(path)}
    print(json.dumps(row, indent=2) if args.json else f"ok  {_line(row)}")
    return 0


def _row(path: Path) -> dict[str, Any]:
    """What a verified file holds."""
    tensors, spec = weights.load_weights(path)

    def count(tree):
        return sum(map(count, tree.values())) if isinstance(tree, dict) else tree.size

    return {
        "kind": spec.get("kind", "unireg"),
        # Of an embedding, its running statistics are none.
        "parameters": count(tensors.get("params", tensors)),
        "licence": spec.get("licence", "not stated"),
        "sha256": spec["sha256"],
    }


def _line(row: dict[str, Any]) -> str:
    """The row for people."""
    count = f"{row['parameters']:,} parameters"
    words = [row["name"], row["kind"], count, row["sha256"][:16], row["licence"]]
    if row.get("used"):
        words.append("used where no others are named")
    return "  ".join(shown(one_line(word)) for word in words)
