"""The pairs of `unireg batch` on a Ray cluster: Ray Data, one actor per device.

Imported only by `batch --ray`. The actors write the results, on a file system that all
machines see; what became of each pair comes back to the process that keeps the journal.
"""

import argparse
import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import ray
import ray.data

from unireg_jax.manifest import Case
from unireg_jax.registration.threads import End
from unireg_jax.verbs import worker


class Actor:
    """A worker that keeps its compiled network between pairs."""

    def __init__(self, args: argparse.Namespace, weights_sha256: str, network: bool):
        self._work = worker.Worker(args, weights_sha256, network=network)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Registers the pairs of a block."""
        cases = [Case(**json.loads(text)) for text in rows["case"]]
        return {
            "case": list(rows["case"]),
            "item": [json.dumps(self._work(case)) for case in cases],
        }


def run(
    args: argparse.Namespace,
    cases: Sequence[Case],
    weights_sha256: str,
    *,
    network: bool,
    stop: threading.Event,
) -> Iterator[End]:
    """Registers pairs on the cluster that $RAY_ADDRESS names, else on this machine.

    Args:
        args: of `batch.add_arguments`; `ray` is the number of actors.
        cases: the pairs.
        weights_sha256: of the network.
        network: False if every pair's task is "none".
        stop: ends the job once set: pairs in work are lost, and done again next time.

    Yields:
        End per pair, as they come.
    """
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        gpus = ray.cluster_resources().get("GPU", 0) > 0
        absolute = {
            name: os.path.abspath(path)
            for name in ("out", "weights")
            if (path := getattr(args, name))
        }
        given = {k: v for k, v in vars(args).items() if k != "run"} | absolute
        rows = [{"case": json.dumps(case._asdict())} for case in cases]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Actor,
            fn_constructor_args=(argparse.Namespace(**given), weights_sha256, network),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=args.ray),
            num_gpus=1 if gpus else 0,
            num_cpus=1,
        )
        for row in done.iter_rows():
            yield End(Case(**json.loads(row["case"])), json.loads(row["item"]))
            if stop.is_set():
                return
    finally:
        if ours:
            ray.shutdown()
