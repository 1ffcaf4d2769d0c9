"""The allocator's client library, for any Python program.

Owns one session: its lifeline, its requests, and the weight sets it opened. Invariants: every wait
is bounded; requests are correlated, so that a late reply to one that was given up is never taken
for another's; once the allocator is gone every call says so, while mapped memory stays valid.
Thread-safe: one request is on its way at a time. A forked child can't use it, nor harm it.
"""

import contextlib
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

import msgspec
import zmq

from allocator import backends, messages
from allocator.errors import BY_CODE, AllocatorError, AllocatorGone, InvalidMessage, WaitTimeout
from allocator.lifeline import Lifeline
from allocator.messages import Extent, Handle, Manifest, Statistics
from allocator.runtime_dir import RuntimeDir

if TYPE_CHECKING:
    import torch

REQUEST_TIMEOUT_S: Final = 30.0
_POLL_SLICE_MS: Final = 1000
"""An Open waits in slices of this length, so that progress can be shown and threads take turns."""

R = TypeVar("R", bound=messages.Message)
OnWait = Callable[[int, int], None]
"""Called with (written bytes, total bytes) while another process loads."""


class WeightSetReader:
    """A sealed weight set, mapped read-only. Tensors taken from it keep the mapping alive."""

    def __init__(self, client: "Client", key: str, handle: Handle, manifest: Extent):
        self._client = client
        self.key = key
        self.handle = handle
        self._mapping = backends.by_name(handle.backend).map(handle, writable=False)
        described = self._mapping.buffer[manifest.offset : manifest.offset + manifest.num_bytes]
        try:
            self.manifest: Manifest = messages.decode_manifest(described)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.release()
            raise InvalidMessage(f"the manifest of {key!r} can't be read: {error}") from error

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Name → aliased, read-only tensor. Imports torch."""
        from allocator.tensor import tensors

        return tensors(self._mapping, self.manifest.tensors)

    def release(self) -> None:
        """Tell the allocator that this session reads the set no longer. Drop the tensors first:
        they stay valid, but the memory they keep alive is no longer accounted for."""
        self._client.request(
            messages.Release(key=self.key, generation=self.handle.generation), messages.Done
        )
        self._mapping.close()


class WeightSetWriter:
    """The election to fill a weight set: reserve once, write, seal. Leaving it as a context without
    a seal abandons it, and the next process that waits is elected."""

    def __init__(self, client: "Client", key: str, generation: int):
        self._client = client
        self.key = key
        self.generation = generation
        self._handle: Handle | None = None
        self._mapping: backends.Mapping | None = None
        self._ended = False

    def reserve(self, num_bytes: int) -> memoryview:
        """The one allocation of the whole set, mapped writable, its memory committed.

        Raises OutOfDeviceMemory.
        """
        reserved = self._client.request(
            messages.Reserve(key=self.key, generation=self.generation, num_bytes=num_bytes),
            messages.Reserved,
        )
        self._handle = reserved.handle
        self._mapping = backends.by_name(self._handle.backend).map(self._handle, writable=True)
        return self._mapping.buffer

    def writable_tensors(self, manifest: Manifest) -> "dict[str, torch.Tensor]":
        """The tensors that `manifest` describes, over the reserved segment, to be filled."""
        from allocator.tensor import tensors

        return tensors(self._reserved(), manifest.tensors)

    def progress(self, num_bytes: int) -> None:
        """Let those who wait see how far the writing is."""
        self._client.request(
            messages.Progress(key=self.key, generation=self.generation, num_bytes=num_bytes),
            messages.Done,
        )

    def seal(self, manifest: Manifest, offset: int) -> WeightSetReader:
        """Write `manifest` at `offset`, give up write access and become a reader.

        Drop every writable tensor before: what still views the writable mapping keeps it alive.
        """
        mapping = self._reserved()
        text = messages.encode(manifest)
        if offset + len(text) > mapping.num_bytes:
            raise InvalidMessage("the manifest does not fit behind the tensors")
        mapping.buffer[offset : offset + len(text)] = text
        mapping.close()
        sealed = self._client.request(
            messages.Seal(
                key=self.key,
                generation=self.generation,
                manifest=Extent(offset=offset, num_bytes=len(text)),
            ),
            messages.Sealed,
        )
        self._ended = True
        return WeightSetReader(self._client, self.key, sealed.handle, sealed.manifest)

    def abandon(self) -> None:
        """Give the election back. Idempotent; a no-op after the seal."""
        if self._ended:
            return
        self._ended = True
        if self._mapping is not None:
            self._mapping.close()
        self._client.request(
            messages.Abandon(key=self.key, generation=self.generation), messages.Done
        )

    def _reserved(self) -> backends.Mapping:
        if self._mapping is None:
            raise InvalidMessage("reserve the segment first")
        return self._mapping

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.abandon()
        except AllocatorGone:
            if error is None:
                raise


class Client:
    """One session with the allocator. Use it as a context, or `close` it."""

    def __init__(self, runtime_dir: RuntimeDir, timeout_s: float = 10.0):
        self._lifeline = Lifeline.connect(runtime_dir.lifeline, timeout_s)
        self._owner_pid = os.getpid()
        self._lock = threading.RLock()
        self._next_turn = threading.RLock()
        self._request_ids = itertools.count(1)
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, messages.MAX_FRAME_BYTES)
        self._socket.connect(self._lifeline.welcome.requests)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._lifeline.connection.fileno(), zmq.POLLIN)
        self._closed = False
        _open_clients.add(self)

    @property
    def daemon_pid(self) -> int:
        """The allocator's process."""
        return self._lifeline.welcome.pid

    def open_weight_set(
        self,
        key: str,
        fingerprint: Mapping[str, str],
        *,
        timeout_s: float = 3600.0,
        on_wait: OnWait | None = None,
    ) -> WeightSetReader | WeightSetWriter:
        """Read the set where it is sealed; be its writer where nobody is; else wait.

        Raises FingerprintMismatch, WaitTimeout after `timeout_s`, AllocatorGone.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left_ms = int(max(0.0, deadline - time.monotonic()) * 1000)
            answer = self._exchange(
                messages.Open(
                    key=key, fingerprint=dict(fingerprint), wait_ms=min(_POLL_SLICE_MS, left_ms)
                )
            )
            match answer:
                case messages.Sealed(handle=handle, manifest=manifest):
                    return WeightSetReader(self, key, handle, manifest)
                case messages.Elected(generation=generation):
                    return WeightSetWriter(self, key, generation)
                case messages.StillLoading() as loading:
                    if on_wait is not None:
                        on_wait(loading.num_bytes, loading.total_bytes)
                    if time.monotonic() >= deadline:
                        raise WaitTimeout(
                            f"process {loading.writer_pid} has been loading {key!r} for more than "
                            f"{timeout_s:.0f} s"
                        )
                case _:
                    raise InvalidMessage(f"unexpected answer {type(answer).__name__}")

    def evict(self, key: str) -> None:
        """Free an idle weight set. Raises UnknownWeightSet, WeightSetBusy."""
        self.request(messages.Evict(key=key), messages.Done)

    def statistics(self) -> Statistics:
        """What the allocator owns at this moment."""
        return self.request(messages.GetStatistics(), Statistics)

    def request(self, message: messages.Request, expected: type[R]) -> R:
        """One round trip. Raises what the allocator answered with, AllocatorGone or WaitTimeout."""
        answer = self._exchange(message)
        if not isinstance(answer, expected):
            raise InvalidMessage(f"unexpected answer {type(answer).__name__}")
        return answer

    def is_alive(self) -> bool:
        """Whether the allocator still holds this session."""
        return not self._closed and self._lifeline.is_open()

    def close(self) -> None:
        """End the session: the allocator takes back all it held. Idempotent. Waits for the request
        that another thread has on its way."""
        if self._owner_pid != os.getpid():
            self._drop_inherited()
            return
        with self._exclusive():
            if self._closed:
                return
            self._closed = True
            self._lifeline.close()
            self._socket.close(0)
            self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _drop_inherited(self) -> None:
        """In a forked child: the parent's session must not live on because our copy of its lifeline
        does. What ZeroMQ holds belongs to threads that were not forked, so it is left alone."""
        self._closed = True
        self._lifeline.close()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        # A lock alone would go to the thread that has just released it and asks again, for as long
        # as it waits for a weight set; here whoever came second holds the door until its turn.
        with self._next_turn:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _exchange(self, message: messages.Request) -> messages.Reply:
        if self._owner_pid != os.getpid():  # before the lock, which a lost thread may hold
            raise AllocatorGone("this session belongs to the parent process: connect() anew")
        frame = messages.encode(message)
        if len(frame) > messages.MAX_FRAME_BYTES:
            raise InvalidMessage(
                f"the request takes {len(frame)} bytes, at most {messages.MAX_FRAME_BYTES} can be "
                "sent"
            )
        with self._exclusive():
            if self._closed:
                raise AllocatorGone("this session is closed")
            request_id = next(self._request_ids).to_bytes(messages.REQUEST_ID_BYTES, "big")
            self._socket.send_multipart([request_id, self._lifeline.welcome.token, frame])
            reply = self._await(request_id)
        if isinstance(reply, messages.Failed):
            raise BY_CODE.get(reply.code, AllocatorError)(reply.message)
        return reply

    def _await(self, request_id: bytes) -> messages.Reply:
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        while (left_s := deadline - time.monotonic()) > 0:
            events = dict(self._poller.poll(int(left_s * 1000) + 1))
            if self._socket in events:
                answered, frame = self._socket.recv_multipart()
                if answered != request_id:
                    continue  # the answer to a request that was given up
                try:
                    return messages.decode_reply(frame)
                except msgspec.DecodeError as error:
                    raise InvalidMessage(f"not a reply: {error}") from error
            if self._lifeline.connection.fileno() in events:
                raise AllocatorGone(
                    "the allocator ended. Mapped memory stays valid; connect() again once a new "
                    "allocator runs."
                )
        raise WaitTimeout(f"the allocator did not answer within {REQUEST_TIMEOUT_S:.0f} s")


_open_clients: "weakref.WeakSet[Client]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for client in list(_open_clients):
        client._drop_inherited()


os.register_at_fork(after_in_child=_after_fork_in_child)


def connect(runtime_dir: RuntimeDir | Path | str | None = None, timeout_s: float = 10.0) -> Client:
    """Open a session with the allocator of `runtime_dir` (default: see `RuntimeDir`).

    Raises AllocatorGone where none runs, RuntimeDirError, Unauthorized.
    """
    if not isinstance(runtime_dir, RuntimeDir):
        runtime_dir = RuntimeDir.open(runtime_dir, create=False)
    return Client(runtime_dir, timeout_s)
