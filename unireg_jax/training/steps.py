"""The folder of a run's saved steps: which there are, which are sound, which may go.

    <step>/               whole: its files and its manifest are on the disk
    damaged-<step>-<n>/   set aside, because a file had changed
    unfinished-<step>*/   being saved, or left by a kill: swept at start
    deleted-<step>/       being deleted, or left by a kill: swept

A step gets its number as a name last of all, and older ones go only then: there is a
whole step at every moment.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unireg_jax.errors import CHECKPOINT, STORAGE, UserError, shown, tell
from unireg_jax.training import manifest

_LITTER = ("unfinished-*", "deleted-*", "*.orbax-checkpoint-tmp*")
# How TensorStore, whose errors are ValueErrors, says what a disk refuses.
_OS_FAULT = re.compile("os_error_code|RESOURCE_EXHAUSTED|DATA_LOSS")


@contextlib.contextmanager
def storage(folder: Path) -> Iterator[None]:
    """Makes one line of what a disk refuses.

    Raises:
        UserError: `storage`, exit code 6.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not _OS_FAULT.search(str(error)):
            raise
        raise UserError(
            "storage",
            f"{shown(folder)}: could not be written ({first_line(error)}); what was "
            "saved before is whole: free space or mend the disk, then run the same "
            "command again",
            STORAGE,
        ) from error


def first_line(error: Exception) -> str:
    """What an error says, without its trace."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:160]


class Steps:
    """Saved steps of one run; every answer is read from the disk."""

    def __init__(self, folder: Path, *, keep: int, tidies: bool):
        """Opens the folder.

        Args:
            folder: of the steps.
            keep: how many of the newest stay.
            tidies: whether this process may make, rename and remove: one at a time.
        """
        self.folder = folder
        self._keep = keep
        self._tidies = tidies

    def __getitem__(self, step: int) -> Path:
        """Where a whole step lies."""
        return self.folder / str(step)

    def unfinished(self, step: int) -> Path:
        """Where a step is saved before it counts."""
        return self.folder / f"unfinished-{step}"

    def all(self) -> list[int]:
        """Whole steps, oldest first."""
        with contextlib.suppress(FileNotFoundError):
            names = [path.name for path in self.folder.iterdir()]
            return sorted(int(n) for n in names if re.fullmatch("0|[1-9][0-9]*", n))
        return []

    def latest(self) -> int | None:
        """Newest whole step.

        Raises:
            UserError: `checkpoint_damaged`, exit code 9: all that there were are set
                aside; a run would start anew unasked.
        """
        if steps := self.all():
            return steps[-1]
        if aside := sorted(path.name for path in self.folder.glob("damaged-*")):
            raise self._no_sound_step(", ".join(aside))
        return None

    def acknowledge(self, step: int, run: Mapping[str, Any]) -> None:
        """Makes a saved step count, then drops those that are too old.

        Args:
            step: its files are in `unfinished(step)`.
            run: see `manifest.write`.

        Raises:
            OSError: storage; the step does not count, or an old one was not deleted.
        """
        manifest.write(self.unfinished(step), step, run)
        self.unfinished(step).rename(self[step])
        manifest.flush(self.folder)
        for old in self.all()[: -self._keep]:
            gone = self.folder / f"deleted-{old}"
            self[old].rename(gone)
            shutil.rmtree(gone)

    def sweep(self) -> None:
        """Removes what kills have left; no save may be in flight."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for pattern in _LITTER:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)

    def adopt(self) -> None:
        """Gives steps of a release that knew no manifests theirs."""
        for step in self.all():
            if not (self[step] / manifest.NAME).exists():
                manifest.write(self[step], step, {})

    def find_sound(self) -> int:
        """Newest step that is what was saved; newer ones are set aside, with a warning.

        Raises:
            UserError: exit code 9: `checkpoint_missing`; `checkpoint_damaged`, all
                are, and stay where they are; `checkpoint_newer`.
        """
        bad = []
        for step in reversed(self.all()):
            try:
                manifest.verify(self[step], step)
            except manifest.DamagedError as error:
                if self[step].exists():  # else deleted by the run that is read beside
                    bad.append((step, error))
            else:
                self._set_aside(bad, step)
                return step
        if bad:
            raise self._no_sound_step("; ".join(f"{n}: {error}" for n, error in bad))
        self.latest()
        raise UserError(
            "checkpoint_missing",
            f"{shown(self.folder)}: no checkpoint; train first",
            CHECKPOINT,
        )

    def _set_aside(
        self, bad: Sequence[tuple[int, manifest.DamagedError]], used: int
    ) -> None:
        for step, error in bad:
            where = "left there"
            if self._tidies:
                number = 1 + len(list(self.folder.glob(f"damaged-{step}-*")))
                aside = self.folder / f"damaged-{step}-{number}"
                with storage(self.folder):
                    self[step].rename(aside)
                    manifest.flush(self.folder)
                where = f"set aside as {aside.name}"
            tell(
                f"warning: checkpoint_damaged: {shown(self[step])}: {error}; {where}, "
                f"step {used} is used"
            )

    def _no_sound_step(self, what: str) -> UserError:
        return UserError(
            "checkpoint_damaged",
            f"{shown(self.folder)}: a step as it was saved expected, none found "
            f"({what}); copy one back, or start anew with another --workdir",
            CHECKPOINT,
        )
