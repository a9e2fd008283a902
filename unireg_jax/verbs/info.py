"""`unireg info`: version, tasks, weights and their licence."""

import argparse
import json
from typing import Any

from unireg_jax.errors import UserError, shown
from unireg_jax.registration import weights
from unireg_jax.tasks import TASKS
from unireg_jax.verbs import options, outputs, versions
from unireg_jax.verbs.messages import one_line

HELP = "version, tasks and weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.epilog = "example: unireg info --json"
    options.add_messages(parser, quiet=False)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    try:
        found = weights.find_weights()
        _, card = weights.load_weights(found)
        licence = card.get("licence", "not stated")
        used: dict[str, Any] = {"name": found.name, "licence": licence}
        used |= outputs.digest(found)
        used |= {key: card[key] for key in ("features", "embedding") if key in card}
    except UserError as error:
        used = {"missing": str(error)}
    info = {
        "version": versions.version(),
        "tasks": {
            name: {"region": t.region.name.lower(), "type": t.pair_type.name.lower()}
            for name, t in TASKS.items()
        },
        "weights": used,
        "versions": {name: versions.version(name) for name in versions.PACKAGES},
    }
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    print(f"unireg {info['version']}")
    for name, task in info["tasks"].items():
        print(f"task {name.ljust(10)} {task['region']}, {task['type']}-patient")
    words = [used["missing"]] if "missing" in used else [used["name"], used["licence"]]
    print("weights", "  ".join(shown(one_line(word)) for word in words))
    return 0
