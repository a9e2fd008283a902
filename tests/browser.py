"""Headless Chromium without a driver: its DevTools protocol through a pipe.

Two file descriptors, messages of JSON that end in a zero byte; the standard library is
enough. Debian's package is `chromium`.
"""

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATH = next((found for name in NAMES if (found := shutil.which(name))), None)
# The browser reads from descriptor 3 and writes to 4.
_LAUNCHER = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(word), fcntl.F_DUPFD, 10) for word in sys.argv[1:3]]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
_SECONDS = 60.0  # for any answer: a busy machine starts a browser slowly


class Page:
    """One open page.

    Attributes:
        complaints: what the console said and what scripts threw.
        requests: addresses that were asked for, besides data in the page itself.
    """

    def __init__(self, ask, session):
        self._ask, self._session = ask, session
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def evaluate(self, script: str) -> Any:
        """Value of an expression; a promise is waited for."""
        answer = self._ask(
            "Runtime.evaluate",
            {"expression": script, "returnByValue": True, "awaitPromise": True},
            self._session,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            event = {"type": kind, "key": key, "text": key if kind == "keyDown" else ""}
            self._ask("Input.dispatchKeyEvent", event, self._session)

    def note(self, message: dict) -> None:
        """Keeps what an event tells."""
        name, told = message["method"], message["params"]
        if name == "Network.requestWillBeSent":
            address = told["request"]["url"]
            if not address.startswith("data:"):
                self.requests.append(address)
        elif name == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif name == "Log.entryAdded":
            self.complaints.append(told["entry"]["text"])
        elif name == "Runtime.consoleAPICalled":
            self.complaints.append(str(told["args"]))


@contextlib.contextmanager
def opened(file: Path, profile: Path, *, scripts: bool = True) -> Iterator[Page]:
    """Opens a file of this machine.

    Args:
        file: HTML.
        profile: empty folder for the browser.
        scripts: whether it runs scripts.

    Yields:
        Page, loaded.
    """
    to_browser, from_browser = os.pipe(), os.pipe()
    inherited = to_browser[0], from_browser[1]
    command = [
        *(PATH, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update"),
        *("--disable-dev-shm-usage", "--window-size=1280,900"),
        *(f"--user-data-dir={profile}", "--remote-debugging-pipe"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, *map(str, inherited), *command],
        pass_fds=inherited,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for descriptor in inherited:
        os.close(descriptor)
    try:
        yield _open(_Channel(to_browser[1], from_browser[0]), file, scripts)
    finally:
        process.terminate()
        process.wait(_SECONDS)
        os.close(to_browser[1])
        os.close(from_browser[0])


class _Channel:
    """Questions and answers; events go to `listener`."""

    def __init__(self, out: int, into: int):
        self._out, self._into, self._rest = out, into, b""
        self._numbers = itertools.count(1)
        self.listener = lambda message: None

    def __call__(self, method: str, params: dict, session: str | None = None) -> dict:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (got := self.read()).get("id") != number:
            pass
        assert "error" not in got, got
        return got["result"]

    def read(self) -> dict:
        """The next message; events are passed on."""
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._rest:
            left = end - time.monotonic()
            ready, _, _ = select.select([self._into], [], [], max(0, left))
            assert ready, "the browser does not answer"
            block = os.read(self._into, 1 << 16)
            assert block, "the browser ended"
            self._rest += block
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.listener(message)
        return message


def _open(ask: _Channel, file: Path, scripts: bool) -> Page:
    """A tab that has loaded the file."""
    target = ask("Target.createTarget", {"url": "about:blank"})["targetId"]
    attached = {"targetId": target, "flatten": True}
    session = ask("Target.attachToTarget", attached)["sessionId"]
    page, loaded = Page(ask, session), []

    def listen(message):
        page.note(message)
        if message["method"] == "Page.loadEventFired":
            loaded.append(True)

    ask.listener = listen
    for domain in ("Page", "Network", "Log", "Runtime"):
        ask(f"{domain}.enable", {}, session)
    disabled = {"value": not scripts}
    ask("Emulation.setScriptExecutionDisabled", disabled, session)
    ask("Page.navigate", {"url": file.resolve().as_uri()}, session)
    while not loaded:
        ask.read()
    return page
