"""The pairs of `unireg batch` on a Ray cluster: Ray Data, one actor per device.

Imported only by `batch --ray`. The actors write the results, on a file system that all
machines see; what became of each pair comes back to the process that keeps the journal.
"""

import argparse
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import ray
import ray.data

from unireg_jax.errors import UserError
from unireg_jax.manifest import Case
from unireg_jax.registration import weights
from unireg_jax.registration.threads import End
from unireg_jax.verbs import results, worker

_RETRIES = 1  # of a pair whose actor died


class Actor:
    """A worker that keeps its compiled network between pairs."""

    def __init__(self, args: argparse.Namespace, weights_sha256: str, network: bool):
        self._work = worker.Worker(args, weights_sha256, network=network)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Registers the pairs of a block."""
        cases = [Case(**json.loads(text)) for text in rows["case"]]
        try:
            items = [json.dumps(self._work(case)) for case in cases]
        except UserError as error:  # weights, device: ends the job, not this actor
            fault = [error.reason, str(error), error.exit_code]
            items = [json.dumps({"fault": fault})] * len(cases)
        return {"case": list(rows["case"]), "item": items}


def anywhere(args: argparse.Namespace) -> dict[str, str]:
    """Arguments that name files, as they are understood in any working folder.

    Weights of the package keep their name: another machine has its package elsewhere.
    """
    found = weights.find_weights(args.weights)
    return {"out": os.path.abspath(args.out), "weights": _called(found)}


def environment() -> dict[str, str]:
    """Variables of the actors: the embedding is ours, whatever a machine's own says."""
    return {weights.EMBEDDING_VARIABLE: _called(weights.default_embedding())}


def _called(file: Path) -> str:
    return file.stem if file.parent == weights.PACKAGE else os.path.abspath(file)


def start() -> None:
    """Joins or starts a cluster; whoever handles signals goes on doing so.

    Ray would have SIGTERM end this process at once.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # one that Python did not set
                    signal.signal(number, handler)


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

    Raises:
        UserError: weights that cannot be used, exit code 9; `device` that is not
            there, exit code 2.
    """
    ours = not ray.is_initialized()
    if ours:
        start()
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # a pair whose actor dies stops no other
        gpus = ray.cluster_resources().get("GPU", 0) > 0
        given = {k: v for k, v in vars(args).items() if k != "run"} | anywhere(args)
        rows = [{"case": json.dumps(case._asdict())} for case in cases]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Actor,
            fn_constructor_args=(argparse.Namespace(**given), weights_sha256, network),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=args.ray),
            num_gpus=1 if gpus else 0,
            num_cpus=1,
            max_task_retries=_RETRIES,
            runtime_env={"env_vars": environment()},
        )
        lost = {case.id: case for case in cases}
        for row in done.iter_rows():
            item = json.loads(row["item"])
            if "fault" in item:
                raise UserError(*item["fault"])
            yield End(lost.pop(json.loads(row["case"])["id"]), item)
            if stop.is_set():
                return
        for case in lost.values():
            item = worker.failure(
                args,
                case,
                "worker_died",
                f"worker_died: its process ended {_RETRIES + 1} times, for want of "
                "memory perhaps; try it alone with `unireg register`",
                weights_sha256=weights_sha256,
                settings=results.settings_sha256(args, case),
                seconds=0.0,
            )
            # Nobody knows whether they had come to its results of before.
            yield End(case, item | {"begun": False})
    finally:
        if ours:
            ray.shutdown()
