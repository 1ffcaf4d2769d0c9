"""Who may hold how much of the pool while somebody lacks room: the arithmetic, and two sessions."""

import pytest

from allocator import OutOfDeviceMemory, RoomTaken
from allocator.daemon.pool.fair_share import PATIENCE_S, STILL_S, FairShare, Lone
from tests.daemon_process import DaemonProcess
from tests.leaks import wait_until

MB = 1 << 20


def test_equal_parts_for_all_who_hold_or_want_some() -> None:
    shares = FairShare()
    assert shares.bytes_for(1, 120, {}, now=0.0) == 120
    assert shares.bytes_for(1, 120, {1: 100, 2: 20, 3: 0}, now=0.0) == 60
    shares.refused(3, now=0.0)
    assert shares.bytes_for(1, 120, {1: 100, 2: 20, 3: 0}, now=0.0) == 40
    assert shares.is_wanted(1, now=0.0)
    assert not shares.is_wanted(3, now=0.0)


def test_who_was_served_or_stopped_asking_lacks_nothing() -> None:
    shares = FairShare()
    shares.refused(1, now=0.0)
    shares.refused(2, now=1.0)
    shares.served(2)
    assert not shares.is_wanted(3, now=PATIENCE_S + 0.1)
    assert shares.bytes_for(3, 10, {}, now=PATIENCE_S + 0.1) == 10


def test_of_tasks_that_are_alone_in_their_sessions_the_oldest_comes_first() -> None:
    shares = FairShare()
    shares.refused_alone(1, since_ms=50, now=0.0)
    shares.refused_alone(2, since_ms=70, now=0.0)
    assert shares.older_than(3, 100, now=0.0) == Lone(50, 1)
    assert shares.older_than(2, 70, now=0.0) == Lone(50, 1)
    assert shares.older_than(1, 50, now=0.0) is None
    assert shares.older_than(3, 20, now=0.0) is None
    assert shares.older_than(3, 0, now=0.0) == Lone(50, 1)  # it has several, and can give way
    shares.served(1)
    assert shares.older_than(3, 100, now=0.0) == Lone(70, 2)
    assert shares.older_than(3, 100, now=PATIENCE_S + 0.1) is None


def test_of_two_that_came_in_the_same_millisecond_one_comes_first() -> None:
    shares = FairShare()
    for session in (1, 2):
        shares.refused_alone(session, since_ms=50, now=0.0)
    assert shares.older_than(1, 50, now=0.0) is None
    assert shares.older_than(2, 50, now=0.0) == Lone(50, 1)


def test_who_holds_room_and_asks_nothing_is_not_waited_for() -> None:
    shares = FairShare()
    shares.heard(2, now=0.0)
    assert shares.others_come_on(1, {1: 10, 2: 10}, now=STILL_S - 0.1)
    assert not shares.others_come_on(1, {1: 10, 2: 10}, now=STILL_S + 0.1)
    assert not shares.others_come_on(1, {1: 10, 2: 0}, now=0.0)
    assert not shares.others_come_on(2, {1: 10, 2: 10}, now=0.0)  # only itself was heard
    shares.ended(2)
    assert not shares.others_come_on(1, {1: 10, 2: 10}, now=0.0)


def test_two_sessions_with_one_task_each_do_not_wait_for_each_other_for_ever(start_daemon) -> None:  # type: ignore[no-untyped-def]
    """Half of the room is too little for either: the older one gets all that it wants, then the
    other."""
    daemon: DaemonProcess = start_daemon("--memory-limit", "16MiB")
    with daemon.connect() as old, daemon.connect() as young:
        of_old = old.lease_many(MB, 8, alone_since_ms=1000)
        of_young = young.lease_many(MB, 8, alone_since_ms=2000)
        with pytest.raises(RoomTaken):
            old.lease_many(MB, 1, alone_since_ms=1000)
        with pytest.raises(RoomTaken, match="a task that is older"):
            young.lease_many(MB, 1, alone_since_ms=2000)
        assert young.pool_share().older_since_ms == 1000
        assert old.pool_share().older_since_ms == 0
        young.release_many(of_young)
        with pytest.raises(RoomTaken):
            young.lease_many(MB, 1, alone_since_ms=2000)
        of_old += old.lease_many(MB, 8, alone_since_ms=1000)
        assert young.pool_share().older_since_ms == 0
        old.release_many(of_old)
        assert len(young.lease_many(MB, 16, alone_since_ms=2000)) == 16


