"""All devices of one daemon: opened, taken over from an earlier daemon, found by name.

Owns the order of a start. Invariants: what is answered for is claimed before it is looked whether
it is there; of what earlier daemons of this directory left there remains only what was adopted.
"""

import logging
import time
from collections.abc import Collection, Iterator

from allocator.backends import Backend, open_device
from allocator.backends.numa import placement_notes
from allocator.daemon.adoption import Adopted, adopt
from allocator.daemon.clients.sessions import Session
from allocator.daemon.device.budget import Holder
from allocator.daemon.device.device import Device
from allocator.daemon.device.parts import Around
from allocator.daemon.journal.file import read_journal
from allocator.daemon.journal.records import Kept, read_records
from allocator.daemon.own_segments import OwnSegments
from allocator.daemon.settings import DaemonSettings
from allocator.errors import InvalidSetting
from allocator.runtime_dir import RuntimeDir

log = logging.getLogger("onecopy.allocator")


class Devices:
    """None before `take_over`."""

    def __init__(self, settings: DaemonSettings) -> None:
        self._settings = settings
        self._devices: dict[str, Device] = {}
        self._device_names: dict[str, str] = {}
        """As the settings name it → as its backend does."""

    def __iter__(self) -> Iterator[Device]:
        return iter(self._devices.values())

    def __getitem__(self, name: str) -> Device:
        return self._devices[name]

    @property
    def names(self) -> tuple[str, ...]:
        """The first is everybody's who names none."""
        return tuple(self._devices)

    @property
    def hold_anything(self) -> bool:
        """Whether there is something to be adopted."""
        return any(device.has_pool or device.memory.sets.handles() for device in self)

    def find(self, name: str) -> Device:
        """By either name, the first where that is "". Raises InvalidSetting."""
        name = self._device_names.get(name, name) or self.names[0]
        if name not in self._devices:
            raise InvalidSetting(
                f"this allocator has no device {name!r}, only {', '.join(self.names)}"
            )
        return self._devices[name]

    # --- the start

    def take_over(self, runtime_dir: RuntimeDir, segments: OwnSegments, around: Around) -> None:
        """Adopt what an earlier daemon left and is still true; remove the rest. Raises
        InvalidSetting, DeviceError."""
        settings, now = self._settings, time.monotonic()
        kept = read_records(read_journal(runtime_dir.journal))
        segments.claim(kept.segments())
        sessions = [Session.of(record) for record in kept.sessions.values()]
        dead = [session for session in sessions if not around.sessions.adopt(session)]
        opened = {
            name: open_device(name, settings.placement if name == "host" else "")
            for name in settings.devices
        }
        self._device_names = {name: backend.device for name, backend in opened.items()}
        host_tier = open_device("host")
        for note in placement_notes(settings.placement):
            log.warning("%s", note)
        keep: set[str] = set()
        for backend in opened.values():
            if backend.device in self._devices:
                raise InvalidSetting(f"the device {backend.device} is named twice")
            adopted = self._adopted(backend, host_tier, kept, sessions, around, now)
            device = self._begin(backend, host_tier, adopted, around)
            for session in dead:
                if session.device == device.name:
                    device.end_session(session, now)
            device.find_images()
            keep |= {handle.segment for handle in adopted.memory.sets.handles()}
            keep |= {adopted.pool.segment} if adopted.pool is not None else set()
            if adopted.num_sets or adopted.pool:
                text = _inheritance(adopted, len(around.sessions))
                around.history.add("adopted", text)
        for session in list(around.sessions):
            if session.device not in self._devices:
                around.sessions.remove(session)
        for side in {backend.name: backend for backend in (*opened.values(), host_tier)}.values():
            for name in side.sweep(runtime_dir.segment_prefix, frozenset(keep)):
                around.history.add("removed", f"{name}, of an allocator that is gone")
        segments.settle(keep)

    def _adopted(
        self,
        backend: Backend,
        host_tier: Backend,
        kept: Kept,
        sessions: Collection[Session],
        around: Around,
        now: float,
    ) -> Adopted:
        limit = self._settings.memory_limit
        if limit is None:
            limit = backend.default_limit_bytes({one.process.pid for one in around.sessions})
        ours = [session for session in sessions if session.device == backend.device]
        return adopt(
            kept.device(backend.device),
            {session.number: kept.books[session.number] for session in ours},
            {session.number: Holder(session.model, session.user) for session in ours},
            backend,
            host_tier,
            limit_bytes=limit,
            quotas=self._settings.quotas,
            now=now,
        )

    def _begin(
        self, backend: Backend, host_tier: Backend, adopted: Adopted, around: Around
    ) -> Device:
        settings = self._settings
        device = Device(
            backend,
            host_tier,
            adopted.memory,
            around,
            image_folder=settings.image_folder,
            host_tier_limit=settings.host_tier_limit,
            prefix_cache_limit=settings.prefix_cache_limit,
            pool=adopted.pool,
            num_adopted_sets=adopted.num_sets,
        )
        self._devices[backend.device] = device
        return device


def _inheritance(adopted: Adopted, num_sessions: int) -> str:
    statistics = adopted.memory.pool.statistics()
    num_sets = sum(one.state in ("sealed", "idle") for one in adopted.memory.sets)
    return (
        f"{num_sets} weight sets, {statistics.num_leases} leases, {statistics.num_blocks} blocks "
        f"and {num_sessions} sessions of an allocator that was killed"
    )
