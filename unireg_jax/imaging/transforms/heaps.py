"""HDF5's heaps of strings, looked through before its library reads them.

The library goes from one string to the next by their sizes. Where one of them is wrong
it stays in its place for ever (HDF5 2.0.0), and neither a signal nor another thread
comes through.
"""

import os
import struct
from collections.abc import Iterator

from unireg_jax.errors import bad_file

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_HEAP = b"GCOL\x01"  # then three bytes that the library skips, and the heap's size
_HEADER = 16  # bytes: of a heap, and of each string
_BLOCK = 1 << 20  # bytes looked through at once
_MOST = 1 << 16  # strings: a file of ITK has one for each transform, and a few more


def check(path: str | os.PathLike) -> None:
    """Refuses a file with a heap whose end the library would not reach.

    Args:
        path: HDF5 file.

    Raises:
        UserError: `checksum`.
        ValueError: it does not begin as a file of ITK.
        OSError: it cannot be read.
    """
    with open(path, "rb") as opened:
        file, left = opened.fileno(), _MOST
        head = os.pread(file, 16, 0).ljust(16, b"\0")
        # Where a superblock, old or new, has the width of sizes.
        if head[:8] != _SIGNATURE or head[14 if head[8] < 2 else 10] != 8:
            raise ValueError("HDF5 of another beginning")
        for place, end in _heaps(file):
            while place + _HEADER <= end:
                header = os.pread(file, _HEADER, place).ljust(_HEADER, b"\0")
                number, used = struct.unpack("<H6xQ", header)
                # Number 0 is what is free, its header counted.
                step = _HEADER + used + -used % 8 if number else used
                left -= 1
                if left < 0 or not 0 < step <= end - place:
                    expected = f"an intact HDF5 file of at most {_MOST} strings"
                    got = f"{used} bytes in a heap of strings at byte {place}"
                    remedy = "copy it or write it again"
                    raise bad_file(path, "checksum", expected, got, remedy)
                place += step


def _heaps(file: int) -> Iterator[tuple[int, int]]:
    """Where strings of a heap may begin, and its end.

    The file is not mapped: it may be cut meanwhile.
    """
    size, last = os.fstat(file).st_size, _BLOCK + len(_HEAP) - 1
    for first in range(0, size, _BLOCK):
        block = os.pread(file, _BLOCK + _HEADER, first)
        found = block.find(_HEAP, 0, last)
        while found >= 0:
            start = first + found
            length = int.from_bytes(block[found + 8 : found + _HEADER], "little")
            # Longer: chance, among a field's numbers, or refused by the library.
            if length <= size - start:
                yield start + _HEADER, start + length
            found = block.find(_HEAP, found + 1, last)
