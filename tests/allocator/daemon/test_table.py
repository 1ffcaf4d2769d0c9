"""The daemon's table of requests: each has its row, and the journal misses nothing of them."""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from allocator.backends.host import HostBackend
from allocator.daemon.clients.sessions import Session, Sessions
from allocator.daemon.device.budget import DeviceMemory
from allocator.daemon.device.device import Device
from allocator.daemon.device.parts import Around
from allocator.daemon.journal.history import History
from allocator.daemon.journal.records import Kept, Record, SessionChanged
from allocator.messages import (
    BlockToPut,
    Extent,
    Lease,
    Leased,
    LeaseId,
    LookUpBlocks,
    PutBlocks,
    Request,
    Return,
    SetQuota,
    UnpinBlocks,
)
from allocator.processes.identity import ProcessIdentity

EXTENT = 64 << 10
DIGESTS = (b"1" * 16, b"2" * 16)


class Scene:
    """A device with one session, whose records are kept as they are noted."""

    def __init__(self, backend: HostBackend, folder: Path):
        self.noted: list[Record] = []
        self.session = Session(
            1, ProcessIdentity.own(), b"t" * 16, "host", model="m", user="u", label=""
        )
        self.session.pidfd = os.pidfd_open(os.getpid())
        self.sessions = Sessions()
        self.sessions.add(self.session)
        around = Around(
            began=0.0,
            sessions=self.sessions,
            history=History(),
            names=(f"/onecopy-test-{time.monotonic_ns()}-{n}" for n in itertools.count()),
            note=lambda record, sync=False: self.noted.append(record),
            reply=lambda *_: None,
        )
        memory = DeviceMemory(1 << 20, backend.granularity, limit_bytes=1 << 20)
        self.device = Device(
            backend, backend, memory, around, image_folder=folder, host_tier_limit=None
        )
        self.device.begin_session(self.session)
        self.noted.append(self.session.record())

    def ask(self, request: Request) -> object:
        return self.device.dispatch(self.session, (b"", b""), request, 1.0)

    def kept(self, records: list[Record]) -> tuple[object, ...]:
        """What a journal of these says."""
        kept = Kept()
        for record in records:
            record.enter(kept)
        device, books = kept.device("host"), kept.books[1]
        return (
            *(device.sets, device.quotas, device.pool, device.blocks),
            *(books.leases, books.pins, books.reads),
        )


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with contextlib.closing(HostBackend()) as backend:
        scene = Scene(backend, tmp_path)
        yield scene
        scene.device.close()
        scene.session.close()


def test_every_request_has_its_row(scene: Scene) -> None:
    assert set(scene.device._rows) == set(get_args(Request))


def test_what_was_noted_one_by_one_says_what_is_written_anew(scene: Scene) -> None:
    scene.ask(SetQuota(kind="user", name="u", num_bytes=1 << 20))
    leased = scene.ask(Lease(num_bytes=EXTENT, count=4))
    assert isinstance(leased, Leased)
    first, second, third, fourth = (extent.offset for extent in leased.extents)
    generation = leased.generation
    blocks = tuple(
        BlockToPut(digest, offset, generation)
        for digest, offset in zip(DIGESTS, (first, second), strict=True)
    )
    scene.ask(PutBlocks(blocks=blocks))
    scene.ask(LookUpBlocks(digests=DIGESTS))
    scene.ask(UnpinBlocks(digests=(*DIGESTS, DIGESTS[0])))
    scene.ask(Return(leases=(LeaseId(third, generation),)))
    anew = [scene.session.record(), *scene.device.records()]
    assert scene.kept(scene.noted) == scene.kept(anew)
    *_, found, leases, pins, _reads = scene.kept(anew)
    assert found == {
        digest: Extent(offset=offset, num_bytes=EXTENT)
        for digest, offset in zip(DIGESTS, (first, second), strict=True)
    }
    assert leases == {(fourth, generation): EXTENT}
    assert pins == {DIGESTS[1]: 1}


def test_what_a_session_gets_that_has_ended_is_not_noted(scene: Scene) -> None:
    """One that can't be given its descriptors ends while it is answered. The journal would
    contradict itself, and nothing at all would be adopted."""
    scene.sessions.remove(scene.session)
    noted = list(scene.noted)
    assert isinstance(scene.ask(Lease(num_bytes=EXTENT, count=1)), Leased)
    assert [
        one for one in scene.noted if one not in noted and isinstance(one, SessionChanged)
    ] == []
