"""The allocator's client library, for any Python program.

Owns one session and what was opened through it. Invariants: every wait is bounded; once the
allocator is gone every call says so, while mapped memory stays valid, and a successor that adopted
the session goes on with it. Thread-safe. A forked child can't use it, nor harm it.
"""

import itertools
import os
import pwd
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

from allocator import messages
from allocator.client.pool import Block, Lease, PoolClient
from allocator.client.session.connection import REQUEST_TIMEOUT_S, Connection
from allocator.client.weights import tiers
from allocator.client.weights.weight_set import WeightSetReader, WeightSetWriter
from allocator.errors import InvalidMessage, UnknownWeightSet, WaitTimeout
from allocator.messages import (
    PROTOCOL_VERSION,
    Event,
    Hello,
    LowerTier,
    Regions,
    SegmentHandedOut,
    Share,
    Statistics,
)
from allocator.runtime_dir import RuntimeDir

if TYPE_CHECKING:
    import torch

    from allocator.client.share.module import SharedModule

_POLL_SLICE_MS: Final = 1000
"""An Open waits in slices of this length, so that progress can be shown and threads take turns."""

R = TypeVar("R", bound=messages.Message)
OnWait = Callable[[int, int, int], None]
"""Called with (written bytes, total bytes, pid of the writer) while another process loads."""


