"""ZMTP 3.0 over a Unix socket, as a peer might speak it (rfc.zeromq.org/spec/23).

libzmq itself sends no part of a message before its last one is there; others need not wait.
"""

import socket
import struct
from pathlib import Path

_MORE = 1
_LONG = 2
_COMMAND = 4


def greeting(mechanism: bytes) -> bytes:
    """What both sides send first."""
    signature = b"\xff" + bytes(8) + b"\x7f"
    return signature + b"\x03\x00" + mechanism.ljust(20, b"\0") + b"\0" + bytes(31)


def frame(payload: bytes, *, more: bool) -> bytes:
    """A part of a message."""
    return _framed(payload, _MORE if more else 0)


def connect(path: Path, password: bytes | None, timeout_s: float) -> socket.socket:
    """A connection that is through the handshake; PLAIN with a password, else NULL. Raises OSError,
    also where the peer hangs up."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_s)
    try:
        connection.connect(str(path))
        connection.sendall(greeting(b"NULL" if password is None else b"PLAIN"))
        _receive(connection, 64)
        properties = _property(b"Socket-Type", b"DEALER") + _property(b"Identity", b"")
        if password is None:
            _command(connection, b"\x05READY" + properties)
        else:
            user = b"onecopy"
            _command(connection, b"\x05HELLO" + _short(user) + _short(password))
            _expect(connection, b"\x07WELCOME")
            _command(connection, b"\x08INITIATE" + properties)
        _expect(connection, b"\x05READY")
    except BaseException:
        connection.close()
        raise
    return connection


def _short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def _property(name: bytes, value: bytes) -> bytes:
    return _short(name) + struct.pack(">I", len(value)) + value


def _framed(payload: bytes, flags: int) -> bytes:
    if len(payload) < 256:
        return bytes([flags, len(payload)]) + payload
    return bytes([flags | _LONG]) + struct.pack(">Q", len(payload)) + payload


def _command(connection: socket.socket, body: bytes) -> None:
    connection.sendall(_framed(body, _COMMAND))


def _expect(connection: socket.socket, name: bytes) -> None:
    flags, length = _receive(connection, 2)
    body = _receive(connection, length)
    if not flags & _COMMAND or not body.startswith(name):
        raise OSError(f"the peer said {body!r}")


def _receive(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        piece = connection.recv(count - len(received))
        if not piece:
            raise ConnectionResetError("the peer has hung up")
        received += piece
    return received