def test_what_could_never_fit_is_told_from_what_others_hold(start_daemon) -> None:  # type: ignore[no-untyped-def]
    daemon: DaemonProcess = start_daemon("--memory-limit", "16MiB")
    with daemon.connect() as first, daemon.connect() as second:
        first.lease_many(MB, 8)
        with pytest.raises(OutOfDeviceMemory) as refused:
            second.lease_many(MB, 17, alone_since_ms=1)
        assert not isinstance(refused.value, RoomTaken)
        assert first.pool_share().older_since_ms == 0  # nobody gives way for it
        with pytest.raises(RoomTaken):
            second.lease_many(MB, 9)


def test_a_late_session_gets_its_share_and_the_first_no_more_than_its_own(start_daemon) -> None:  # type: ignore[no-untyped-def]
    daemon: DaemonProcess = start_daemon("--memory-limit", "16MiB")
    with daemon.connect() as first, daemon.connect() as second:
        held = first.lease_many(MB, 16)
        assert not first.pool_share().wanted
        with pytest.raises(OutOfDeviceMemory):
            second.lease(MB)
        share = first.pool_share()
        assert share.wanted
        assert (share.held_bytes, share.fair_bytes) == (16 * MB, 8 * MB)
        first.release_many([held.pop() for _ in range(8)])
        with pytest.raises(OutOfDeviceMemory, match="other sessions lack room"):
            first.lease(MB)
        assert len(second.lease_many(MB, 7)) == 7
        held.append(first.lease(MB))  # nobody lacks anything now: the rest is for who asks first
        assert not first.pool_share().wanted
        assert second.pool_share().held_bytes == 7 * MB


def test_a_session_that_ended_lacks_nothing(start_daemon) -> None:  # type: ignore[no-untyped-def]
    daemon: DaemonProcess = start_daemon("--memory-limit", "16MiB")
    with daemon.connect() as first:
        held = first.lease_many(MB, 16)
        with daemon.connect() as second, pytest.raises(OutOfDeviceMemory):
            second.lease(MB)
        first.release_many(held)
        wait_until(lambda: first.statistics().num_sessions == 1, "the end of the second session")
        assert len(first.lease_many(MB, 16)) == 16  # at once, not when a second has passed


def test_sealed_blocks_count_for_everybody_who_pins_them(start_daemon) -> None:  # type: ignore[no-untyped-def]
    daemon: DaemonProcess = start_daemon("--memory-limit", "4MiB")
    digest = bytes(32)
    with daemon.connect() as first, daemon.connect() as second:
        [block] = first.put_blocks([(digest, first.lease(MB))])
        assert block is not None
        [same] = second.look_up_blocks([digest])
        assert first.pool_share().held_bytes == second.pool_share().held_bytes == MB
        first.release_blocks([block])
        assert first.pool_share().held_bytes == 0
        same.release()
        assert second.pool_share().held_bytes == 0


def test_blocks_that_nobody_maps_stay_within_their_limit_the_latest_of_them(start_daemon) -> None:  # type: ignore[no-untyped-def]
    daemon: DaemonProcess = start_daemon("--prefix-cache-limit", "2MiB")
    digests = [bytes([number]) * 32 for number in range(4)]
    with daemon.connect() as client:
        leases = client.lease_many(MB, 4)
        blocks = client.put_blocks(list(zip(digests, leases, strict=True)))
        assert client.statistics().pool.cached_bytes == 4 * MB  # mapped ones are in use
        for block in blocks:
            assert block is not None
            block.release()
        pool = client.statistics().pool
        assert pool.cached_bytes == pool.evictable_bytes == 2 * MB
        assert client.look_up_blocks(digests[:1]) == []
        assert len(client.look_up_blocks(digests[2:])) == 2