class Client:
    """One session with the allocator. Use it as a context, or `close` it."""

    def __init__(
        self,
        runtime_dir: RuntimeDir,
        timeout_s: float = 10.0,
        *,
        device: str = "",
        model: str = "",
        user: str | None = None,
        label: str = "",
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ):
        hello = Hello(
            version=PROTOCOL_VERSION,
            device=device,
            model=model,
            user=_user_name() if user is None else user,
            label=label,
        )
        self._connection = Connection(runtime_dir, hello, timeout_s, request_timeout_s)
        self._pool = PoolClient(self._connection)

    @property
    def daemon_pid(self) -> int:
        """The allocator's process."""
        return self._connection.welcome.pid

    @property
    def device(self) -> str:
        """The device that this session is about."""
        return self._connection.welcome.device

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices of this allocator."""
        return self._connection.welcome.devices

    # --- weight sets

    def open_weight_set(
        self,
        key: str,
        fingerprint: Mapping[str, str] | None,
        *,
        timeout_s: float = 3600.0,
        on_wait: OnWait | None = None,
    ) -> WeightSetReader | WeightSetWriter:
        """Read the set where it is sealed, waking it where it sleeps; be its writer where nobody
        is; else wait. Without a fingerprint: whatever has that key, if there is something.

        Raises FingerprintMismatch, WaitTimeout after `timeout_s`, AllocatorGone; without a
        fingerprint UnknownWeightSet.
        """
        given = None if fingerprint is None else dict(fingerprint)
        return self._open(key, given, timeout_s, on_wait)

    def wake(self, key: str, *, timeout_s: float = 3600.0, on_wait: OnWait | None = None) -> None:
        """Bring a sleeping set back to the device, where it is idle then. Raises UnknownWeightSet,
        OutOfDeviceMemory, WaitTimeout."""
        opened = self._open(key, None, timeout_s, on_wait)
        if isinstance(opened, WeightSetWriter):
            opened.abandon()
            raise UnknownWeightSet(f"{key!r} has no copy that could be woken: load it again")
        opened.release()

    def sleep(self, key: str, *, level: int = 1, timeout_s: float = 3600.0) -> None:
        """Free an idle set's memory on the device: level 1 keeps it in host memory, level 2 as an
        image on disk. Raises UnknownWeightSet, WeightSetBusy, DiskFull, OutOfDeviceMemory,
        WaitTimeout."""
        if level not in (1, 2):
            raise InvalidMessage(f"level {level} is neither 1 (host memory) nor 2 (disk)")
        steps: list[LowerTier] = ["host"] if level == 1 else ["disk"]
        if level == 2 and not self.device.startswith("host"):
            steps = ["host", "disk"]  # a device's memory is written from the host's
        for tier in steps:
            tiers.sleep(self._connection, key, tier, timeout_s)

    def pin(self, key: str, pinned: bool = True) -> None:
        """A pinned set is never evicted to make room. Raises UnknownWeightSet."""
        self.request(messages.Pin(key=key, pinned=pinned), messages.Done)

    def evict(self, key: str, *, image: bool = False) -> None:
        """Free an idle or sleeping set, with `image` its image too. Raises UnknownWeightSet,
        WeightSetBusy, and DiskError where the image can't be deleted: nothing has changed then."""
        self.request(messages.Evict(key=key, image=image), messages.Done)

    def damaged(self, key: str, *, timeout_s: float = 3600.0) -> list[str]:
        """The tensors of a set whose bytes are not those that were sealed; reads all of it, and
        wakes it where it sleeps. Raises UnknownWeightSet."""
        opened = self._open(key, None, timeout_s, None)
        if isinstance(opened, WeightSetWriter):
            opened.abandon()
            raise UnknownWeightSet(f"{key!r} has no copy that could be checked")
        try:
            return opened.damaged()
        finally:
            opened.release()

    def share(
        self,
        module: "torch.nn.Module",
        key: str,
        *,
        fingerprint: Mapping[str, str] | None = None,
        timeout_s: float = 3600.0,
    ) -> "SharedModule":
        """Make a module's parameters aliases of one copy that all processes share; see
        `allocator.client.share.module.share`. Imports torch."""
        if not self.device.startswith("host"):
            raise InvalidMessage(
                f"modules are shared in host memory, and this session is about {self.device}: "
                'connect(device="host")'
            )
        from allocator.client.share.module import share

        return share(self, module, key, fingerprint=fingerprint, timeout_s=timeout_s)

    # --- the pool

    def lease(self, num_bytes: int) -> Lease:
        """Device memory of this session, zero at first, until it is released or the session ends.
        Raises OutOfDeviceMemory, QuotaExceeded."""
        return self._pool.lease(num_bytes)[0]

    def lease_many(self, num_bytes: int, count: int, *, alone_since_ms: int = 0) -> list[Lease]:
        """`count` leases of `num_bytes` each in one round trip: all, or none. `alone_since_ms`:
        when the one task began that this session works at (CLOCK_MONOTONIC), where it has nothing
        else to give way for it: of those that lack room for their only task, the oldest comes
        first."""
        return self._pool.lease(num_bytes, count, alone_since_ms=alone_since_ms)

    def release_many(self, leases: Sequence[Lease]) -> None:
        """Release them in one round trip."""
        self._pool.release(leases)

    def pool_share(self) -> Share:
        """What this session holds of the pool, and how much it should while others lack room: who
        leases for long asks now and then."""
        return self._pool.share()

    def put_blocks(self, blocks: Sequence[tuple[bytes, Lease]]) -> list[Block | None]:
        """Seal leases into the index of blocks under their digests; see `PoolClient.put`."""
        return self._pool.put(blocks)

    def look_up_blocks(self, digests: Sequence[bytes]) -> list[Block]:
        """The longest run of blocks, from the first digest on, that the index has; see
        `PoolClient.look_up`."""
        return self._pool.look_up(digests)

    def release_blocks(self, blocks: Sequence[Block]) -> None:
        """Unpin them in one round trip."""
        self._pool.release_blocks(blocks)

    # --- looking

    def statistics(self) -> Statistics:
        """What the allocator owns at this moment."""
        return self.request(messages.GetStatistics(), Statistics)

    def regions(self) -> Regions:
        """The pool by offset."""
        return self.request(messages.GetRegions(), Regions)

    def events(self, after: int = 0) -> tuple[Event, ...]:
        """What happened after event number `after`, as far as the history goes."""
        return self.request(messages.GetEvents(after=after), messages.Events).events

    def handed_out(self) -> Iterator[SegmentHandedOut]:
        """Every segment and file that clients of this device may map."""
        for page in itertools.count():
            found = self.request(messages.GetSegments(page=page), messages.Segments)
            yield from found.segments
            if not found.more:
                return

    def check_integrity(self) -> None:
        """Let the daemon check all its invariants. One that finds a broken one ends."""
        self.request(messages.CheckIntegrity(), messages.Done)

    def set_quota(self, kind: str, name: str, num_bytes: int | None) -> None:
        """What a "model" or a "user" may hold; None lifts it."""
        if kind not in ("model", "user"):
            raise InvalidMessage(f"a quota is a model's or a user's, not a {kind!r}'s")
        self.request(
            messages.SetQuota(kind=kind, name=name, num_bytes=num_bytes),  # type: ignore[arg-type]
            messages.Done,
        )

    # --- the session

    def request(self, message: messages.Request, expected: type[R]) -> R:
        """One round trip. Raises what the allocator answered with, AllocatorGone or WaitTimeout."""
        return self._connection.request(message, expected)

    def hurry(
        self, patience_s: float, tell: Callable[[float | None], None] = lambda _since: None
    ) -> None:
        """For who must not be held up: from now on no call waits longer than `patience_s` for the
        allocator. One that does not answer is not waited for again: calls raise AllocatorSilent
        until it, or its successor, does, which a thread of this session finds out. `tell` gets the
        time (CLOCK_MONOTONIC) since when it is silent, and None once it no longer is, from either
        thread."""
        self._connection.hurry(patience_s, tell)

    def is_alive(self) -> bool:
        """Whether the allocator still holds this session."""
        return self._connection.is_alive()

    def close(self) -> None:
        """End the session: the allocator takes back all it held. Idempotent."""
        self._pool.close()  # first: what this process maps must not be another's already
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(
        self,
        key: str,
        fingerprint: dict[str, str] | None,
        timeout_s: float,
        on_wait: OnWait | None,
    ) -> WeightSetReader | WeightSetWriter:
        deadline = time.monotonic() + timeout_s
        while True:
            left_ms = int(max(0.0, deadline - time.monotonic()) * 1000)
            wait_ms = min(_POLL_SLICE_MS, left_ms)
            answer, descriptors = self._connection.exchange(
                messages.Open(key=key, fingerprint=fingerprint, wait_ms=wait_ms)
            )
            match answer:
                case messages.Sealed():
                    return WeightSetReader(self._connection, key, answer, descriptors)
                case messages.Elected(generation=generation, source=source):
                    writer = WeightSetWriter(self._connection, key, generation)
                    if source is None:
                        return writer
                    on_host = self.device.startswith("host")
                    reader = tiers.wake(writer, source, in_place=on_host)
                    if reader is not None:
                        return reader
                case messages.StillLoading() as loading:
                    if on_wait is not None:
                        on_wait(loading.num_bytes, loading.total_bytes, loading.writer_pid)
                    if time.monotonic() >= deadline:
                        raise WaitTimeout(
                            f"process {loading.writer_pid} has been loading {key!r} for more than "
                            f"{timeout_s:.0f} s"
                        )
                case _:
                    raise InvalidMessage(f"unexpected answer {type(answer).__name__}")


def connect(
    runtime_dir: RuntimeDir | Path | str | None = None,
    timeout_s: float = 10.0,
    *,
    device: str = "",
    model: str = "",
    user: str | None = None,
    label: str = "",
    request_timeout_s: float = REQUEST_TIMEOUT_S,
) -> Client:
    """Open a session with the allocator of `runtime_dir` (default: see `RuntimeDir`), about its
    first device unless `device` names another. What the session holds is charged to `model` and
    `user` (default: the user's name); `label` is shown to people. Connecting takes `timeout_s` at
    most, and a request `request_timeout_s`, unless it says that it waits for longer.

    Raises AllocatorGone where none runs, RuntimeDirError, Unauthorized, InvalidSetting.
    """
    if not isinstance(runtime_dir, RuntimeDir):
        runtime_dir = RuntimeDir.open(runtime_dir, create=False)
    return Client(
        runtime_dir,
        timeout_s,
        device=device,
        model=model,
        user=user,
        label=label,
        request_timeout_s=request_timeout_s,
    )


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
