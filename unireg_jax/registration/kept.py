"""The last few results of costly work, shared between threads."""

import collections
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any


class Kept:
    """The last few things made, by key; threads that ask for the same one wait."""

    def __init__(self, size: int):
        self._size = size
        self._lock = threading.Lock()
        self._entries: collections.OrderedDict[Any, tuple] = collections.OrderedDict()

    def get(self, key: Any, make: Callable[[], Any], held: Any = None) -> Any:
        """Result or exception of `make`; `held` lives as long, so an id stays its."""
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
                future.set_exception(error)
        return future.result()
