"""`unireg export`: the network as a StableHLO file."""

import argparse
import json

from unireg_jax import registration
from unireg_jax.errors import shown
from unireg_jax.verbs import options
from unireg_jax.verbs.messages import progress

HELP = "the network as a StableHLO file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.description = (
        "Writes FILE, a program for CPU and CUDA with the weights inside, any batch "
        "size, which JAX and flatbuffers alone can run, and beside it a .json: "
        "inputs, outputs, units, preprocessing, digests. It takes volumes on the "
        "network's grid; pre-alignment and files are not part of it."
    )
    parser.epilog = "example: unireg export --out unireg.stablehlo --shape 96,96,80"
    add = parser.add_argument
    add(
        *("-o", "--out"),
        dest="file",
        required=True,
        metavar="FILE",
        help="name ending in .stablehlo",
    )
    options.add_weights(parser)
    add(
        "--shape",
        type=options.grid,
        metavar="X,Y,Z",
        help="voxels, default of the weights",
    )
    options.add_overwrite(parser, "FILE and its .json")
    options.add_messages(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    say = progress(args.quiet)
    say("tracing")
    card = registration.export_register(
        args.file, weights=args.weights, shape=args.shape, overwrite=args.overwrite
    )
    size = "x".join(map(str, card["preprocess"]["shape"]))
    mib = card["artefact"]["bytes"] / 2**20
    say(f"{shown(args.file)}: {size}, {mib:.1f} MiB")
    if args.json:
        print(json.dumps(card, indent=2))
    return 0
