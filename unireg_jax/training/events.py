"""TensorBoard's events: the messages and checksums of tensorboardX, as bytes.

Its writer is left out: a thread of its own that a full disk would kill, and that may
leave half a record.
"""

import struct
from collections.abc import Mapping

from tensorboardX import record_writer, summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


def version(wall_time: float, *, step: int = 0) -> Event:
    """The event that begins a file."""
    return Event(wall_time=wall_time, step=step, file_version="brain.Event:2")


def restart(wall_time: float, *, step: int) -> Event:
    """Has TensorBoard hide what earlier files hold from this step on."""
    start = SessionLog(status=SessionLog.START)
    return Event(wall_time=wall_time, step=step, session_log=start)


def scalars(wall_time: float, step: int, values: Mapping[str, float]) -> Event:
    """Numbers by name."""
    parts = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
    return Event(wall_time=wall_time, step=step, summary=Summary(value=parts))


def text(wall_time: float, step: int, name: str, content: str) -> Event:
    """A text for TensorBoard's page of texts."""
    found = summary.text(name, content)
    found.value[0].tag = name  # without the suffix that tensorboardX appends
    return Event(wall_time=wall_time, step=step, summary=found)


def image(wall_time: float, step: int, name: str, png: bytes) -> Event:
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
    picture = Summary.Image(
        width=width, height=height, colorspace=3, encoded_image_string=png
    )
    value = Summary.Value(tag=name, image=picture)
    return Event(wall_time=wall_time, step=step, summary=Summary(value=[value]))


def record(event: Event) -> bytes:
    """An event as it stands in a file: length and content, each with its checksum."""
    content = event.SerializeToString()
    size = struct.pack("<Q", len(content))
    return b"".join((size, _checksum(size), content, _checksum(content)))


def _checksum(content: bytes) -> bytes:
    return struct.pack("<I", record_writer.masked_crc32c(content))
