"""Types of arguments, and the arguments that several verbs share."""

import argparse

from unireg_jax import registration
from unireg_jax.errors import USAGE, UserError

# Labels, as they are called here and elsewhere.
FIXED_LABEL = ("--fixed-label", "--fixed-segmentation")
MOVING_LABEL = ("--moving-label", "--moving-segmentation")
# Those of registration/refine.py, which a command line is read without.
SMOOTHNESS, MOST_SMOOTHNESS = 0.5, 20.0


def add_messages(parser: argparse.ArgumentParser, *, quiet: bool = True) -> None:
    """--quiet, --json and --debug, which every verb has."""
    if quiet:
        parser.add_argument(
            "--quiet", action="store_true", help="warnings and errors alone on stderr"
        )
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    parser.add_argument(
        "--debug", action="store_true", help="trace of an internal error on stderr"
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """--weights of the network."""
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="a file, or a name of the package (unireg weights list); default: "
        "$UNIREG_WEIGHTS, then the package's unireg",
    )


def add_overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    """--overwrite; `what` would be lost."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --allow-cpu."""
    parser.add_argument(
        "--device",
        type=device,
        default="auto",
        metavar="NAME",
        help="auto (default: an accelerator where there is one), cpu, gpu or gpu:N",
    )
    parser.add_argument(
        "--allow-cpu",
        action="store_true",
        help="with --device gpu: go on without one",
    )


def use_device(args: argparse.Namespace) -> None:
    """Makes JAX compute where `add_device` was told; imports it."""
    if args.device != "auto":
        registration.use_device(args.device, allow_cpu=args.allow_cpu)


def both_labels(args: argparse.Namespace) -> None:
    """Refuses one label map without the other."""
    if bool(args.fixed_label) != bool(args.moving_label):
        raise UserError(
            "schema",
            "--fixed-label and --moving-label belong together, got one; name both",
            USAGE,
        )


def grid(text: str) -> tuple[int, ...]:
    """X,Y,Z of a network grid."""
    words = text.split(",")
    shape = tuple(int(word) for word in words if word.strip().isdecimal())
    if len(words) != 3 or len(shape) != 3 or any(n < 16 or n % 16 for n in shape):
        raise argparse.ArgumentTypeError(
            f"three multiples of 16 such as 96,96,80 expected, got {text[:40]!r}"
        )
    return shape


def device(text: str) -> str:
    """Name of a device."""
    kind, colon, number = text.partition(":")
    right = text in ("auto", "cpu") or kind == "gpu"
    if not right or (colon and not (number.isascii() and number.isdecimal())):
        raise argparse.ArgumentTypeError(
            f"auto, cpu, gpu or gpu:N expected, got {text[:40]!r}"
        )
    return text


def count(text: str) -> int:
    """Number of iterations."""
    if not text.isdecimal() or not text.isascii() or int(text) > 10_000:
        raise argparse.ArgumentTypeError(
            f"a whole number from 0 to 10000 expected, got {text[:40]!r}"
        )
    return int(text)


def weight(text: str) -> float:
    """A finite weight."""
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise argparse.ArgumentTypeError(
            f"a number of at least 0 such as 1.5 expected, got {text[:40]!r}"
        )
    return weight


def smoothness(text: str) -> float:
    """Of an instance optimisation."""
    value = weight(text)
    if value > MOST_SMOOTHNESS:
        raise argparse.ArgumentTypeError(
            f"a number from 0 to {MOST_SMOOTHNESS:g} expected, got {text[:40]!r}"
        )
    return value
