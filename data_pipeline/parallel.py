"""Work over many items: processes, a lost one named, signals in order.

A worker always ends its item; Ctrl-C and SIGTERM reach the parent only. One whose
parent was killed ends at once: the parent's lock is gone, and nobody waits.
"""

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from unireg_jax.imaging import grids

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def run(
    work: Callable[[_Item], _Result],
    items: Sequence[_Item],
    workers: int,
    *,
    died: Callable[[_Item], _Result],
) -> Iterator[_Result]:
    """Does every item and gives the results as they come.

    Args:
        work: a module's function, so that a process can find it; it must not raise.
        items: what to do; each is pickled when there are several processes.
        workers: processes; 1 works in this one.
        died: the result of an item whose process was killed.

    Yields:
        One result per item, in no certain order.
    """
    if workers <= 1 or len(items) <= 1:
        yield from map(work, items)
        return
    left = dict(enumerate(items))
    try:
        with _pool(min(workers, len(items))) as pool:
            with _no_interrupt():
                futures = {pool.submit(work, item): i for i, item in left.items()}
            for future in concurrent.futures.as_completed(futures):
                result = future.result()
                del left[futures[future]]
                yield result
        return
    except BrokenProcessPool:
        pass
    # A worker was killed and took the pool with it. One process per item tells which.
    for item in list(left.values()):
        try:
            with _pool(1) as pool:
                with _no_interrupt():
                    future = pool.submit(work, item)
                yield future.result()
        except BrokenProcessPool:
            yield died(item)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Lets SIGTERM, as batch systems send it, end the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Processes; at the end, what still waits in the queue is dropped."""
    # Spawned: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_end_with_parent
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Lets a thread of a worker wait for its parent's end, however that comes."""
    sentinel = multiprocessing.parent_process().sentinel

    def end() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Adds --workers to a command that reads scans and writes none."""
    cores = min(4, grids.cores())
    parser.add_argument(
        "--workers",
        type=int,
        default=cores,
        metavar="N",
        help=f"processes, each with one scan in memory (default here: {cores})",
    )


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Holds signals back; processes started meanwhile never see them, the parent later.

    So a worker always ends its scan, and no pool is interrupted half made.
    """
    held, came = (signal.SIGINT, signal.SIGTERM), []
    before = {}
    if threading.current_thread() is threading.main_thread():
        # The mask alone does not protect the parent: the threads of a BLAS take signals
        # too, and Python then handles them in the main thread.
        for number in held:
            before[number] = signal.signal(number, lambda n, _: came.append(n))
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for number in came[:1]:
            signal.raise_signal(number)
