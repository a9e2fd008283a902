"""TensorBoard's events as bytes, of the few kinds that a run has.

By hand, because the packages that write them import PyTorch where there is one, which
takes longer than all else of a start. Messages are those of TensorFlow's event.proto,
summary.proto and tensor.proto; a field is its number and kind, then its content
(protobuf.dev/programming-guides/encoding).
"""

import struct
from collections.abc import Mapping

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_START = 1  # of SessionLog.SessionStatus
_RGB = 3
_STRING = 7  # of DataType


def version(wall_time: float, *, step: int = 0) -> bytes:
    """The record that begins a file.

    Args:
        wall_time: seconds since 1970, as of all records.
        step: of the run.
    """
    return _record(wall_time, step, _bytes(3, b"brain.Event:2"))


def restart(wall_time: float, *, step: int) -> bytes:
    """Has TensorBoard hide what earlier files hold from this step on."""
    return _record(wall_time, step, _bytes(7, _number(1, _START)))


def scalars(wall_time: float, step: int, values: Mapping[str, float]) -> bytes:
    """Numbers by name."""
    parts = [
        _value(name, _tag(2, _FIXED32) + struct.pack("<f", value))
        for name, value in values.items()
    ]
    return _record(wall_time, step, _bytes(5, b"".join(parts)))


def text(wall_time: float, step: int, name: str, content: str) -> bytes:
    """A text for TensorBoard's page of texts."""
    shape = _bytes(2, _number(1, 1))  # one dimension, of size 1
    tensor = _number(1, _STRING) + _bytes(2, shape) + _bytes(8, content.encode())
    plugin = _bytes(1, _bytes(1, b"text"))
    value = _value(name, _bytes(8, tensor) + _bytes(9, plugin))
    return _record(wall_time, step, _bytes(5, value))


def image(wall_time: float, step: int, name: str, png: bytes) -> bytes:
    """A picture: a PNG file of 8 bits RGB."""
    width, height = struct.unpack(">II", png[16:24])
    size = _number(1, height) + _number(2, width) + _number(3, _RGB)
    value = _value(name, _bytes(4, size + _bytes(4, png)))
    return _record(wall_time, step, _bytes(5, value))


def _record(wall_time: float, step: int, content: bytes) -> bytes:
    """An event as it stands in a file: length and content, each with its checksum."""
    time = _tag(1, _FIXED64) + struct.pack("<d", wall_time)
    event = time + _number(2, step) + content
    size = struct.pack("<Q", len(event))
    return b"".join((size, _checksum(size), event, _checksum(event)))


def _value(name: str, content: bytes) -> bytes:
    """One of a summary's values."""
    return _bytes(1, _bytes(1, name.encode()) + content)


def _tag(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _number(field: int, value: int) -> bytes:
    return _tag(field, _VARINT) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _tag(field, _BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes((*found, value))


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC = tuple(map(_crc_of, range(256)))


def _checksum(content: bytes) -> bytes:
    """CRC-32C, rotated and shifted as TFRecord files have it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return struct.pack("<I", masked)
