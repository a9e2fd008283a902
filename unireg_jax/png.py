"""Pictures as PNG files, by the standard library alone."""

import struct
import zlib

import numpy as np


def encode(
    pixels: np.ndarray, palette: np.ndarray | None = None, *, level: int = -1
) -> bytes:
    """Encodes a picture of 8 bits.

    Args:
        pixels: [H, W, 3] uint8, RGB; or, with a palette, [H, W] of its numbers.
        palette: [N, 3] uint8, RGB.
        level: of zlib, 0 to 9; -1 is its default.

    Returns:
        The file's bytes.
    """
    height, width = pixels.shape[:2]
    # Every line begins with the number of its filter: none.
    lines = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))
    kind = 2 if palette is None else 3
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    parts = [(b"IHDR", header)]
    if palette is not None:
        parts.append((b"PLTE", palette.astype(np.uint8).tobytes()))
    parts.append((b"IDAT", zlib.compress(lines.astype(np.uint8).tobytes(), level)))
    parts.append((b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
