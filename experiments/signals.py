"""Signals that end a run: the first asks for it, one that comes later acts at once.

SIGTERM and SIGINT; SIGHUP and SIGUSR1, which schedulers send before they take a machine
away. Some send two for one request: systemd SIGTERM and SIGHUP, a terminal that closes
SIGHUP twice, `timeout` one to the process and one to its group.

The interpreter runs a handler only between two of its own instructions, so not while a
program compiles: a thread hears signals in between.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from unireg_jax.errors import PREEMPTED

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_SAME_S = 1.0  # signals within it are one request


class Stop:
    """Whether a signal has asked the run to end; from `listening`.

    Attributes:
        number: of the first signal, 0 before.
    """

    def __init__(self, saved: Callable[[], bool] | None):
        self.number = 0
        self._asked = threading.Event()
        self._saved = saved
        self._starting = saved is not None
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, end == self._read)

    def is_set(self) -> bool:
        """True from the first signal on."""
        return self._asked.is_set()

    def started(self) -> None:
        """From now on there is more to save than what is saved already."""
        self._starting = False

    def listen(self) -> None:
        """Takes the signals, again where a library has taken them meanwhile."""
        for number in NUMBERS:
            # `nohup` has a run ignore the end of its terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def _handle(self, number: int, frame) -> None:
        self._hear(number)

    def _watch(self) -> None:
        """In a thread: hears of every signal the moment it comes.

        So it alone can tell a second request: a handler may run long after its signal.
        """
        first = None
        while (number := os.read(self._read, 1)[0]) != 0:
            if number in NUMBERS:
                now = time.monotonic()
                first = now if first is None else first
                if now - first > _SAME_S:
                    self._leave(number, saved=False)
                self._hear(number)

    def _hear(self, number: int) -> None:
        """Called twice for a signal, by handler and thread."""
        if self._starting:
            self._leave(number, saved=self._saved())
        elif not self.is_set():
            self.number = number
            self._asked.set()

    def _leave(self, number: int, *, saved: bool) -> None:
        """Ends the process at once: the disk is fit for that at any moment."""
        text = f"stopped by {signal.Signals(number).name}; run again to go on\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        os._exit(PREEMPTED if saved else 128 + number)


@contextlib.contextmanager
def listening(saved: Callable[[], bool] | None = None) -> Iterator[Stop]:
    """Takes the signals within it; in the main thread.

    Args:
        saved: whether there is anything to go on from. With it, a signal that comes
            before `Stop.started` ends the process at once: with 75 if there is, else
            with 128 + its number. Nothing is lost, because nothing was to be saved.

    Yields:
        Stop.
    """
    stop = Stop(saved)
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    thread = threading.Thread(target=stop._watch, name="signals", daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(-1)
    stop.listen()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.write(stop._write, b"\0")
        thread.join()
        os.close(stop._read)
        os.close(stop._write)
