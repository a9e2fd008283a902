"""TensorBoard's event files: records of protocol buffers, written byte by byte.

The few messages that a run needs, without the packages that usually write them: those
import PyTorch wherever it is installed, half of the time a run takes to start. Field
numbers as in TensorBoard's event.proto and summary.proto.
"""

import struct
from collections.abc import Mapping

_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # wire types
_STRING, _START = 7, 1  # DT_STRING of DataType, START of SessionLog


def version(wall_time: float, *, step: int = 0) -> bytes:
    """The event that begins a file."""
    return _event(wall_time, step, _bytes(3, b"brain.Event:2"))


def restart(wall_time: float, *, step: int) -> bytes:
    """Has TensorBoard hide what earlier files hold from this step on."""
    return _event(wall_time, step, _bytes(7, _number(1, _START)))


def scalars(wall_time: float, step: int, values: Mapping[str, float]) -> bytes:
    """Numbers by name."""
    numbers = {k: _field(2, _FLOAT, struct.pack("<f", v)) for k, v in values.items()}
    return _summary(wall_time, step, numbers)


def text(wall_time: float, step: int, name: str, content: str) -> bytes:
    """A text for TensorBoard's page of texts."""
    shape = _bytes(2, _bytes(2, _number(1, 1)))  # [1]
    tensor = _number(1, _STRING) + shape + _bytes(8, content.encode())
    plugin = _bytes(9, _bytes(1, _bytes(1, b"text")))
    return _summary(wall_time, step, {name: plugin + _bytes(8, tensor)})


def image(wall_time: float, step: int, name: str, png: bytes) -> bytes:
    """A picture.

    Args:
        wall_time: seconds since 1970.
        step: of the run.
        name: of the picture.
        png: the file, of 8 bits RGB.

    Returns:
        The event.
    """
    width, height = struct.unpack(">II", png[16:24])
    content = _number(1, height) + _number(2, width) + _number(3, 3) + _bytes(4, png)
    return _summary(wall_time, step, {name: _bytes(4, content)})


def record(event: bytes) -> bytes:
    """An event as it stands in a file: length and content, each with its checksum."""
    size = struct.pack("<Q", len(event))
    return b"".join((size, _checksum(size), event, _checksum(event)))


def _event(wall_time: float, step: int, what: bytes) -> bytes:
    time = _field(1, _DOUBLE, struct.pack("<d", wall_time))
    return time + _number(2, step) + what


def _summary(wall_time: float, step: int, values: Mapping[str, bytes]) -> bytes:
    """Values by tag, each as the encoded rest of a Summary.Value."""
    parts = [_bytes(1, _bytes(1, k.encode()) + v) for k, v in values.items()]
    return _event(wall_time, step, _bytes(5, b"".join(parts)))


def _field(number: int, wire: int, content: bytes) -> bytes:
    return _varint(number << 3 | wire) + content


def _number(number: int, value: int) -> bytes:
    return _field(number, _VARINT, _varint(value))


def _bytes(number: int, content: bytes) -> bytes:
    return _field(number, _BYTES, _varint(len(content)) + content)


def _varint(value: int) -> bytes:
    """A number from 0, seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _table() -> tuple[int, ...]:
    """CRC-32C of every byte: Castagnoli's polynomial, reflected."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _table()


def _checksum(content: bytes) -> bytes:
    """Masked CRC-32C, little-endian."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return struct.pack("<I", masked)
