"""The last few results of costly work, shared between threads."""

import collections
import concurrent.futures
import copy
import threading
from collections.abc import Callable
from typing import Any

from unireg_jax.errors import FAILED, UserError


class Kept:
    """The last few things made, by key; threads that ask for the same one wait."""

    def __init__(self, size: int):
        self._size = size
        self._lock = threading.Lock()
        self._entries: collections.OrderedDict[Any, tuple] = collections.OrderedDict()

    def get(self, key: Any, make: Callable[[], Any], held: Any = None) -> Any:
        """Result of `make`, or what it says of bad input.

        `held` lives as long, so an id stays its. Other exceptions, of memory or of a
        disk, are for those who wait and not kept.
        """
        with self._lock:
            absent = key not in self._entries
            if absent:
                self._entries[key] = concurrent.futures.Future(), held
                if len(self._entries) > self._size:
                    self._entries.popitem(last=False)
            self._entries.move_to_end(key)
            future, _ = self._entries[key]
        if absent:
            try:
                future.set_result(make())
            except BaseException as error:  # for those who wait, too
                if not (isinstance(error, UserError) and error.exit_code == FAILED):
                    # No fault of what was asked for: the next one may have better luck.
                    self._drop(key, future)
                known = isinstance(error, UserError)
                future.set_exception(copy.copy(error) if known else error)
        error = future.exception()
        if isinstance(error, UserError):
            # Its own for each: one that is raised holds the frames of all who get it,
            # and with them their scans.
            raise copy.copy(error)
        return future.result()

    def _drop(self, key: Any, future: concurrent.futures.Future) -> None:
        with self._lock:
            if key in self._entries and self._entries[key][0] is future:
                del self._entries[key]
