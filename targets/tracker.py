"""Asks TVM's RPC tracker for a server, in plain Python: the process that searches never imports TVM.

The protocol (`tvm.rpc.tracker`): after a magic number both ways, each message is a JSON list behind its length in four
bytes, little-endian; the first item of a request says what is wanted.
"""

import json
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

_MAGIC = 0x2F271
_SUCCESS, _REQUEST, _SUMMARY = 0, 4, 6
_MOST_MESSAGE_BYTES = 1 << 24
_ANSWER_S = 10.0
"""A tracker answers at once, unless it is asked for a server."""


class TrackerError(OSError):
    """A tracker that is not there, is something else, or ended the conversation; the message is one line that says which."""


class NoServer(TrackerError):
    """The time is up and no server is free; the message says how many there are."""


def servers(host: str, port: int, key: str) -> int:
    """How many servers are registered with that key, busy or free.

    Raises:
        TrackerError: if the tracker cannot be asked.
    """
    with _connected(host, port) as connection:
        _send(connection, [_SUMMARY])
        try:
            status, summary = _receive(connection, time.monotonic() + _ANSWER_S)
        except TimeoutError:
            raise TrackerError(f"the tracker at {host}:{port} does not answer") from None
        if status != _SUCCESS:
            raise TrackerError(f"the tracker at {host}:{port} gives no summary (status {status})")
        try:
            return sum(server["key"] == f"server:{key}" for server in summary["server_info"])
        except (LookupError, TypeError):
            raise _unknown(summary) from None


def request(host: str, port: int, key: str, within_s: float, still_wanted: Callable[[], bool]) -> tuple[str, int, str]:
    """Waits in the tracker's queue for a free server.

    Args:
        within_s: most seconds to wait.
        still_wanted: asked every second; the wait ends once it says no.

    Returns:
        The server's host, port, and the key that this client must name.

    Raises:
        NoServer: if none was free in time, or none is wanted any more.
        TrackerError: if the tracker cannot be asked.
    """
    with _connected(host, port) as connection:
        _send(connection, [_REQUEST, key, "", 1])
        try:
            status, value = _receive(connection, time.monotonic() + within_s, still_wanted)
        except TimeoutError:
            raise NoServer(f"no server with key {key!r} became free at the tracker {host}:{port} in {within_s:.0f} s") from None
        if status != _SUCCESS:
            raise TrackerError(f"the tracker at {host}:{port} gives no server (status {status})")
        try:
            return str(value[0]), int(value[1]), str(value[2])
        except (LookupError, TypeError, ValueError):
            raise _unknown(value) from None


def _connected(host: str, port: int) -> socket.socket:
    try:
        connection = socket.create_connection((host, port), timeout=_ANSWER_S)
    except (OSError, UnicodeError) as error:
        raise TrackerError(f"no tracker answers at {host}:{port}: {getattr(error, 'strerror', None) or error}") from None
    try:
        connection.sendall(struct.pack("<i", _MAGIC))
        (magic,) = struct.unpack("<i", _exactly(connection, 4, time.monotonic() + _ANSWER_S))
        if magic != _MAGIC:
            raise TrackerError("what listens there is something else")
    except OSError as error:
        connection.close()
        raise TrackerError(f"no tracker answers at {host}:{port}: {error}") from None
    return connection


def _send(connection: socket.socket, message: list[Any]) -> None:
    data = json.dumps(message).encode()
    try:
        connection.sendall(struct.pack("<i", len(data)) + data)
    except OSError as error:
        raise TrackerError(f"the connection to the tracker broke: {error.strerror or error}") from None


def _receive(connection: socket.socket, until: float, still_wanted: Callable[[], bool] = lambda: True) -> Any:
    """The next message, a pair or a list of them.

    Raises:
        TimeoutError: if it does not come in time or is not wanted any more.
        TrackerError: if the connection ends or the message is none.
    """
    try:
        (size,) = struct.unpack("<i", _exactly(connection, 4, until, still_wanted))
        if not 0 < size <= _MOST_MESSAGE_BYTES:
            raise TrackerError(f"the tracker sent a message of {size} bytes")
        message = json.loads(_exactly(connection, size, until))
    except TimeoutError:
        raise
    except ValueError:
        raise TrackerError("the tracker sent something else than JSON") from None
    if not isinstance(message, list) or len(message) != 2:
        raise _unknown(message)
    return message


def _unknown(message: object) -> TrackerError:
    return TrackerError(f"the tracker sent an unknown message: {str(message)[:100]!r}")


def _exactly(connection: socket.socket, count: int, until: float, still_wanted: Callable[[], bool] = lambda: True) -> bytes:
    data = bytearray()
    while len(data) < count:
        left_s = until - time.monotonic()
        if left_s <= 0 or not still_wanted():
            raise TimeoutError("no answer in time")
        connection.settimeout(min(left_s, 1.0))
        try:
            chunk = connection.recv(count - len(data))
        except TimeoutError:
            continue
        if not chunk:
            raise TrackerError("the tracker ended the conversation")
        data += chunk
    return bytes(data)
