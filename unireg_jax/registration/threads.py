"""Work on many items in a few threads, in order, with a limit of time for each.

No JAX is imported here.
"""

import collections
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

NAME = "unireg-pair"


class End(NamedTuple):
    """How one item ended.

    Attributes:
        item: as given.
        value: what the work returned; None if it was given up.
        timed_out: whether it was given up.
    """

    item: Any
    value: Any
    timed_out: bool = False


class GivenUp(Exception):
    """Raised in work that took too long, when it asks for leave to publish."""


def in_threads(
    items: Iterable[Any],
    work: Callable[[Any, Callable[[], None]], Any],
    *,
    workers: int,
    timeout_s: float | None = None,
) -> Iterator[End]:
    """Works on items, each in one of a few threads.

    A thread cannot be ended from outside. One that takes too long is given up: another
    takes its place, and whatever it was doing it must not publish. So `work` calls
    `claim` once before it makes anything visible: that raises GivenUp in a thread that
    was given up, and from then on the thread is waited for, however long it takes.

    Args:
        items: taken one by one, at most workers + 1 ahead of what was yielded.
        work: work(item, claim) in a thread.
        workers: threads.
        timeout_s: seconds of work on one item, until `claim`; None for no limit.

    Yields:
        End per item, in the order of `items`.

    Raises:
        What `work` raises, at the turn of its item. Then, as when the caller stops,
        items in work are finished, no other is begun, and no thread is left but those
        given up, which do not keep the process alive.
    """
    waiting: collections.deque[_Job] = collections.deque()
    jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
    stopped = threading.Event()
    threads: list[_Thread] = []

    def hire() -> None:
        threads.append(_Thread(jobs, work, stopped))
        threads[-1].start()

    def first() -> End:
        job = waiting.popleft()
        if not job.wait(timeout_s):
            hire()
            return End(job.item, None, timed_out=True)
        if job.error is not None:
            raise job.error
        return End(job.item, job.value)

    try:
        for _ in range(workers):
            hire()
        for item in items:
            waiting.append(_Job(item))
            jobs.put(waiting[-1])
            if len(waiting) > workers:
                yield first()
        while waiting:
            yield first()
    finally:
        stopped.set()
        for _ in threads:
            jobs.put(None)
        while waiting:  # what is begun is finished, or given up
            waiting.popleft().wait(timeout_s)
        for thread in threads:
            if not thread.given_up:
                thread.join()


class _Job:
    """One item, from its turn to its end."""

    def __init__(self, item: Any):
        self.item, self.value, self.error = item, None, None
        self._begun, self._ended = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._claimed = False
        self._start, self._thread = 0.0, None

    def run(self, work: Callable, thread: "_Thread") -> None:
        self._start, self._thread = time.monotonic(), thread
        self._begun.set()
        try:
            self.value = work(self.item, self._claim)
        except BaseException as error:  # raised again in the caller's thread
            self.error = error
        self._ended.set()

    def drop(self) -> None:
        """Ends it before it begins."""
        self._begun.set()
        self._ended.set()

    def wait(self, timeout_s: float | None) -> bool:
        """Waits for the end; False when the item is given up."""
        self._begun.wait()
        if timeout_s is None:
            return self._ended.wait()
        left = self._start + timeout_s - time.monotonic()
        if self._ended.wait(max(left, 0.0)):
            return True
        with self._lock:
            if not self._claimed and not self._ended.is_set():
                self._thread.given_up = True
                return False
        return self._ended.wait()

    def _claim(self) -> None:
        with self._lock:
            if self._thread.given_up:
                raise GivenUp
            self._claimed = True


class _Thread(threading.Thread):
    """One item after the other, until there is None or it is given up."""

    def __init__(self, jobs: queue.SimpleQueue, work: Callable, stopped):
        super().__init__(name=NAME, daemon=True)
        self._jobs, self._work, self._stopped = jobs, work, stopped
        self.given_up = False

    def run(self) -> None:
        while not self.given_up and (job := self._jobs.get()) is not None:
            if self._stopped.is_set():
                job.drop()
            else:
                job.run(self._work, self)
